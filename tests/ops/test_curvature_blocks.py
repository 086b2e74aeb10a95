"""curvature_blocks: several blocks of symmetric matrices in one go."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.test_curvature_block import inputs, strided, symmetric
from torch_curvature.ops import Places, curvature_block
from torch_curvature.ops.curvature_block import CurvatureBlock, curvature_blocks


def chain_of_blocks(N: int, widths: list[int], dtype: torch.dtype, add: bool) -> list[CurvatureBlock]:
    """Every pair of the layers of a perceptron and the biases by themselves, each block in places of its own."""
    starts, P = [], 0
    for I, O in itertools.pairwise(widths):
        starts.append(P)
        P += (I + 1) * O
    out, alone = symmetric(P, dtype), symmetric(max(widths), dtype)
    places = [Places(s, I, 1, s + I * O) for s, I, O in zip(starts, widths, widths[1:])]
    a = [torch.randn(N, I + 1, dtype=torch.float64).to(dtype) for I in widths[:-1]]
    blocks = []
    for k in range(len(a)):
        for j in range(k + 1):
            m, _, _, g, d = inputs((N, widths[k + 1], 1, widths[j + 1], 1, widths[k]), dtype)
            m = strided(m, (k + j) % 4)
            if k == j:
                blocks.append(CurvatureBlock(out, m, a[k], None, None, None, places[k], None, add))
            else:
                blocks.append(CurvatureBlock(out, m, a[k], a[j], g, d, places[k], places[j], add))
    one, m = torch.ones(N, 1, dtype=dtype), inputs((N, max(widths), 1, max(widths), 1, 1), dtype)[0]
    blocks += [CurvatureBlock(alone, strided(m, 3), one, None, None, None, Places(0, 1, 1), None, add)]
    return blocks


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "widths"), [(256, [16, 32, 32, 10]), (70, [3, 41, 1, 5]), (1, [2, 2]), (0, [2, 3, 2])])
def test_together_as_one_by_one(N: int, widths: list[int], dtype: torch.dtype, add: bool) -> None:
    """To the bit."""
    blocks = chain_of_blocks(N, widths, dtype, add)
    want = {id(b.out): b.out.clone() for b in blocks}
    for out, m, a, a2, g, d, rows, columns, _ in blocks:
        curvature_block(want[id(out)], m, a, a2, g=g, d=d, rows=rows, columns=columns, add=add)
    curvature_blocks(blocks)
    for b in blocks:
        assert torch.equal(b.out, want[id(b.out)])


def test_together_where_they_are_too_large_to_be_packed_at_once() -> None:
    N, O, I, I2 = 100_000, 1, 2, 16
    blocks, columns = [], Places(0, I2, 1)
    for k in range(24):  # 6.4 MB each
        m, a, a2, _, _ = inputs((N, O, I, 1, I2, 0), torch.float32)
        out = torch.zeros(20, 20)
        blocks.append(CurvatureBlock(out, m, a, a2, None, None, Places(16 + k % 3, I, 1), columns, False))
    curvature_blocks(blocks)
    for b in blocks:
        want = (b.m[:, 0].double() * b.a.double()).T @ b.a2.double()
        got = b.out[b.rows.start : b.rows.start + 2, :16].double()
        assert bool(((got - want).abs() <= 1e-6 * (b.m[:, 0] * b.a).double().abs().T @ b.a2.double().abs()).all())


def test_nothing_to_add_together() -> None:
    curvature_blocks([])


def test_a_block_that_does_not_fit_is_refused_among_others() -> None:
    good, bad = chain_of_blocks(4, [2, 3], torch.float64, False)
    with pytest.raises(RuntimeError, match=r"'rows' = \[40"):
        curvature_blocks([good, bad._replace(rows=Places(40, 1, 1))])


def test_what_is_differentiated_is_refused() -> None:
    blocks = chain_of_blocks(4, [2, 3], torch.float64, False)
    blocks[0].a.requires_grad_()
    with pytest.raises(RuntimeError, match="curvature_block: 'out' cannot be combined with differentiation"):
        curvature_blocks(blocks)
