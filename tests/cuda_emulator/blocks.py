"""The blocks that curvature_block writes into a symmetric matrix, and their checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .checks import DTYPES, FORMATS, Check, bounded, poisoned, randn, storage
from .emulation import Case
from .jacobians import mirrored


@dataclass(frozen=True)
class Places:
    """Entry (o, i) of a layer's weight stands at start + o per_output + i per_input; where `last` is not negative, that
    of the last input at last + o."""

    start: int
    per_output: int
    per_input: int
    last: int = -1

    def index(self, O: int, I: int) -> torch.Tensor:  # [O, I]
        o, i = torch.arange(O)[:, None], torch.arange(I)[None, :]
        at = self.start + o * self.per_output + i * self.per_input
        return at if self.last < 0 else torch.where(i == I - 1, self.last + o, at)

    @property
    def integers(self) -> list[int]:
        return [self.start, self.per_output, self.per_input, self.last]


def weight_and_bias(start: int, O: int, I: int) -> Places:
    """As torch lays a weight [O, I - 1] and a bias [O] one after the other."""
    return Places(start, I - 1, 1, start + O * (I - 1))


@dataclass
class Block:
    m: torch.Tensor  # [N, O, O2]
    a: torch.Tensor  # [N, I]
    rows: Places
    a2: torch.Tensor | None = None  # [N, I2]; none: one layer, m[n] symmetric by its upper triangle
    g: torch.Tensor | None = None  # [N, O]
    d: torch.Tensor | None = None  # [N, D, O2]
    columns: Places | None = None


def block_values(b: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, I, O2, I2]: the block, and the sums of the squares of its terms."""
    right = b.a if b.a2 is None else b.a2
    m, a, a2 = b.m.double(), b.a.double(), right.double()
    if b.a2 is None:
        m = m.triu() + m.triu(1).mT
    terms = torch.einsum("nop,ni->noip", m, a)
    squares = terms.square()
    if b.g is not None and b.d is not None:
        second = torch.einsum("no,nip->noip", b.g.double(), b.d.double())
        terms[:, :, : b.d.shape[1]] += second
        squares[:, :, : b.d.shape[1]] += second.square()
    return torch.einsum("noip,nj->oipj", terms, a2), torch.einsum("noip,nj->oipj", squares, a2.square())


def block_check(b: Block, P: int, add: bool, generator: torch.Generator, pad: int = 0) -> Check:
    """`pad`: rows of the matrix are that much longer in memory."""
    (N, O, O2), I, dtype = b.m.shape, b.a.shape[1], b.m.dtype
    I2 = I if b.a2 is None else b.a2.shape[1]
    values, squares = block_values(b)
    rows = b.rows.index(O, I).flatten()
    columns = rows if b.columns is None else b.columns.index(O2, I2).flatten()
    start = randn(generator, P, P, dtype=dtype)
    start = start.triu() + start.triu(1).mT
    want, scale, written = start.double().clone(), torch.zeros(P, P), torch.zeros(P, P, dtype=torch.bool)
    for left, right, flip in ((rows, columns, False), (columns, rows, True)):
        at = left[:, None], right[None, :]
        block, square = (x.reshape(len(rows), len(columns)) for x in (values, squares))
        block, square = (block.T, square.T) if flip else (block, square)
        want[at] = block + (start.double()[at] if add else 0)
        scale[at] = (square.sqrt() + (start.double()[at].abs() if add else 0)).float()
        written[at] = True
    if not add:
        start = torch.where(written, torch.tensor(float("nan"), dtype=dtype), start)
    matrix = torch.zeros(P, P + pad, dtype=dtype)[:, :P].copy_(start)
    absent = poisoned(1, dtype)
    given = (b.m, b.a, b.a2, b.g, b.d)
    strides = [s for x, rank in zip(given, (3, 2, 2, 2, 3)) for s in (x.stride() if x is not None else [0] * rank)]
    integers = [N, O, O2, I, I2, 0 if b.d is None else b.d.shape[1], int(b.a2 is None), int(b.g is not None), int(add)]
    integers += [matrix.stride(0), *strides, *b.rows.integers, *(b.columns or b.rows).integers]
    buffers = [*(absent if x is None else storage(x) for x in given), storage(matrix)]
    if not pad:
        return bounded(
            Case("curvature_block", FORMATS[dtype], integers, buffers), 5, want, scale, N, True, mirrored(want)
        )
    index = torch.arange(P)[:, None] * matrix.stride(0) + torch.arange(P)[None, :]
    wide_want, wide_scale = torch.zeros(len(buffers[5]), dtype=torch.float64), torch.zeros(len(buffers[5]))
    wide_want[index], wide_scale[index] = want, scale
    return bounded(Case("curvature_block", FORMATS[dtype], integers, buffers), 5, wide_want, wide_scale, N, True)


# N, O, I, O2, I2, D
CROSS = [
    (1, 1, 1, 1, 1, 1),
    (7, 3, 5, 4, 6, 4),
    (40, 9, 8, 5, 9, 8),
    (3, 2, 70, 3, 67, 69),
    (0, 2, 3, 2, 3, 2),
    (4, 3, 5, 2, 4, 0),
    (300, 2, 3, 2, 2, 3),
]


def curvature_block(g: torch.Generator, quick: bool) -> Iterator[Check]:
    for dtype in DTYPES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return randn(g, *shape, dtype=dtype)

        for number, (N, O, I, O2, I2, D) in enumerate(CROSS if quick else [*CROSS, (20, 11, 13, 7, 130, 12)]):
            P, second = O * I + O2 * I2 + 5, O * I + 3
            rows, columns = Places(2, I, 1), weight_and_bias(second, O2, I2)
            block = Block(draw(N, O, O2), draw(N, I), rows, draw(N, I2), draw(N, O), draw(N, D, O2), columns)
            yield block_check(block, P, number % 2 == 0, g)
            if number % 3 == 1:  # without the second term, from strided operands; places the other way round
                m, a, a2 = draw(O, N, O2).transpose(0, 1), draw(I, N).T, draw(I2, N).T
                block = Block(m, a, Places(O2 * I2 + 1, 1, O), a2, columns=weight_and_bias(0, O2, I2))
                yield block_check(block, P, number % 2 == 1, g, pad=3)
        for number, (N, O, I) in enumerate([(1, 1, 1), (9, 5, 7), (30, 4, 18), (0, 2, 3), (600, 3, 2)]):
            block = Block(draw(N, O, O), draw(N, I), weight_and_bias(1, O, I))
            yield block_check(block, O * I + 2, number % 2 == 0, g, pad=number % 2)
