"""``torch.nn.functional.embedding_bag`` written out: rows of a table, summed, averaged or maximised over bags."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def one_bag_a_row(input: Tensor, *args: object, **kwargs: object) -> bool:
    """Whether a call gives its bags as the rows of ``input [N, length]``, and not by offsets."""
    return input.dim() == 2 and not input.is_floating_point()


def embedding_bag(
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
    """Rows of a table gathered and reduced over bags: the rows of ``input [N, length]``, or runs that start at offsets.

    Raises:
        ValueError: offsets with an option that changes what autograd returns (``max_norm``, ``scale_grad_by_freq``).
    """
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    if one_bag_a_row(input):
        rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return _over_rows(rows, counted, mode, per_sample_weights)
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "embedding_bag with max_norm or scale_grad_by_freq: what autograd returns for it is not the derivative; "
            "leave the option out"
        )
    assert offsets is not None
    starts = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(input.shape[0], device=input.device)
    bag = (torch.searchsorted(starts.contiguous(), places, right=True) - 1)[counted]
    rows = F.embedding(input[counted], weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[counted].unsqueeze(-1)
    return _over_runs(rows, bag, starts.shape[0], mode)


def _over_rows(rows: Tensor, counted: Tensor, mode: str, per_sample_weights: Tensor | None) -> Tensor:
    """[N, length, D] -> [N, D]; entries that are not counted are padding."""
    if mode == "max":
        lowest = torch.finfo(rows.dtype).min
        largest = rows.masked_fill(~counted.unsqueeze(-1), lowest).amax(1)
        return torch.where(counted.any(1, keepdim=True), largest, torch.zeros_like(largest))
    weights = counted.to(rows.dtype)
    if per_sample_weights is not None:
        weights = weights * per_sample_weights
    total = (rows * weights.unsqueeze(-1)).sum(1)
    return total / counted.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


def _over_runs(rows: Tensor, bag: Tensor, bags: int, mode: str) -> Tensor:
    """[T, D], the number of each row's bag [T] -> [bags, D]; a bag without rows is zero."""
    empty = rows.new_zeros(bags, rows.shape[1])
    if mode == "max":
        largest = empty.index_reduce(0, bag, rows.detach(), "amax", include_self=False)
        chosen = _first_of_bag(rows.detach() == largest[bag], bag, bags)
        return empty.index_add(0, bag, torch.where(chosen, rows, torch.zeros_like(rows)))
    total = empty.index_add(0, bag, rows)
    if mode == "sum":
        return total
    return total / torch.bincount(bag, minlength=bags).clamp(min=1).unsqueeze(-1).to(total.dtype)


def _first_of_bag(candidates: Tensor, bag: Tensor, count: int) -> Tensor:
    """Of the candidates [T, D] in each bag the first: a maximum that is reached twice has one gradient."""
    T = candidates.shape[0]
    order = torch.arange(T, device=bag.device).unsqueeze(-1).expand_as(candidates)
    first = torch.full((count, candidates.shape[1]), T, device=bag.device)
    first = first.scatter_reduce(
        0, bag.unsqueeze(-1).expand_as(candidates), torch.where(candidates, order, T), "amin", include_self=True
    )
    return candidates & (order == first[bag])
