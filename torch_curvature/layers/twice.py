"""Functions whose second derivative torch lacks, written out for passes that are differentiated twice.

What torch gets wrong or lacks and the first derivatives need as well is in ``written_out.py``; here are the rest.
Second derivatives of piecewise-linear functions are those that hold almost everywhere: zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .written_out import WRITTEN_OUT

Replacement = tuple[Callable[..., bool], Callable[..., Any]]


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(x / 6 + 1/2, 0), 1)``; torch differentiates it once only."""
    result = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(result) if inplace else result


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


def bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, mean or maximum of table rows over bags of any length that start at ``offsets``."""
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "embedding_bag with max_norm or scale_grad_by_freq: what autograd returns for it is not the derivative; "
            "leave the option out"
        )
    assert offsets is not None
    starts = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(input.shape[0], device=input.device)
    bag = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    index, bag = input[counted], bag[counted]
    rows = F.embedding(index, weight)
    empty = rows.new_zeros(starts.shape[0], weight.shape[1])
    if mode == "max":
        largest = empty.index_reduce(0, bag, rows.detach(), "amax", include_self=False)
        chosen = _first_of_bag(rows.detach() == largest[bag], bag, starts.shape[0])
        return empty.index_add(0, bag, torch.where(chosen, rows, torch.zeros_like(rows)))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[counted].unsqueeze(-1)
    total = empty.index_add(0, bag, rows)
    if mode == "sum":
        return total
    return total / torch.bincount(bag, minlength=starts.shape[0]).clamp(min=1).unsqueeze(-1).to(total.dtype)


def _first_of_bag(candidates: Tensor, bag: Tensor, count: int) -> Tensor:
    """Of the candidates [T, D] in each bag the first: a maximum that is reached twice has one gradient."""
    T = candidates.shape[0]
    order = torch.arange(T, device=bag.device).unsqueeze(-1).expand_as(candidates)
    first = torch.full((count, candidates.shape[1]), T, device=bag.device)
    first = first.scatter_reduce(
        0, bag.unsqueeze(-1).expand_as(candidates), torch.where(candidates, order, T), "amin", include_self=True
    )
    return candidates & (order == first[bag])


def _bag_applies(input: Tensor, *args: Any, **kwargs: Any) -> bool:
    return True


def _bags(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    applies, one_bag_a_row = WRITTEN_OUT[F.embedding_bag]
    whole: Tensor = (one_bag_a_row if applies(input, *args, **kwargs) else bags)(input, *args, **kwargs)
    return whole


# Keyed and used as ``WRITTEN_OUT``.
TWICE_DIFFERENTIABLE: dict[Callable[..., Any], Replacement] = {
    **WRITTEN_OUT,
    F.hardsigmoid: (lambda *args, **kwargs: True, hardsigmoid),
    F.embedding: (_is_sparse, dense_embedding),
    F.embedding_bag: (_bag_applies, _bags),
}
