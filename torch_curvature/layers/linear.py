"""Rules of dense layers: ``z = x W^T + b``, matrix products with a parameter, bilinear forms."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .rules import Use, register_rule


def positions_last(dz: Tensor) -> Tensor:
    """[V, R, O] -> [V, R, 1, O]."""
    return dz.unsqueeze(2)


@register_rule(F.linear)
def linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Use]:
    batch_axes = output.dim() - 1
    if weight.dim() == 2:
        yield Use(weight, batch_axes, positions_last, lambda: input.reshape(-1, 1, input.shape[-1]))
    if bias is not None:
        yield Use(bias, batch_axes, positions_last)


@register_rule(torch.matmul)
@register_rule(torch.Tensor.matmul)
@register_rule(torch.mm)
@register_rule(torch.Tensor.mm)
def matmul(output: Tensor, input: Tensor, other: Tensor) -> Iterator[Use]:
    if other.dim() == 2 and input.dim() >= 2:
        yield Use(
            other, output.dim() - 1, positions_last, lambda: input.reshape(-1, 1, input.shape[-1]), transposed=True
        )


@register_rule(torch.addmm)
def addmm(output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: float) -> Iterator[Use]:
    if scales:
        return
    yield Use(mat2, 1, positions_last, lambda: mat1.unsqueeze(1), transposed=True)
    if input.dim() == 1:
        yield Use(input, 1, positions_last)


@register_rule(F.bilinear)
@register_rule(torch.bilinear)
def bilinear(
    output: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Iterator[Use]:
    def activation() -> Tensor:
        return (input1.unsqueeze(-1) * input2.unsqueeze(-2)).reshape(-1, 1, weight[0].numel())

    batch_axes = output.dim() - 1
    yield Use(weight, batch_axes, positions_last, activation)
    if bias is not None:
        yield Use(bias, batch_axes, positions_last)
