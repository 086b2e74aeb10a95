"""Norms of sums over many positions: products that are added to chunk by chunk, in place or packed, and large ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_curvature as tc

# V, N, S, O, I: in place; a last panel that is narrow, bands of 9 and 11 rows; wide enough to be made panel by panel.
SIZES = [
    (1, 2, 300, 64, 64),
    (2, 1, 517, 70, 32),
    (1, 2, 530, 9, 37),
    (2, 2, 300, 11, 45),
    (1, 1, 1030, 100, 5),
    (2, 1, 300, 14, 13),
    (1, 1, 400, 13, 40),
    (1, 2, 270, 6, 2),
    (1, 1, 600, 150, 170),
    (2, 1, 520, 300, 129),
]


def strided(t: Tensor, way: int) -> Tensor:
    """Rows one after the other, with gaps, positions one after the other, every second number."""
    if way == 1:
        return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]
    if way == 2:
        return t.mT.contiguous().mT
    return t if way == 0 else torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ways", [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norms(size: tuple[int, ...], ways: tuple[int, int], dtype: torch.dtype) -> None:
    V, N, S, O, I = size
    g = (torch.randn(V, N, S, O, dtype=torch.float64) * (S * O * I) ** -0.5).to(dtype)
    a = torch.randn(N, S, I, dtype=torch.float64).to(dtype)
    J = torch.einsum("vnso,nsi->vnoi", g.double(), a.double())
    terms = torch.einsum("vnso,nsi->vnoi", g.double().abs(), a.double().abs())
    want, bound = J.square().sum((2, 3)), (2 * terms * J.abs()).sum((2, 3))
    got = tc.ops.jacobian_norms(strided(g, ways[0]), strided(a, ways[1]))
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    error = (got.double() - want).abs()
    assert got.dtype == dtype
    assert bool((error <= torch.finfo(dtype).eps * want + 4 * accumulation * (bound + want)).all())
