"""Functions whose second derivative torch lacks, written out for passes that are differentiated twice.

What torch gets wrong or lacks and the first derivatives need as well is in ``written_out.py``; here are the rest.
Second derivatives of piecewise-linear functions are those that hold almost everywhere: zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .bags import embedding_bag
from .written_out import WRITTEN_OUT

Replacement = tuple[Callable[..., bool], Callable[..., Any]]


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(x / 6 + 1/2, 0), 1)``; torch differentiates it once only."""
    result = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(result) if inplace else result


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _is_sparse(*args: Any, sparse: bool = False, **kwargs: Any) -> bool:
    return sparse or (len(args) > 6 and bool(args[6]))


def dense_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The same rows with a dense gradient: a sparse one cannot be differentiated again."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


# Keyed and used as ``WRITTEN_OUT``.
TWICE_DIFFERENTIABLE: dict[Callable[..., Any], Replacement] = {
    **WRITTEN_OUT,
    F.hardsigmoid: (_always, hardsigmoid),
    F.embedding: (_is_sparse, dense_embedding),
    F.embedding_bag: (_always, embedding_bag),  # by offsets too
}
