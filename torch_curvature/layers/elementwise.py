"""Rules of parameters that act elementwise: additions, multiplications, slopes, tokens expanded over the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .rules import Use, reduced_to, register_rule, rows


def broadcast_axes(parameter: Tensor, output: Tensor) -> int:
    """Leading axes of ``output`` along which ``parameter`` is repeated."""
    missing = output.dim() - parameter.dim()
    axes = missing
    while axes < output.dim() and parameter.shape[axes - missing] == 1:
        axes += 1
    return axes


def elementwise(output: Tensor, parameter: Any, factor: Tensor | None) -> Iterator[Use]:
    """Use of ``parameter`` in ``z = parameter * factor + ...`` with broadcasting."""
    if not isinstance(parameter, Tensor) or parameter.dim() > output.dim():
        return
    axes = broadcast_axes(parameter, output)
    if axes == 0:
        return
    own = parameter.shape[axes - (output.dim() - parameter.dim()) :]
    if any(size not in (1, full) for size, full in zip(own, output.shape[axes:])):
        return  # repeated in another way than by broadcasting

    def gradient(dz: Tensor) -> Tensor:
        if factor is not None:
            dz = dz * rows(factor.expand(output.shape), axes).to(dz.dtype)
        return reduced_to(dz, own)

    yield Use(parameter, axes, gradient)


@register_rule(torch.add)
@register_rule(torch.Tensor.add)
def addition(output: Tensor, input: Any, other: Any, **scale: Any) -> Iterator[Use]:
    if not scale:
        yield from elementwise(output, input, None)
        yield from elementwise(output, other, None)


@register_rule(torch.sub)
@register_rule(torch.Tensor.sub)
def subtraction(output: Tensor, input: Any, other: Any, **scale: Any) -> Iterator[Use]:
    if not scale:
        yield from elementwise(output, input, None)
        yield from elementwise(output, other, output.new_full((), -1))


@register_rule(torch.mul)
@register_rule(torch.Tensor.mul)
def multiplication(output: Tensor, input: Any, other: Any) -> Iterator[Use]:
    for parameter, factor in ((input, other), (other, input)):
        if isinstance(factor, Tensor):
            yield from elementwise(output, parameter, factor)


@register_rule(torch.Tensor.expand)
@register_rule(torch.Tensor.repeat)
def expansion(output: Tensor, input: Tensor, *sizes: Any, **options: Any) -> Iterator[Use]:
    """A token repeated for every sample: its uses are all downstream of the expanded tensor."""
    return elementwise(output, input, None)


@register_rule(F.prelu)
@register_rule(torch.prelu)
def prelu(output: Tensor, input: Tensor, weight: Tensor) -> Iterator[Use]:
    def gradient(dz: Tensor) -> Tensor:
        slope = (
            (dz * input.clamp(max=0).to(dz.dtype)).reshape(*dz.shape[:2], -1)
            if weight.numel() == 1
            else (dz * input.clamp(max=0).to(dz.dtype)).reshape(*dz.shape[:3], -1)
        )
        return slope.sum(-1).reshape(*dz.shape[:2], 1, weight.numel())

    if input.dim() >= 2:
        yield Use(weight, 1, gradient)
