"""The oracle: derivatives of the user's own reduced loss, by `jacrev` of `grad`, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def full_hessian(loss_fn: Callable[..., Any], outputs: Tensor, targets: Any) -> Tensor:
    """Hessian `[N * C, N * C]` of the batch loss as reduced."""
    size = outputs.numel()

    def of(x: Tensor) -> Tensor:
        return loss_fn(x, targets)

    return torch.func.jacrev(torch.func.grad(of))(outputs.detach()).reshape(size, size)


def full_gradient(loss_fn: Callable[..., Any], outputs: Tensor, targets: Any) -> Tensor:
    return torch.func.grad(lambda x: loss_fn(x, targets))(outputs.detach())


def block_diagonal(blocks: Tensor) -> Tensor:
    """`[N, C, C]` to `[N * C, N * C]`."""
    return torch.block_diag(*blocks) if len(blocks) else blocks.new_zeros(0, 0)


def sum_of_columns(columns: Any, shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    """`sum_v sign s s^T`, `[N, C, C]`, of an iterator of columns."""
    samples, width = shape[0], math.prod(shape[1:])
    total = torch.zeros(samples, width, width, dtype=dtype)
    for s, sign in columns:
        assert s.shape[1:] == shape
        flat = s.reshape(len(s), samples, width)
        signed = flat if sign is None else flat * sign.unsqueeze(-1)
        total += torch.einsum("vni,vnj->nij", signed, flat)
    return total
