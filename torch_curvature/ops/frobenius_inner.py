"""Frobenius inner products ``A (.) B = sum_ij A_ij B_ij``, batched: ``[*, m, n], [*, m, n] -> [*]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .routing import (
    Route,
    batch_first,
    broadcast_batch,
    check_rank,
    check_size,
    check_tensors,
    promoted,
    route,
    wide,
)

_kernel = torch.ops.torch_curvature.frobenius_inner.default._op  # the C++ entry itself: no Python frame on the way


def frobenius_inner(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius inner product ``(A (.) B)[*] = sum_ij a[*, i, j] b[*, i, j]``.

    Read in one pass, without the product ``a * b`` ever being stored; transposed and otherwise strided inputs are read
    where they lie. Half types are summed in float32.

    Args:
        a: ``[*, m, n]``; leading axes broadcast against those of ``b``.
        b: ``[*, m, n]``, of the dtype and on the device of ``a``.

    Returns:
        ``[*]``, differentiable to any order in every mode of torch.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: the last two axes differ or are missing, leading axes do not broadcast, inputs on two devices.
    """
    try:
        way = route(a, b)
        if way is Route.KERNEL:
            return _kernel(a, b)
    except (RuntimeError, AttributeError, NotImplementedError):
        if (same := promoted(a, b)) is not None:
            return frobenius_inner(*same)
        _shape(a, b)
        raise
    if (same := promoted(a, b)) is not None:
        return frobenius_inner(*same)
    _shape(a, b)
    return _FrobeniusInner.apply(a, b) if way is Route.FUNCTION else _formula(a, b)


def _shape(a: Tensor, b: Tensor) -> torch.Size:
    check_tensors("frobenius_inner", a=a, b=b)
    check_rank("frobenius_inner", "a", a, "m, n")
    check_rank("frobenius_inner", "b", b, "m, n")
    for axis in (-2, -1):
        check_size("frobenius_inner", "b", b, axis, "a", a, axis)
    return broadcast_batch("frobenius_inner", {"a": 2, "b": 2}, a=a, b=b)


def _formula(a: Tensor, b: Tensor) -> Tensor:
    return (wide(a) * wide(b)).sum((-2, -1)).to(a.dtype)


class _FrobeniusInner(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _kernel(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        scale = gradient.unsqueeze(-1).unsqueeze(-1)
        return (scale * b).sum_to_size(a.shape) if need_a else None, (scale * a).sum_to_size(
            b.shape
        ) if need_b else None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        terms = [
            frobenius_inner(da, b) if da is not None else None,
            frobenius_inner(a, db) if db is not None else None,
        ]
        present = [term for term in terms if term is not None]
        return present[0] if len(present) == 1 else present[0] + present[1]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        rank = max(a.dim() - (axes[0] is not None), b.dim() - (axes[1] is not None))
        a, b = (batch_first(t, axis, info.batch_size, rank) for t, axis in zip((a, b), axes))
        return frobenius_inner(a, b), 0


@torch.library.register_fake("torch_curvature::frobenius_inner")
def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(_shape(a, b))
