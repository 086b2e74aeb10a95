"""Diagonals of Gauss-Newton blocks of all parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Size, Tensor

from .factors import Factor, diagonals
from .norms import is_dense

_dense_diagonals = torch.ops.torch_curvature.dense_diagonals.default._op
_WEIGHT, _BIAS = 1, 2

# Entries of all inputs together up to which one pass over all layers is worth more than an operator for each.
FEW = 1 << 18


def all_diagonals(factors: Iterable[tuple[str, Factor]], sign: Tensor | None = None) -> dict[str, Tensor]:
    """``sum_vn sign[v,n] J[v,n]^2`` by parameter, in its shape; weights and biases that come as one factor apart.

    Dense layers with one position a sample in one pass of a helper of the CPU, the others one by one.
    """
    found: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    wanted: list[int] = []
    results: list[tuple[str, Size, bool]] = []
    entries = 0
    for name, factor in factors:
        if not (is_dense(factor) and factor.rows is None and factor.outputs > 0):
            found.update(diagonals(name, factor, sign))
            continue
        a = factor.a
        size = 0 if a is None else a.numel()
        if entries + size > FEW or (outputs and outputs[0].dtype != factor.g.dtype):
            found.update(diagonals(name, factor, sign))
            continue
        entries += size
        outputs.append(factor.g.squeeze(2))
        results.append((name, factor.shape, factor.transposed))
        if a is None:
            inputs.append(factor.g.new_empty(factor.g.shape[1], 0))
            wanted.append(_BIAS)
        elif factor.bias is None:
            inputs.append(a.squeeze(1))
            wanted.append(_WEIGHT)
        else:
            inputs.append(a.squeeze(1))
            wanted.append(_WEIGHT + _BIAS)
            results.append((factor.bias, Size([factor.outputs]), False))
    if outputs:
        sums = _dense_diagonals(outputs, inputs, wanted, None if sign is None else sign.to(outputs[0].dtype))
        for (name, shape, transposed), part in zip(results, sums, strict=True):
            found[name] = (part.T.contiguous() if transposed else part).reshape(shape)
    return found
