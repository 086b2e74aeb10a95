"""Blocks and the dense matrix: ``sum_vn sign J[v,n] J[v,n]^T`` over groups of parameters.

Within a group every pair of parameters takes its cheapest exact form.  Parameters with one position per sample stay
in activation space: their pair is ``sum_n (sum_v g^l g^m^T) (x) a^l a^m^T``, one product of packed pairs.  The others
are joined into one Jacobian J and contribute ``J^T J``; a mixed pair treats the formed Jacobian as g with a = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..factors import (
    Factor,
    activation_space_block,
    mirrored_gram,
    samples_per_chunk,
)
from ..ops import kronecker_sum
from .memory import large_matrix

Place = Any  # slice or LongTensor: where a parameter's entries are in its group


class Group:
    """The matrix of one group of parameters, summed over column chunks and batches."""

    def __init__(self, names: list[str], sizes: dict[str, int], like: Tensor) -> None:
        self.names = names
        self.sizes = sizes
        self.like = like
        self.total: Tensor | None = None
        self.starts: dict[str, int] = {}
        self.size = 0
        for name in names:
            self.starts[name] = self.size
            self.size += sizes[name]
        self._pending: dict[tuple[str, str], Tensor] = {}  # activation-space blocks [N, O, O2] of one batch
        self._factors: dict[str, Factor] = {}

    def add(self, factors: dict[str, Factor], sign: Tensor | None, elements: int) -> None:
        """One chunk of columns; ``elements`` bounds the Jacobians formed."""
        own = {n: factors[n] for n in self.names if n in factors}
        outer = {n: f for n, f in own.items() if _stays_factored(f)}
        formed = {n: f for n, f in own.items() if n not in outer}
        for i, l in enumerate(outer):
            for m in list(outer)[i:]:
                B = activation_space_block(outer[l].g, outer[m].g, sign)
                known = self._pending.get((l, m))
                self._pending[l, m] = B if known is None else known.add_(B)
        self._factors = outer
        if formed:
            self._add_formed(formed, outer, sign, elements)

    def flush(self) -> None:
        """Expand what the columns of one batch have left in activation space."""
        for (l, m), B in self._pending.items():
            left, right = self._factors[l], self._factors[m]
            assert left.a is not None
            assert right.a is not None
            if l == m:
                expanded = kronecker_sum(B, left.a[:, 0], symmetric=True)
            else:
                expanded = kronecker_sum(B, left.a[:, 0], right.a[:, 0])
            self._put(self._place(l, left), self._place(m, right), expanded)
        self._pending = {}

    def finish(self) -> Tensor:
        if self.total is None:
            return self.like.new_zeros(self.size, self.size)
        self._mirror()
        return self.total

    def _mirror(self, tile: int = 256) -> None:
        """Copy the blocks above the diagonal to below it; those on it are symmetric already."""
        assert self.total is not None
        for i, l in enumerate(self.names):
            end = self.starts[l] + self.sizes[l]
            for m in self.names[i + 1 :]:
                columns = slice(self.starts[m], self.starts[m] + self.sizes[m])
                for start in range(self.starts[l], end, tile):  # as many rows as stay in cache
                    rows = slice(start, min(start + tile, end))
                    self.total[columns, rows] = self.total[rows, columns].T

    def _add_formed(
        self, formed: dict[str, Factor], outer: dict[str, Factor], sign: Tensor | None, elements: int
    ) -> None:
        V, N = next(iter(formed.values())).g.shape[:2]
        step = samples_per_chunk(V * sum(f.size for f in formed.values()), elements)
        places = {n: self._place(n, f) for n, f in formed.items()}
        for start in range(0, N, step):
            part = {n: f.samples(start, start + step) for n, f in formed.items()}
            signs = None if sign is None else sign[:, start : start + step]
            J = torch.cat([f.jacobian() for f in part.values()], 2) if len(part) > 1 else _only(part).jacobian()
            self._add_square(J, list(places.values()), [f.size for f in part.values()], signs)
            for m, f in outer.items():
                factor = f.samples(start, start + step)
                assert factor.a is not None
                B = activation_space_block(J[:, :, None], factor.g, signs)
                mixed = kronecker_sum(B, B.new_ones(B.shape[0], 1), factor.a[:, 0])
                pieces = mixed.split([f.size for f in part.values()])
                for (name, place), piece in zip(places.items(), pieces):
                    if self.starts[name] < self.starts[m]:
                        self._put(place, self._place(m, factor), piece)
                    else:
                        self._put(self._place(m, factor), place, piece.T)

    def _add_square(self, J: Tensor, places: list[Place], sizes: list[int], sign: Tensor | None) -> None:
        square = mirrored_gram(J.reshape(-1, J.shape[2]), None if sign is None else sign.reshape(-1))
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        for i, rows in enumerate(places):
            for j in range(i, len(places)):
                self._put(rows, places[j], square[bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]])

    def _place(self, name: str, factor: Factor) -> Place:
        start = self.starts[name]
        entries = factor.entries()
        return slice(start, start + self.sizes[name]) if entries is None else entries + start

    def _put(self, rows: Place, columns: Place, values: Tensor) -> None:
        """Add at the given place; the lower triangle between parameters is mirrored at the end."""
        if self.total is None:
            if values.shape == (self.size, self.size) and isinstance(rows, slice) and values.dtype == self.like.dtype:
                self.total = values
                return
            self.total = large_matrix(self.size, self.size, self.like).zero_()
        if isinstance(rows, slice) and isinstance(columns, slice):
            self.total[rows, columns] += values
        else:
            row_index = _index(rows, values.device)[:, None]
            self.total[row_index, _index(columns, values.device)] += values


def _stays_factored(factor: Factor) -> bool:
    return factor.positions == 1 and factor.a is not None and not factor.transposed


def _only(part: dict[str, Factor]) -> Factor:
    (factor,) = part.values()
    return factor


def _index(place: slice | Tensor, device: torch.device) -> Tensor:
    if isinstance(place, slice):
        return torch.arange(place.start, place.stop, device=device)
    return place


def group_matrices(matrix: Any, groups: dict[str, list[str]], what: str) -> dict[str, Tensor]:
    """{group: [p, p]} of a matrix that is a sum of outer products of columns."""
    entries = sum(matrix._size(names) ** 2 for names in groups.values())
    largest = max(groups, key=lambda g: matrix._size(groups[g]))
    side = matrix._size(groups[largest])
    matrix.budget.require(
        entries,
        matrix.dtype.itemsize,
        f"{matrix.title}.{what}(): {len(groups)} block(s), the largest {side} x {side}"
        + (f" ({largest!r})," if len(groups) > 1 else ","),
        "use diagonal(), kronecker(), gram() or products with @, freeze parameters, or raise memory_budget (GiB)",
    )
    sizes = {name: p.numel() for name, p in matrix.parameters.items()}
    like = matrix.zeros(0)
    sums = {key: Group(names, sizes, like) for key, names in groups.items()}
    elements = max(1, matrix.budget.working_bytes() // (4 * matrix.dtype.itemsize))
    for batch in matrix._sweep(what):
        for factors, sign in batch.chunks():
            for group in sums.values():
                group.add(factors, sign, elements)
        for group in sums.values():
            group.flush()
    results = {key: group.finish() for key, group in sums.items()}
    return normalised(results, matrix._denominator)


def normalised(results: dict[str, Tensor], denominator: float) -> dict[str, Tensor]:
    if denominator != 1.0:
        for tensor in _distinct(results.values()):
            tensor.div_(denominator)
    return results


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())
