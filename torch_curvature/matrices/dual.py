"""The dual: inner products of the columns, ``J J^T``, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..factors import Factor
from ..grams import inner_products, total_gram
from .memory import large_matrix

Kept = tuple[int, int, dict[str, Factor], "Tensor | None"]  # V, N, factors, sign


def gather(matrix: Any, what: str) -> list[Kept]:
    """The factors of all the data: for each batch all of its columns together.

    Pairs of chunks of columns would form the Jacobians of each chunk again for every other.
    """
    kept = []
    for batch in matrix._sweep(what):
        chunks = [(dict(pieces), sign) for pieces, sign in batch.pieces()]
        if not chunks:
            continue
        signs = [sign for _, sign in chunks]
        names = list(chunks[0][0])
        factors = {name: _together([found.pop(name) for found, _ in chunks]) for name in names}
        V, N = _extent(factors)
        kept.append((V, N, factors, None if any(sign is None for sign in signs) else torch.cat(signs)))
    return kept


def _together(parts: list[Factor]) -> Factor:
    """Factors of one parameter joined along the columns, in the memory order that they have."""
    if len(parts) == 1:
        return parts[0]
    gs = [part.g for part in parts]
    along = gs[0].mT.is_contiguous()  # positions next to one another, as convolutions have them
    shaped = [g.mT for g in gs] if along else gs
    total = large_matrix(sum(len(g) for g in gs), shaped[0][0].numel(), gs[0]).view(-1, *shaped[0].shape[1:])
    torch.cat(shaped, out=total)
    return replace(parts[0], g=total.mT if along else total)


def _extent(factors: dict[str, Factor]) -> tuple[int, int]:
    factor = next(iter(factors.values()))
    return factor.g.shape[0], factor.g.shape[1]


def gram_of(matrix: Any, what: str = "gram") -> Tensor:
    """[N V, N V], rows (n, v): samples in the order of the data, columns of a sample together."""
    by_batch = gather(matrix, what)
    if any(sign is not None for *_, sign in by_batch):
        raise ValueError(
            f"{matrix.title}.gram(): the loss is not convex in the outputs, so that this matrix is no sum of squares "
            "and has no Gram matrix; use dense(), blocks() or products with @"
        )
    sizes = [V * N for V, N, *_ in by_batch]
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
            if len(by_batch) == 1:
                return part.div_(matrix._denominator) if matrix._denominator != 1.0 else part
            out[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = part
            if i != j:
                out[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = part.T
    return out.div_(matrix._denominator) if matrix._denominator != 1.0 else out


def between(left: Kept, right: Kept) -> Tensor:
    """[N V, N2 V2] of two batches, symmetric to the bit for one with itself."""
    if left is right:
        return total_gram(left[2])
    full = inner_products(left[2], right[2])
    V, N, V2, N2 = full.shape
    return full.permute(1, 0, 3, 2).reshape(N * V, N2 * V2)


def frobenius_from_gram(matrix: Any) -> Tensor:
    """``|sum_i sign_i j_i j_i^T|_F^2 = sum_ik sign_i sign_k (j_i . j_k)^2``, tile by tile."""
    side = max(1, int((matrix.budget.working_bytes() // (8 * matrix.dtype.itemsize)) ** 0.5))
    tiles = [tile for kept in gather(matrix, "frobenius_norm") for tile in _tiles(kept, side)]
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
