"""Inputs of a parameter's uses, joined along the positions S."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def with_ones(a: Tensor) -> Tensor:
    """With a last entry of ones."""
    return nn.functional.pad(a, (0, 1), value=1.0)


def form(a: Tensor | None) -> tuple[Any, ...]:
    """Uses with the same form (and orientation) can be joined along S."""
    return ("direct",) if a is None else (a.is_floating_point(), a.shape[-1])


def join(activations: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    a = activations[0] if len(activations) == 1 else torch.cat(activations, 1)
    return (a, None) if a.is_floating_point() else one_hot(a[..., 0], dtype)


def one_hot(index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, S] rows of a table -> (a [N, S, I] over the I rows in use, rows [I]); negative entries use no row."""
    rows, place = torch.unique(index, return_inverse=True)
    a = torch.zeros(*index.shape, rows.numel(), dtype=dtype, device=index.device)
    a.scatter_(2, place.unsqueeze(-1), 1)
    if rows.numel() and rows[0] < 0:
        rows, a = rows[1:], a[:, :, 1:]
    return a, rows
