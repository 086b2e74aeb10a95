"""Blocks and the dense matrix: ``sum_vn sign J[v,n] J[v,n]^T`` over groups of parameters.

Within a group every pair of parameters takes its cheapest exact form.  Parameters with one position per sample stay
in activation space, a bias together with its weight: their pair is ``sum_n (sum_v g^l g^m^T) (x) a^l a^m^T``, one
product of packed pairs, written straight into its places.  The others are joined into one Jacobian J and contribute
``J^T J``; a mixed pair treats the formed Jacobian as g with a = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..factors import Factor, activation_space_block, mirrored_gram, samples_per_chunk
from ..ops import Places, kronecker_sum
from ..ops.curvature_block import CurvatureBlock, curvature_blocks
from .layers import joined
from .memory import large_matrix

Place = Any  # slice or LongTensor: where a parameter's entries are in its group


@dataclass(slots=True)
class Factored:
    """Parameters of one layer that stay in activation space.

    Attributes:
        names: a weight, or a weight and its bias.
        g: [V, N, 1, O].
        a: [N, I].
        places: of the entries (o, i) in the group, None where they are ``rows`` of a table.
        index: the same as numbers, for what is not written straight into its places.
    """

    names: tuple[str, ...]
    g: Tensor
    a: Tensor
    places: Places | None
    rows: Tensor | None

    def index(self) -> Tensor:
        if self.rows is not None:
            return self.rows
        assert self.places is not None
        return self.places.index(self.g.shape[3], self.a.shape[1], self.g.device)


class Group:
    """The matrix of one group of parameters, summed over column chunks and batches; both triangles at all times."""

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
        self._pending: dict[tuple[int, int], Tensor] = {}  # activation-space blocks [N, O, O2] of one batch
        self._layers: list[Factored] = []
        self._known: set[tuple[str, str]] = set()  # pairs of parameters, first one first, that hold a sum

    def add(self, factors: dict[str, Factor], sign: Tensor | None, elements: int) -> None:
        """One chunk of columns; ``elements`` bounds the Jacobians formed."""
        own = {n: factors[n] for n in self.names if n in factors}
        layers = self._factored(own)
        inside = {n for layer in layers for n in layer.names}
        formed = {n: f for n, f in own.items() if n not in inside}
        for l, left in enumerate(layers):
            for m, right in enumerate(layers[l:], l):
                B = activation_space_block(left.g, right.g.detach(), sign)  # its upper triangle is read where l is m
                known = self._pending.get((l, m))
                self._pending[l, m] = B if known is None else known.add_(B)
        self._layers = layers
        if formed:
            self._add_formed(formed, layers, sign, elements)

    def _factored(self, own: dict[str, Factor]) -> list[Factored]:
        """The layers that stay in activation space."""
        free = {n: f for n, f in own.items() if f.a is None and f.positions == 1}
        found = []
        for name, f in own.items():
            if f.a is None or f.positions != 1:
                continue
            a, start = f.a[:, 0], self.starts[name]
            if f.rows is not None:
                if not f.transposed:
                    entries = f.entries()
                    assert entries is not None
                    found.append(Factored((name,), f.g, a, None, entries + start))
                continue
            bias = next((n for n, b in free.items() if _same(b.g, f.g) and self.sizes[n] == f.outputs), None)
            place = None if bias is None else self.starts[bias]
            a, places = joined(a, start, place, f.transposed, f.g, (f.g.shape[1], f.g.shape[3]))
            names = (name,) if bias is None else (name, bias)
            if bias is not None:
                del free[bias]
            found.append(Factored(names, f.g, a, places, None))
        return found

    def flush(self) -> None:
        """Expand what the columns of one batch have left in activation space."""
        found: list[CurvatureBlock] = []
        for (l, m), B in self._pending.items():
            left, right = self._layers[l], self._layers[m]
            if left.places is None or right.places is None:
                block = kronecker_sum(B, left.a, None if l == m else right.a, symmetric=l == m)
                self._put(left.names, right.names, left.index(), right.index(), block)
                continue
            total, add = self._ready(left.names, right.names)
            a2, columns = (None, None) if l == m else (right.a, right.places)
            found.append(CurvatureBlock(total, B, left.a, a2, None, None, left.places, columns, add))
        curvature_blocks(found)  # a parameter belongs to one layer: no two have a place in common
        self._pending = {}

    def finish(self) -> Tensor:
        if self.total is None:
            return self.like.new_zeros(self.size, self.size)
        self._zero(self._pairs(self.names, self.names) - self._known)
        return self.total

    def _pairs(self, rows: Sequence[str], columns: Sequence[str]) -> set[tuple[str, str]]:
        return {(r, c) if self.starts[r] <= self.starts[c] else (c, r) for r in rows for c in columns}

    def _zero(self, pairs: Iterable[tuple[str, str]]) -> None:
        assert self.total is not None
        for row, column in pairs:
            self.total[self._slice(row), self._slice(column)] = 0
            self.total[self._slice(column), self._slice(row)] = 0

    def _ready(self, rows: Sequence[str], columns: Sequence[str]) -> tuple[Tensor, bool]:
        """The matrix, and whether it holds a sum between these parameters: else what it holds there means nothing."""
        if self.total is None:
            self.total = large_matrix(self.size, self.size, self.like)
        pairs = self._pairs(rows, columns)
        fresh = pairs - self._known
        self._known |= fresh
        if fresh == pairs:
            return self.total, False
        self._zero(fresh)
        return self.total, True

    def _slice(self, name: str) -> slice:
        return slice(self.starts[name], self.starts[name] + self.sizes[name])

    def _add_formed(
        self, formed: dict[str, Factor], layers: list[Factored], sign: Tensor | None, elements: int
    ) -> None:
        V, N = next(iter(formed.values())).g.shape[:2]
        step = samples_per_chunk(V * sum(f.size for f in formed.values()), elements)
        places = {n: self._place(n, f) for n, f in formed.items()}
        for start in range(0, N, step):
            part = {n: f.samples(start, start + step) for n, f in formed.items()}
            signs = None if sign is None else sign[:, start : start + step]
            J = torch.cat([f.jacobian() for f in part.values()], 2) if len(part) > 1 else _only(part).jacobian()
            self._add_square(J, places, [f.size for f in part.values()], signs)
            for layer in layers:
                B = activation_space_block(J[:, :, None], layer.g[:, start : start + step], signs)
                mixed = kronecker_sum(B, B.new_ones(B.shape[0], 1), layer.a[start : start + step])
                for (name, place), piece in zip(places.items(), mixed.split([f.size for f in part.values()])):
                    self._put((name,), layer.names, place, layer.index(), piece)

    def _add_square(self, J: Tensor, places: dict[str, Place], sizes: list[int], sign: Tensor | None) -> None:
        square = mirrored_gram(J.reshape(-1, J.shape[2]), None if sign is None else sign.reshape(-1))
        if list(places) == self.names and self.total is None and square.dtype == self.like.dtype:
            whole = [(place.start, place.stop) for place in places.values() if isinstance(place, slice)]
            if len(whole) == len(places):
                self.total = square
                self._known = self._pairs(self.names, self.names)
                return
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        for i, (l, rows) in enumerate(places.items()):
            for j, (m, columns) in enumerate(list(places.items())[i:], i):
                self._put((l,), (m,), rows, columns, square[bounds[i] : bounds[i + 1], bounds[j] : bounds[j + 1]])

    def _place(self, name: str, factor: Factor) -> Place:
        entries = factor.entries()
        return self._slice(name) if entries is None else entries + self.starts[name]

    def _put(
        self, row_names: Sequence[str], column_names: Sequence[str], rows: Place, columns: Place, values: Tensor
    ) -> None:
        """Add at the given place and, between different parameters, at its mirrored place."""
        total, add = self._ready(row_names, column_names)
        if not add:
            self._zero(self._pairs(row_names, column_names))
        sides = [(rows, columns, values)]
        if tuple(row_names) != tuple(column_names):
            sides.append((columns, rows, values.T))
        for r, c, block in sides:
            if isinstance(r, slice) and isinstance(c, slice):
                total[r, c] += block
            else:
                total[_index(r, block.device)[:, None], _index(c, block.device)] += block


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether the two are one piece of memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


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
