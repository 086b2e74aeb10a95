"""Helpers that meet images with derivatives as a convolution does, beside the patches unfolded by torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_curvature import patches as module
from torch_curvature.patches import Patches

# kernel, stride, padding, dilation, image
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (6, 7)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (9, 8)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (4, 5)),
    ((1, 1), (2, 3), (0, 0), (1, 1), (5, 7)),  # parts of the input that no place of the kernel sees
    ((2, 4), (3, 1), (2, 3), (1, 2), (7, 9)),
    ((4, 2), (3, 2), (3, 1), (2, 3), (11, 8)),
    ((3, 5), (1, 2), (4, 6), (2, 1), (3, 4)),  # more padding than the kernel reaches over the edge
    ((5, 1), (5, 4), (0, 2), (1, 1), (5, 3)),
    ((7, 7), (2, 2), (3, 3), (1, 1), (15, 14)),
]
SIZES = [(1, 1, 1, 1), (3, 2, 5, 9), (2, 5, 8, 32), (1, 3, 17, 41), (9, 1, 3, 70)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def draw(geometry: tuple, V: int, N: int, C: int, O: int, dtype: torch.dtype) -> tuple[Patches, Tensor, Tensor]:
    """Images as a convolution sees them, g [V, N, S, O], and J [V, N, O, I] of the patches that torch unfolds."""
    kernel, stride, padding, dilation, image = geometry
    x = torch.randn(N, C, *image, dtype=dtype)
    a = F.unfold(x, kernel, dilation, padding, stride)  # [N, I, S]
    out = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(image, padding, dilation, kernel, stride, strict=True)
    ]
    assert a.shape[2] == out[0] * out[1]
    g = torch.randn(V, N, O, a.shape[2], dtype=dtype)
    J = torch.einsum("vnos,nis->vnoi", g, a)
    return Patches(x, [*kernel, *stride, *padding, *dilation, *out]), g.mT, J


def close(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Equal up to rounding of the sums of which ``scale`` is the size."""
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= TOLERANCE[found.dtype] * float(scale.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("V", "N", "C", "O"), [(1, 1, 1, 1), (3, 2, 5, 9), (2, 5, 8, 32), (1, 3, 17, 41), (9, 1, 3, 70)]
)
def test_equals_unfolded(geometry: tuple, V: int, N: int, C: int, O: int, dtype: torch.dtype) -> None:
    seen, g, J = draw(geometry, V, N, C, O, dtype)
    images, sign = seen.images, torch.randn(V, N, dtype=dtype)
    rows = J.flatten(2)
    gram = torch.einsum("vnp,wmp->vnwm", rows, rows)
    forms = (g, g.contiguous(), g.flip(2).flip(2)), (images, images.contiguous(memory_format=torch.channels_last))
    for derivatives, x in itertools.product(*forms):
        patches = Patches(x, seen.geometry)
        assert patches.suit(derivatives)
        close(patches.jacobian(derivatives).view_as(J), J, J)
        close(patches.norms(derivatives, False), J.square().sum((2, 3)), J.square().sum((2, 3)))
        with_bias = J.square().sum((2, 3)) + g.sum(2).square().sum(2)
        close(patches.norms(derivatives, True), with_bias, with_bias)
        close(patches.gram(derivatives, None, False), gram, gram)
        of_bias = torch.einsum("vno,wmo->vnwm", g.sum(2), g.sum(2))
        close(patches.gram(derivatives, None, True), gram + of_bias, gram + of_bias)
        close(patches.diagonal(derivatives, None), J.square().sum((0, 1)), J.square().sum((0, 1)))
        expected = (sign[:, :, None, None] * J.square()).sum((0, 1))
        close(patches.diagonal(derivatives, sign), expected, (sign.abs()[:, :, None, None] * J.square()).sum((0, 1)))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("slab", [1, 1 << 30])
def test_gram_in_slabs_of_outputs(slab: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB_BYTES", slab)
    seen, g, J = draw(GEOMETRIES[0], 2, 4, 3, 70, torch.float64)
    rows = torch.cat([J.flatten(2), g.sum(2)], 2) if with_bias else J.flatten(2)
    expected = torch.einsum("vnp,wmp->vnwm", rows, rows)
    found = seen.gram(g, None, with_bias)
    close(found, expected, expected)
    assert torch.equal(found, found.permute(2, 3, 0, 1))
    start = torch.randn(2, 4, 2, 4, dtype=torch.float64)
    close(seen.gram(g, start.clone(), with_bias), start + expected, expected)


def test_results_do_not_depend_on_threads() -> None:
    seen, g, _ = draw(GEOMETRIES[1], 2, 33, 16, 40, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((seen.norms(g, True), seen.jacobian(g), seen.diagonal(g, None)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize(("V", "N", "C", "O"), [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_sum(V: int, N: int, C: int, O: int) -> None:
    patches = Patches(torch.randn(N, C, 4, 4), [3, 3, 1, 1, 1, 1, 1, 1, 4, 4])
    g = torch.randn(V, N, 16, O)
    assert torch.equal(patches.norms(g, False), torch.zeros(V, N))
    assert torch.equal(patches.jacobian(g), torch.zeros(V, N, O * C * 9))
    assert torch.equal(patches.diagonal(g, None), torch.zeros(O, C * 9))


def test_nan_of_one_sample_stays_with_it() -> None:
    seen, g, _ = draw(GEOMETRIES[0], 1, 6, 4, 5, torch.float32)
    seen.images[2, 1, 3, 3] = float("nan")
    assert seen.norms(g, False)[0].isnan().tolist() == [False, False, True, False, False, False]
    g[0, 4, 7, 2] = float("inf")
    assert (~seen.norms(g, False)[0].isfinite()).tolist() == [False, False, True, False, True, False]


def test_what_does_not_suit() -> None:
    seen, g, _ = draw(GEOMETRIES[0], 1, 2, 3, 4, torch.float32)
    assert not seen.suit(g.double())
    assert not seen.suit(g.bfloat16())
    assert not seen.suit(torch.empty_like(g, device="meta"))
    half = Patches(seen.images.half(), seen.geometry)
    assert not half.suit(g.half())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, x, n: (g[0], x, n), "must be"),
        (lambda g, x, n: (g[:, :1], x, n), "differ in samples"),
        (lambda g, x, n: (g, x.double(), n), "dtype"),
        (lambda g, x, n: (g, x, n[:-1]), "ten numbers"),
        (lambda g, x, n: (g, x, [0, *n[1:]]), "too small"),
        (lambda g, x, n: (g[:, :, :-1], x, n), "positions"),
    ],
)
def test_errors(change, message: str) -> None:
    seen, g, _ = draw(GEOMETRIES[0], 1, 2, 3, 4, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_curvature.convolution_norms(*change(g, seen.images, seen.geometry), False)


def test_jacobians_that_do_not_fit_are_refused() -> None:
    """Before anything is allocated: a panel of outputs of 2^20 samples and 2^17 columns."""
    g, images = torch.empty(1).expand(1 << 17, 1 << 20, 1, 1), torch.empty(1).expand(1 << 20, 1, 1, 1)
    with pytest.raises(MemoryError, match=r"numbers take .* GiB are free: give smaller batches"):
        Patches(images, [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]).gram(g, None, False)
