"""The oracle: derivatives of the user's own reduced loss, by `jacrev` of `grad`, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_curvature.losses import interpret
from torch_curvature.losses.interface import BoundLoss


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


def check(loss_fn: Callable[..., Any], outputs: Tensor, targets: Any) -> BoundLoss:
    """All derivatives against those of the loss itself; the bound loss."""
    loss = interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    total = loss.combine([bound.denominator])
    expected = full_hessian(loss_fn, outputs, targets)
    torch.testing.assert_close(bound.value() / total, loss_fn(outputs, targets))
    torch.testing.assert_close(bound.gradient() / total, full_gradient(loss_fn, outputs, targets))
    for max_columns in (None, 2):
        chunks = list(bound.columns(max_columns))
        assert sum(len(s) for s, _ in chunks) == bound.num_columns
        hessian = block_diagonal(sum_of_columns(chunks, outputs.shape)) / total
        torch.testing.assert_close(hessian, expected)
    u = torch.randn(2, *outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = bound.hessian_product(u).reshape(2, -1) / total
    torch.testing.assert_close(product, u.reshape(2, -1) @ expected)
    return bound
