"""Inner products of the Jacobians of one batch with themselves, summed over all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factor, inner_products
from .norms import is_dense

_dense_gram = torch.ops.torch_curvature.dense_gram.default._op

# Numbers in all packed rows together up to which they stay in the caches while all pairs of them are met.
LIMIT = 1 << 21


def total_gram(factors: dict[str, Factor]) -> Tensor:
    """[N V, N V], rows (n, v): ``(J[v, n], J[w, m])`` summed over all parameters, symmetric to the bit.

    Dense layers with one position a sample in one pass of a helper of the CPU, which puts the sums where they belong.
    """
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    biases: list[int] = []
    others: dict[str, Factor] = {}
    size = 0
    for name, factor in factors.items():
        more = factor.g.numel() + (0 if factor.a is None else factor.a.numel()) if is_dense(factor) else LIMIT + 1
        if size + more > LIMIT or (outputs and outputs[0].dtype != factor.g.dtype):
            others[name] = factor
            continue
        size += more
        outputs.append(factor.g.squeeze(2))
        inputs.append(factor.g.new_empty(factor.g.shape[1], 0) if factor.a is None else factor.a.squeeze(1))
        biases.append(int(factor.a is None or factor.bias is not None))
    dense = _dense_gram(outputs, inputs, biases) if outputs else None
    if dense is not None and not others:
        return dense
    total = inner_products(others, others)
    V, N, *_ = total.shape
    samples_first = total.permute(1, 0, 3, 2)
    if dense is None:
        return samples_first.reshape(N * V, N * V)
    return dense.to(torch.promote_types(dense.dtype, total.dtype)).view(N, V, N, V).add_(samples_first).view(N * V, -1)
