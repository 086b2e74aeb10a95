"""Products of vectors, matrices and tensors, batched and differentiable: `A x B`, `u . v`, `A (.) B`, `u (x) v`."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import frobenius_inner, outer
from .ops.routing import check_one_device

__all__ = ["frobenius_inner", "inner", "outer", "tensor_product"]


def tensor_product(a: Tensor, b: Tensor, *, axes: int = 1, batch_axes: int = 0) -> Tensor:
    """Contraction of adjacent axes, `(A x B)[i.., j..] = sum_k.. a[i.., k..] b[k.., j..]`: matrices and higher.

    For two matrices and one axis it is the matrix product; for `a [i, k, l]`, `b [k, l, j]` and two axes it is
    `[i, j]`, contracted over k and l; with no axes it is the outer product of two tensors.

    Args:
        a: `[*batch, *i, *k]`, the last `axes` axes of which are contracted.
        b: `[*batch, *k, *j]`, with the first `axes` axes after those of the batch.
        axes: how many adjacent axes are contracted.
        batch_axes: how many leading axes of each are a batch; they broadcast against each other.

    Returns:
        `[*batch, *i, *j]`.

    Raises:
        ValueError: too few axes, or contracted or batch axes that differ, with both shapes; two devices.
    """
    check_one_device("tensor_product", a=a, b=b)
    shapes = f"a {tuple(a.shape)} and b {tuple(b.shape)} with axes={axes}, batch_axes={batch_axes}"
    if axes < 0 or batch_axes < 0 or min(a.ndim, b.ndim) < axes + batch_axes:
        raise ValueError(f"a and b need at least axes + batch_axes axes each, got {shapes}")
    rows, inside = a.shape[batch_axes : a.ndim - axes], a.shape[a.ndim - axes :]
    columns = b.shape[batch_axes + axes :]
    if b.shape[batch_axes : batch_axes + axes] != inside:
        raise ValueError(
            f"the last axes of a, {tuple(inside)}, must equal the first of b, "
            f"{tuple(b.shape[batch_axes : batch_axes + axes])}, after the batch: got {shapes}"
        )
    try:
        batch = torch.broadcast_shapes(a.shape[:batch_axes], b.shape[:batch_axes])
    except RuntimeError:
        raise ValueError(f"the batch axes do not broadcast: {shapes}") from None
    left = a.reshape(*a.shape[:batch_axes], rows.numel(), inside.numel())
    right = b.reshape(*b.shape[:batch_axes], inside.numel(), columns.numel())
    return (left @ right).reshape([*batch, *rows, *columns])


def inner(u: Tensor, v: Tensor) -> Tensor:
    """Inner product `(u . v)[*] = sum_i u[*, i] v[*, i]`, `[*, n], [*, n] -> [*]`; leading axes broadcast.

    Raises:
        ValueError: no axis, or last or leading axes that do not fit, with both shapes.
        TypeError: dtypes that are not floating or differ.
    """
    if min(u.ndim, v.ndim) < 1 or u.shape[-1] != v.shape[-1]:
        raise ValueError(f"u and v must share their last axis, got {tuple(u.shape)} and {tuple(v.shape)}")
    return frobenius_inner(u.unsqueeze(-2), v.unsqueeze(-2))
