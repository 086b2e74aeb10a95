"""The dual: inner products of the columns, ``J J^T``, and what follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..factors import Factor, inner_products

Kept = tuple[int, int, dict[str, Factor], "Tensor | None"]  # V, N, factors, sign


def gather(matrix: Any, what: str) -> list[list[Kept]]:
    """The factors of all the data: for each batch its chunks of columns."""
    kept: list[list[Kept]] = []
    for batch in matrix._sweep(what):
        kept.append([])
        for pieces, sign in batch.pieces(few=False):  # a pair of chunks costs the Jacobians of both again
            factors = dict(pieces)
            V, N = _extent(factors)
            kept[-1].append((V, N, factors, sign))
    return [chunks for chunks in kept if chunks]


def _extent(factors: dict[str, Factor]) -> tuple[int, int]:
    factor = next(iter(factors.values()))
    return factor.g.shape[0], factor.g.shape[1]


def gram_of(matrix: Any, what: str = "gram") -> Tensor:
    """[N V, N V], rows (n, v): samples in the order of the data, columns of a sample together."""
    by_batch = gather(matrix, what)
    if any(sign is not None for chunks in by_batch for *_, sign in chunks):
        raise ValueError(
            f"{matrix.title}.gram(): the loss is not convex in the outputs, so that this matrix is no sum of squares "
            "and has no Gram matrix; use dense(), blocks() or products with @"
        )
    sizes = [sum(V for V, *_ in chunks) * chunks[0][1] for chunks in by_batch]
    total = sum(sizes)
    matrix.budget.require(
        total * total,
        matrix.dtype.itemsize,
        f"{matrix.title}.{what}(): {total} x {total},",
        "give less data, use diagonal() or products with @, or raise memory_budget (GiB)",
    )
    out = matrix.zeros(total, total)
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    for i, left in enumerate(by_batch):
        for j in range(i, len(by_batch)):
            part = between(left, by_batch[j])
            if i == j and len(left) > 1:  # one chunk of columns with itself is symmetric to the bit already
                part = symmetrised(part)
            if len(by_batch) == 1:
                return part.div_(matrix._denominator) if matrix._denominator != 1.0 else part
            out[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = part
            if i != j:
                out[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = part.T
    return out.div_(matrix._denominator) if matrix._denominator != 1.0 else out


def symmetrised(out: Tensor) -> Tensor:
    return torch.triu(out) + torch.triu(out, 1).T


def between(left: list[Kept], right: list[Kept]) -> Tensor:
    """[N V, N2 V2] of two batches."""
    rows = []
    for _, _, factors, _ in left:
        parts = [inner_products(factors, others) for _, _, others, _ in right]
        rows.append(torch.cat(parts, 2) if len(parts) > 1 else parts[0])
    full = torch.cat(rows, 0) if len(rows) > 1 else rows[0]
    V, N, V2, N2 = full.shape
    return full.permute(1, 0, 3, 2).reshape(N * V, N2 * V2)


def frobenius_from_gram(matrix: Any) -> Tensor:
    """``|sum_i sign_i j_i j_i^T|_F^2 = sum_ik sign_i sign_k (j_i . j_k)^2``, tile by tile."""
    kept = [chunk for chunks in gather(matrix, "frobenius_norm") for chunk in chunks]
    side = max(1, int((matrix.budget.working_bytes() // (8 * matrix.dtype.itemsize)) ** 0.5))
    tiles = [tile for chunk in kept for tile in _tiles(chunk, side)]
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for i, (V, N, left, sign) in enumerate(tiles):
        for j in range(i, len(tiles)):
            V2, N2, right, sign2 = tiles[j]
            square = inner_products(left, right).square_()
            if sign is not None:
                square *= sign.view(V, N, 1, 1)
            if sign2 is not None:
                square *= sign2.view(1, 1, V2, N2)
            total = total + square.sum(dtype=torch.float64) * (1 if i == j else 2)
    return (total.clamp(min=0).sqrt() / matrix._denominator).to(matrix.dtype)


def _tiles(chunk: Kept, side: int) -> list[Kept]:
    """A chunk cut along the samples, at most ``side`` columns each (at least those of one sample)."""
    V, N, factors, sign = chunk
    step = max(1, side // V)
    if step >= N:
        return [chunk]
    return [
        (
            V,
            min(step, N - n),
            {name: f.samples(n, n + step) for name, f in factors.items()},
            None if sign is None else sign[:, n : n + step],
        )
        for n in range(0, N, step)
    ]
