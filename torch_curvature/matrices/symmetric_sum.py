"""A symmetric matrix over some parameters, given block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..factors import mirror_upper
from ..ops.curvature_block import CurvatureBlock
from ..second_order import Node
from .expansion import Cross
from .layers import Layer
from .memory import large_matrix


class SymmetricSum:
    """A symmetric matrix over some parameters, given block by block, each pair in one order or the other."""

    def __init__(
        self, names: Sequence[str], parameters: dict[str, nn.Parameter], like: Tensor, measured: bool = False
    ) -> None:
        self.measured = measured  # keep the sum of the norms of the blocks between uses
        self.magnitude: Tensor | float = 0.0
        self.names = list(names)
        self.shapes = {n: parameters[n].shape for n in names}
        self.place: dict[str, slice] = {}
        start = 0
        for name in names:
            self.place[name] = slice(start, start + parameters[name].numel())
            start += parameters[name].numel()
        self.size = start
        self.like = like
        self.total: Tensor | None = None
        self._known: set[tuple[str, str]] = set()
        self._symmetric: set[str] = set()  # blocks on the diagonal that are symmetric to the bit
        self._mirrored: set[tuple[str, str]] = set()  # blocks off it that are in both their places
        self._scratch: Tensor | None = None

    @property
    def started(self) -> bool:
        return bool(self._known)

    def clear(self) -> None:
        self._known.clear()
        self._symmetric.clear()
        self._mirrored.clear()

    def scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Memory that is used again for every block; None where a block becomes the matrix itself."""
        if len(self.names) == 1:
            return None
        if self._scratch is None or self._scratch.numel() < rows * columns or self._scratch.dtype != dtype:
            self._scratch = self.like.new_empty(rows * columns, dtype=dtype)
        return self._scratch[: rows * columns].view(rows, columns)

    def norm(self) -> Tensor:
        """The Frobenius norm so far, up to a factor of two."""
        parts = [self.total[self.place[r], self.place[c]].norm() for r, c in self._known if self.total is not None]
        return torch.stack(parts).norm() if parts else self.like.new_zeros(())

    def add_uses(self, later: Node, earlier: Node, block: Tensor) -> None:
        """Block between two uses, entries (o, i) of either."""
        if self.measured:
            self.magnitude = self.magnitude + block.norm()
        block = self._stored(self._stored(block, later, 0), earlier, 1)
        if later is not earlier and later.name == earlier.name:
            block = block + block.T
        self.add(later.name, earlier.name, block, symmetric=True)

    def between_layers(
        self, later: Layer, earlier: Layer, M: Tensor | None, cross: Cross | None
    ) -> CurvatureBlock | None:
        """The block between all parameters of two layers (or of one with itself), for both its places at once.

        It counts as added; the caller adds it, before anything is read or added to the same places. None: it is zero.

        Args:
            M: [N, O, O2], second derivatives by both outputs.
            cross: g [N, O] of the later layer, D [N, I, O2] or its diagonal [N, O2].
        """
        if M is None and cross is None:
            return None
        if M is None and cross is not None:
            M = cross[1].new_zeros(()).expand(*cross[0].shape, cross[1].shape[-1])
        assert M is not None
        if self.total is None:
            self.total = large_matrix(self.size, self.size, self.like)
        pairs = [self._ordered(row, column) for row in later.names for column in earlier.names]
        known = self._known.intersection(pairs)
        for row, column in set(pairs).difference(known):
            if known:
                self.total[self.place[row], self.place[column]] = 0
                self.total[self.place[column], self.place[row]] = 0
            if row == column:
                self._symmetric.add(row)
            self._mirrored.add((row, column))
        self._known.update(pairs)
        if later is earlier:
            return CurvatureBlock(self.total, M, later.a, None, None, None, later.places, None, bool(known))
        g, d = (None, None) if cross is None else cross
        places = later.places, earlier.places
        return CurvatureBlock(self.total, M, later.a, earlier.a, g, d, *places, bool(known))

    def _ordered(self, row: str, column: str) -> tuple[str, str]:
        return (row, column) if self.place[row].start <= self.place[column].start else (column, row)

    def _stored(self, block: Tensor, node: Node, dim: int) -> Tensor:
        """Entries (o, i) in the order and number of the parameter's own."""
        if node.a is not None and node.transposed:
            I = node.a.shape[2]
            split = block.view(-1, I, block.shape[1]) if dim == 0 else block.view(block.shape[0], -1, I)
            block = split.transpose(dim, dim + 1).reshape(block.shape)
        if node.rows is None:
            return block
        O = block.shape[dim] // node.rows.numel()
        entries = (node.rows[:, None] * O + torch.arange(O, device=block.device)).reshape(-1)
        shape = list(block.shape)
        shape[dim] = self.shapes[node.name].numel()
        return block.new_zeros(shape).index_copy_(dim, entries, block)

    def add(self, row: str, column: str, block: Tensor, symmetric: bool = False) -> None:
        """Block between two parameters; between a parameter and itself only the upper triangle counts.

        Args:
            symmetric: a block between a parameter and itself is symmetric to the bit.
        """
        if row == column and symmetric and ((row, row) not in self._known or row in self._symmetric):
            self._symmetric.add(row)
        elif row == column:
            self._symmetric.discard(row)
        if self._ordered(row, column) != (row, column):
            row, column, block = column, row, block.T
        self._mirrored.discard((row, column))
        if self.total is None:
            if row == column and len(self.names) == 1 and block.dtype == self.like.dtype and block.is_contiguous():
                self.total = block
                self._known.add((row, column))
                return
            self.total = large_matrix(self.size, self.size, self.like)
        target = self.total[self.place[row], self.place[column]]
        if (row, column) in self._known:
            target += block
        else:
            target.copy_(block)
            self._known.add((row, column))

    def product(self, vector: Tensor) -> Tensor:
        """The matrix so far times a vector."""
        result = torch.zeros_like(vector)
        if self.total is None:
            return result
        for row, column in self._known:
            r, c = self.place[row], self.place[column]
            block = self.total[r, c]
            if row == column and row not in self._symmetric:
                block = mirror_upper(block)
            elif row != column:
                result[c] += block.T @ vector[r]
            result[r] += block @ vector[c]
        return result

    def finish(self) -> Tensor:
        """The whole matrix, symmetric to the bit."""
        if self.total is None:
            return self.like.new_zeros(self.size, self.size)
        for i, row in enumerate(self.names):
            r = self.place[row]
            for column in self.names[i:]:
                c = self.place[column]
                if (row, column) not in self._known:
                    self.total[r, c] = 0
                    self.total[c, r] = 0
                elif row == column and row not in self._symmetric:
                    self.total[r, r] = mirror_upper(self.total[r, r])
                elif row != column and (row, column) not in self._mirrored:
                    transpose_into(self.total[c, r], self.total[r, c])
        self._scratch = None
        return self.total


def transpose_into(target: Tensor, source: Tensor, tile: int = 512) -> None:
    """``target[...] = source.T``, in tiles that stay in cache."""
    for i in range(0, source.shape[0], tile):
        for j in range(0, source.shape[1], tile):
            target[j : j + tile, i : i + tile] = source[i : i + tile, j : j + tile].T
