"""Diagonal, trace and Kronecker factors: what needs neither blocks nor Jacobians of all parameters at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diagonals import all_diagonals
from ..factors import FEW, Factor, jacobian_chunks, mirrored_gram
from ..joining import with_ones
from .blocks import normalised


def diagonal_of(matrix: Any) -> dict[str, Tensor]:
    """{name: tensor of the parameter's shape}."""
    sums: dict[str, Tensor] = {}
    for batch in matrix._sweep("diagonal"):
        for factors, sign in batch.pieces(squares=True):
            for name, part in all_diagonals(factors, sign).items():
                known = sums.get(name)
                sums[name] = part if known is None else known.add_(part)
    for name, p in matrix.parameters.items():
        if name not in sums:
            sums[name] = matrix.zeros(*p.shape)
    return normalised({name: sums[name] for name in matrix.parameters}, matrix._denominator)


def trace_of(matrix: Any) -> Tensor:
    """The sum of the columns' squared norms."""
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for batch in matrix._sweep("trace"):
        for norms, sign in batch.squared_norms():
            if norms is not None:
                total = total + (norms if sign is None else norms * sign).sum(dtype=torch.float64)
    return (total / matrix._denominator).to(matrix.dtype)


def norms_of(matrix: Any, what: str) -> Tensor:
    """[N] squared norms of a matrix's one column for each sample, from its own loss: not divided by D."""
    parts = []
    for batch in matrix._sweep(what):
        batch.scale = 1.0
        norms = None
        for found, _ in batch.squared_norms():
            if found is not None:
                norms = found[0]
        parts.append(matrix.zeros(batch.captured.samples) if norms is None else norms)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kronecker_of(matrix: Any, sharing: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (A, B)}; see ``QuadraticMatrix.kronecker``."""
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing must be 'expand' or 'reduce', got {sharing!r}")
    sums: dict[str, list[Tensor]] = {}
    rows_seen: dict[str, int] = {}
    checked = False
    for batch in matrix._sweep("kronecker"):
        first = True
        for factors, sign in batch.chunks(few=True):
            joined = _with_bias(matrix, factors)
            if not checked:
                _check_size(matrix, joined)
                checked = True
            for key, (factor, ones) in joined.items():
                if factor.a is not None and sharing == "reduce" and factor.positions > 1:
                    factor = Factor(
                        factor.g.sum(2, keepdim=True),
                        factor.a.mean(1, keepdim=True),
                        factor.shape,
                        factor.transposed,
                        factor.rows,
                    )
                B = _output_factor(factor, sign, matrix.budget.working_bytes())
                count = 1 if factor.a is None else factor.a.shape[0] * factor.a.shape[1]
                if key not in sums:
                    sums[key] = [_input_factor(factor, ones), B]
                    rows_seen[key] = count
                    continue
                sums[key][1] += B
                if first:
                    sums[key][0] += _input_factor(factor, ones)
                    rows_seen[key] += count
            first = False
    found = {}
    for key, (A, B) in sums.items():
        found[key] = (A.div_(rows_seen[key]), B if matrix._denominator == 1.0 else B.div_(matrix._denominator))
    return found


def _with_bias(matrix: Any, factors: dict[str, Factor]) -> dict[str, tuple[Factor, bool]]:
    """Weights joined with the bias of the same module (a column of ones in ``a``); the rest under their own names."""
    weights: dict[str, list[str]] = {}
    for name, factor in factors.items():
        if factor.a is not None:
            weights.setdefault(name.rpartition(".")[0], []).append(name)
    joined: dict[str, tuple[Factor, bool]] = {}
    taken = set()
    for module, names in weights.items():
        bias = f"{module}.bias" if module else "bias"
        alone = len(names) == 1
        for name in names:
            factor = factors[name]
            other = factors.get(bias)
            with_bias = (
                alone
                and other is not None
                and other.a is None
                and other.outputs == factor.outputs
                and name.rpartition(".")[2] == "weight"
            )
            if with_bias:
                taken.add(bias)
            joined[module if alone else name] = (factor, with_bias)
            taken.add(name)
    joined.update({n: (f, False) for n, f in factors.items() if n not in taken})
    return joined


def _check_size(matrix: Any, joined: dict[str, tuple[Factor, bool]]) -> None:
    entries = 0
    for factor, ones in joined.values():
        I = factor.shape[0] if factor.rows is not None else factor.inputs + ones
        O = factor.shape.numel() if factor.a is None else factor.outputs
        entries += I * I + O * O
    matrix.budget.require(
        entries,
        matrix.dtype.itemsize,
        f"{matrix.title}.kronecker()",
        "parameters without a Kronecker structure have their whole block as a factor; freeze the large ones, or raise "
        "memory_budget (GiB)",
    )


def _input_factor(factor: Factor, ones: bool) -> Tensor:
    """``sum a a^T`` over samples and positions; with ``ones`` for a that ends with a one."""
    if factor.a is None:
        return factor.g.new_ones(1, 1)
    a, I = factor.a, factor.inputs
    if factor.rows is not None:
        full = a.new_zeros(factor.shape[0], factor.shape[0])
        full[factor.rows[:, None], factor.rows] = mirrored_gram(a)
        return full
    if not ones:
        return mirrored_gram(a)
    if a.numel() <= FEW:
        return mirrored_gram(with_ones(a))
    A = a.new_empty(I + 1, I + 1)
    A[:I, :I] = mirrored_gram(a)
    A[I, :I] = A[:I, I] = a.sum((0, 1))
    A[I, I] = a.shape[0] * a.shape[1]
    return A


def _output_factor(factor: Factor, sign: Tensor | None, working_bytes: int) -> Tensor:
    if factor.a is None:
        total = None
        for chosen, J in jacobian_chunks(factor, max(1, working_bytes // (4 * factor.g.element_size()))):
            part = mirrored_gram(J.reshape(-1, J.shape[2]), None if sign is None else sign[:, chosen].reshape(-1))
            total = part if total is None else total + part
        assert total is not None
        return total
    return mirrored_gram(factor.g.flatten(0, 1), None if sign is None else sign.reshape(-1))
