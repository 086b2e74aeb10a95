"""From second derivatives in activation space to blocks between parameters.

For two uses ``z_l = W_l a_l`` and, later, ``z_m = W_m a_m``, with ``M = d2 L / dz_m dz_l``, ``g = dL/dz_m`` and
``D = d a_m / d z_l`` (zero where l is not before m),

    H[(p, j), (o, i)] = sum_n  M[n][p, o] a_m[n, j] a_l[n, i]  +  g[n, p] D[n][j, o] a_l[n, i]

and sums over the positions s, t of a sample where there are several.  The first term because z is linear in W, the
second because a change of ``W_l`` changes what ``W_m`` is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..factors import CACHE_ELEMENTS, mirror_upper, samples_per_chunk
from ..ops import kronecker_sum
from ..second_order import Node
from .memory import large_matrix

Cross = tuple[Tensor, Tensor]  # g [N, S, O] of the later use, D [N, (t, j), (s, o)]
Scratch = Callable[[int, int, torch.dtype], "Tensor | None"]


def _fresh(rows: int, columns: int, dtype: torch.dtype) -> None:
    return None


def pair_block(
    later: Node, earlier: Node, M: Tensor | None, cross: Cross | None, scratch: Scratch = _fresh
) -> Tensor | None:
    """Block [O_m I_m, O_l I_l] between two uses, rows of the later one; None where it vanishes identically.

    Args:
        M: [N, (t, p), (s, o)], second derivatives that have gone through both rules.
        scratch: gives memory [rows, columns] for the result; None for fresh memory.
    """
    if M is None and cross is None:
        return None
    if later is earlier and M is not None and later.a is not None and later.a.shape[1] == 1:
        side = M.shape[1] * later.a.shape[2]
        return kronecker_sum(M, later.a[:, 0], symmetric=True, out=scratch(side, side, M.dtype))
    positions = [1 if node.a is None else node.a.shape[1] for node in (later, earlier)]
    if positions == [1, 1]:
        block = None if M is None else _one_position(later.a, earlier.a, M, scratch)
        if cross is not None:
            block = _add_cross(block, later, earlier.a, *cross)
    else:
        block = _many_positions(later, earlier, positions, M, cross)
    return mirror_upper(block) if later is earlier and block is not None else block


def _one_position(a: Tensor | None, a2: Tensor | None, M: Tensor, scratch: Scratch) -> Tensor:
    N, O, O2 = M.shape
    if a is not None and a2 is not None:
        out = scratch(O * a.shape[2], O2 * a2.shape[2], M.dtype)
        return kronecker_sum(M, a[:, 0], a2[:, 0], out=out)
    if a2 is not None:
        return (M.reshape(N, -1).T @ a2[:, 0]).view(O, -1)
    if a is not None:
        return (M.mT.reshape(N, -1).T @ a[:, 0]).view(O2, O, -1).permute(1, 2, 0).reshape(-1, O2)
    return M.sum(0)


def _add_cross(block: Tensor | None, later: Node, a2: Tensor | None, g: Tensor, D: Tensor) -> Tensor:
    """``block += sum_n g[n, p] D[n][j, o] a2[n, i]``; pairs (j, o) that no sample connects cost nothing."""
    assert later.a is not None
    N, O, J, O2 = g.shape[0], g.shape[2], later.a.shape[2], D.shape[2]
    left = g[:, 0] if a2 is None else (g[:, 0, :, None] * a2[:, 0, None, :]).reshape(N, -1)
    I2 = 1 if a2 is None else a2.shape[2]
    if block is None:
        block = g.new_zeros(O * J, O2 * I2)
    target = block.view(O, J, O2, I2)
    connected = D.abs().amax(0).ne(0)  # also where some entry is no number
    j, o = connected.nonzero(as_tuple=True)
    if 4 * len(j) > 3 * J * O2:
        target += (left.T @ D.reshape(N, -1)).view(O, I2, J, O2).permute(0, 2, 3, 1)
    elif len(j):
        target[:, j, o] += (left.T @ D[:, j, o]).view(O, I2, -1).transpose(1, 2)
    return block


def _many_positions(
    later: Node, earlier: Node, positions: Sequence[int], M: Tensor | None, cross: Cross | None
) -> Tensor:
    T, S = positions
    some = M if M is not None else cross[1] if cross is not None else None
    assert some is not None
    N, K2 = some.shape[0], some.shape[2]
    O2 = K2 // S
    I, I2 = (1 if node.a is None else node.a.shape[2] for node in (later, earlier))
    O = M.shape[1] // T if M is not None else cross[0].shape[2] if cross is not None else 0
    total = some.new_zeros(O * I * O2, I2)
    step = samples_per_chunk(O * I * K2, 4 * CACHE_ELEMENTS)
    for start in range(0, N, step):
        chunk = slice(start, min(N, start + step))
        n = chunk.stop - start
        spread: Tensor | None = None  # [n, p, j, (s, o)]
        if M is not None:
            Mn = M[chunk].reshape(n, T, O * K2)
            if later.a is None:
                spread = Mn.view(n, O, 1, K2)
            else:
                spread = torch.matmul(later.a[chunk].mT.to(Mn.dtype), Mn).view(n, I, O, K2).transpose(1, 2)
        if cross is not None:
            g, D = cross
            part = torch.matmul(g[chunk].mT, D[chunk].reshape(n, T, I * K2)).view(n, O, I, K2)
            spread = part if spread is None else spread + part
        assert spread is not None
        columns = spread.reshape(n, O * I, S, O2).permute(1, 3, 0, 2).reshape(O * I * O2, n * S)
        if earlier.a is None:
            total += columns.sum(1, keepdim=True)
        else:
            total += columns @ earlier.a[chunk].reshape(n * S, I2).to(columns.dtype)
    return total.view(O * I, O2 * I2)


def pair_diagonal(node: Node, M: Tensor) -> Tensor:
    """Diagonal [O, I] of a use's block with itself: ``sum_n sum_st a[n,s,i] M[n][(s,o),(t,o)] a[n,t,i]``."""
    S = 1 if node.a is None else node.a.shape[1]
    N, O = M.shape[0], M.shape[1] // S
    own = M.view(N, S, O, S, O).diagonal(dim1=2, dim2=4)  # [N, S, S, O]
    if node.a is None:
        return own.reshape(N, O).sum(0).unsqueeze(1)
    if S == 1:
        return own.reshape(N, O).T @ node.a[:, 0].square()
    I = node.a.shape[2]
    total = M.new_zeros(O, I)
    step = samples_per_chunk(S * O * I, 4 * CACHE_ELEMENTS)
    for start in range(0, N, step):
        a = node.a[start : start + step]
        n = a.shape[0]
        moved = torch.matmul(own[start : start + step].permute(0, 1, 3, 2).reshape(n, S * O, S), a)
        total += (moved.view(n, S, O, I) * a.unsqueeze(2)).sum((0, 1))
    return total


class SymmetricSum:
    """A symmetric matrix over some parameters, given block by block, each pair in one order or the other."""

    def __init__(
        self, names: Sequence[str], parameters: dict[str, nn.Parameter], like: Tensor, measured: bool = False
    ) -> None:
        self.measured = measured  # keep the sum of the norms of the blocks between uses
        self.magnitude = like.new_zeros(())
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
        self._scratch: Tensor | None = None

    @property
    def started(self) -> bool:
        return bool(self._known)

    def clear(self) -> None:
        self._known.clear()
        self._symmetric.clear()

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
        if self.place[row].start > self.place[column].start:
            row, column, block = column, row, block.T
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
                elif row != column:
                    transpose_into(self.total[c, r], self.total[r, c])
        self._scratch = None
        return self.total


def transpose_into(target: Tensor, source: Tensor, tile: int = 512) -> None:
    """``target[...] = source.T``, in tiles that stay in cache."""
    for i in range(0, source.shape[0], tile):
        for j in range(0, source.shape[1], tile):
            target[j : j + tile, i : i + tile] = source[i : i + tile, j : j + tile].T
