"""Functions of torch whose second derivatives are wrong or missing, written out in functions whose are right.

`docs/torch_second_derivatives.md` holds the measurements. A `TorchFunctionMode` replaces them wherever they
are called from, a layer of `torch.nn` or the user's own code.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g v / |v|`, the norm over all axes but `dim` (all of them for -1). Salimans and Kingma, 2016."""
    axes = [axis for axis in range(v.ndim) if dim == -1 or axis != dim % v.ndim]
    return g * v / v.square().sum(dim=axes, keepdim=True).sqrt()


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`min(max(x / 6 + 1/2, 0), 1)`; written in place when asked, as torch does."""
    result = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(result) if inplace else result


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """`max(x, 0) + alpha (exp(min(x, 0) / alpha) - 1)`; torch's backward has 1 / alpha in single precision only."""
    result = input.relu() + alpha * torch.expm1(input.clamp(max=0) / alpha)
    return input.copy_(result) if inplace else result


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """`|x1[*, i] - x2[*, j]|_p`, `[*, P, M], [*, R, M] -> [*, P, R]`."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, mean or maximum over each bag: `[B, L]`, or `[T]` and `offsets [B]`, -> `[B, D]`."""
    if max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError(
            "embedding_bag with max_norm or scale_grad_by_freq: its gradient is not the derivative of its "
            "output, so it has no curvature; leave the option out"
        )
    bags, bag = _bag_of_each(input, offsets, include_last_offset)
    indices = input.reshape(-1)
    scale = torch.ones_like(indices, dtype=weight.dtype)
    if per_sample_weights is not None:
        scale = per_sample_weights.reshape(-1)
    if padding_idx is not None:
        kept = indices != padding_idx % weight.shape[0]
        indices, bag, scale = indices[kept], bag[kept], scale[kept]
    rows = weight[indices] * scale[:, None]
    if mode == "max":
        empty = weight.new_zeros(weight.shape[1])
        return torch.stack([_max_or(rows[bag == b], empty) for b in range(bags)])
    total = rows.new_zeros(bags, weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    return total / torch.bincount(bag, minlength=bags).clamp(min=1)[:, None].to(total.dtype)


def _bag_of_each(input: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[int, Tensor]:
    """The number of bags, and the bag of each index of the flattened input."""
    if input.ndim == 2:
        return input.shape[0], torch.arange(input.shape[0], device=input.device).repeat_interleave(input.shape[1])
    assert offsets is not None, "a one-dimensional input of embedding_bag needs offsets"
    starts = offsets[:-1] if include_last_offset else offsets
    positions = torch.arange(input.shape[0], device=input.device)
    return starts.shape[0], torch.searchsorted(starts.contiguous(), positions, right=True) - 1


def _max_or(rows: Tensor, empty: Tensor) -> Tensor:
    return rows.amax(0) if rows.shape[0] else empty


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    torch.cdist: cdist,
    F.hardsigmoid: hardsigmoid,
    F.celu: celu,
    torch.celu: celu,
    F.embedding_bag: embedding_bag,
}


class WrittenOut(TorchFunctionMode):
    """Inside, the functions of `REPLACEMENTS` run in their written-out form."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return REPLACEMENTS.get(function, function)(*args, **(kwargs or {}))
