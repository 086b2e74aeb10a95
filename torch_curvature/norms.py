"""Squared norms of Jacobians summed over all parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .factors import Factor, squared_norms
from .ops.routing import Route, route

_dense_norms = torch.ops.torch_curvature.dense_norms.default._op


def total_squared_norms(factors: Iterable[Factor]) -> Tensor | None:
    """[V, N] squared norms of the Jacobian's columns over all parameters together; None where there is no factor.

    Layers with one position a sample in one pass of a helper of the CPU: there an operator for each takes longer than
    its arithmetic. The others one by one, so that only one unfolded input is there at a time.
    """
    total: Tensor | None = None
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    biases: list[int] = []
    for factor in factors:
        if is_dense(factor) and (not outputs or outputs[0].dtype == factor.g.dtype):
            bare = factor.a is None
            outputs.append(factor.g.squeeze(2))
            inputs.append(factor.g.new_empty(factor.g.shape[1], 0) if factor.a is None else factor.a.squeeze(1))
            biases.append(int(bare or factor.bias is not None))
        else:
            part = squared_norms(factor)
            total = part if total is None else total + part
    if outputs:
        dense = _dense_norms(outputs, inputs, biases)
        total = dense if total is None else total + dense
    return total


def is_dense(factor: Factor) -> bool:
    """Whether the helper takes it."""
    g, a = factor.g, factor.input
    if type(g) is not Tensor or g.device.type != "cpu" or g.dtype not in (torch.float32, torch.float64):
        return False
    if a is None:
        return g.shape[2] == 1 and g.stride(3) == 1 and route(g) is Route.KERNEL
    if type(a) is not Tensor or a.dtype != g.dtype or a.shape[1] != 1:
        return False
    return g.stride(3) == 1 and a.stride(2) == 1 and route(g, a) is Route.KERNEL
