"""Inner products of Jacobians, of one batch with itself or of two, summed over all parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factor, ones_for
from .norms import is_dense
from .ops import jacobian_gram
from .unfolding import Unfolding, smaller_formed

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


def inner_products(left: dict[str, Factor], right: dict[str, Factor]) -> Tensor:
    """[V, N, V2, N2] inner products of the Jacobians, summed over all parameters."""
    pairs, pairs2 = ({(n, f.bias) for n, f in factors.items() if f.bias is not None} for factors in (left, right))
    if pairs != pairs2:
        left, right = separated(left), separated(right)
    total: Tensor | None = None
    for name, factor in left.items():
        if name in right:
            total = gram(factor, right[name], total)
    if total is None:
        g, g2 = (next(iter(factors.values())).g for factors in (left, right))
        return g.new_zeros(*g.shape[:2], *g2.shape[:2])
    return total


def separated(factors: dict[str, Factor]) -> dict[str, Factor]:
    """Weights and biases each for themselves."""
    found = {}
    for name, factor in factors.items():
        found[name] = factor.without_bias()
        if factor.bias is not None:
            found[factor.bias] = factor.of_bias()
    return found


def _as_g(factor: Factor) -> Tensor:
    """The Jacobian formed, over all entries of the parameter: [V, N, 1, p], to go with a = 1."""
    return factor.spread(factor.jacobian(), (2,))[:, :, None]


def gram(left: Factor, right: Factor, add_to: Tensor | None = None) -> Tensor:
    """[V, N, V2, N2] inner products of the Jacobians of one parameter on two batches (or one with itself).

    With ``add_to`` they are added to it, and it is returned.
    """
    formed = left.input is None or right.input is None or any(smaller_formed(factor) for factor in (left, right))
    if formed and right is left and isinstance(left.input, Unfolding) and left.input.patches is not None:
        return left.input.patches.gram(left.g, add_to, left.bias is not None)
    if left.bias is not None and (formed or left.positions > 1 or right.positions > 1):
        of_bias = left.of_bias()
        total = gram(of_bias, of_bias if right is left else right.of_bias(), add_to)
        weight = left.without_bias()
        return gram(weight, weight if right is left else right.without_bias(), total)
    if formed:
        first, second = _as_g(left), None if right is left else _as_g(right)
        ones2 = None if second is None else ones_for(second)
        return jacobian_gram(first, ones_for(first), second, ones2, add_to=add_to)
    a, a2 = left.with_ones(), right.with_ones()
    if left.rows is not None and right.rows is not None and left is not right:
        a2 = a2 @ (right.rows[:, None] == left.rows).to(a2.dtype)
    if left is right:
        return jacobian_gram(left.g, a, add_to=add_to)
    return jacobian_gram(left.g, a, right.g, a2, add_to=add_to)
