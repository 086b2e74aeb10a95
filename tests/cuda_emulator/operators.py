"""Which cases each operator is held to: edges of tiles, one, primes, larger than a tile, rows that are not aligned,
transposed and broadcast operands, empty axes. `cases(operator, seed, quick)` draws fresh values for a seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .blocks import curvature_block
from .checks import DTYPES, FORMATS, Check, bounded, in_tf32, poisoned, randn, storage
from .emulation import Case
from .jacobians import Layer, block_check, diagonal_check, draw_signs, gram_check, layer, mirrored, norms_check


def outer_check(u: torch.Tensor, v: torch.Tensor, batch: int, shift: tuple[int, int, int] = (0, 0, 0)) -> Check:
    """u [B or 1, m], v [B or 1, n] of any strides."""
    (bu, m), (bv, n), dtype = u.shape, v.shape, u.dtype
    numbers = [batch, m, n, u.stride(0) if bu > 1 else 0, u.stride(1), v.stride(0) if bv > 1 else 0, v.stride(1)]
    want = u.double().expand(batch, m)[:, :, None] * v.double().expand(batch, n)[:, None, :]
    out = poisoned(want.numel(), dtype)
    bytes_off = [s * u.element_size() for s in shift]
    case = Case("outer", FORMATS[dtype], numbers, [storage(u), storage(v), out], bytes_off)
    return bounded(case, 2, want, want.abs(), 1)


def outer(g: torch.Generator, quick: bool) -> Iterator[Check]:
    shapes = [
        (1, 1, 1),
        (3, 5, 7),
        (2, 3, 16),
        (70, 3, 3),
        (2, 1, 5000),
        (1, 37, 128),
        (5, 0, 3),
        (0, 2, 2),
        (9000, 1, 1),
        (4, 61, 83),
    ]
    for dtype in DTYPES:
        for batch, m, n in shapes:
            yield outer_check(randn(g, batch, m, dtype=dtype), randn(g, batch, n, dtype=dtype), batch)
        yield outer_check(randn(g, 1, 33, dtype=dtype), randn(g, 6, 24, dtype=dtype), 6)
        yield outer_check(randn(g, 6, 33, dtype=dtype), randn(g, 1, 24, dtype=dtype), 6)
        yield outer_check(randn(g, 9, 6, dtype=dtype).T, randn(g, 8, 6, dtype=dtype).T, 6)
        for shift in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
            yield outer_check(randn(g, 4, 8, dtype=dtype), randn(g, 4, 32, dtype=dtype), 4, shift)


def frobenius_check(x: torch.Tensor, y: torch.Tensor, batch: int, shift: tuple[int, int] = (0, 0)) -> Check:
    """x, y [B or 1, m, n] of any strides."""
    (_, m, n), dtype = x.shape, x.dtype
    numbers = [batch, m, n]
    for z in (x, y):
        numbers += [z.stride(0) if z.shape[0] > 1 else 0, z.stride(1), z.stride(2)]
    products = (x.double() * y.double()).expand(batch, m, n).flatten(1)
    want = products.sum(1)
    bytes_off = [s * x.element_size() for s in shift]
    buffers = [storage(x), storage(y), poisoned(batch, dtype)]
    case = Case("frobenius_inner", FORMATS[dtype], numbers, buffers, [*bytes_off, 0])
    return bounded(case, 2, want, products.square().sum(1).sqrt(), m * n)


def frobenius_inner(g: torch.Generator, quick: bool) -> Iterator[Check]:
    shapes = [
        (1, 1, 1),
        (40, 3, 3),
        (9, 8, 8),
        (3, 37, 53),
        (2, 64, 64),
        (2, 1, 4097),
        (1, 300, 301),
        (4, 0, 5),
        (0, 3, 3),
    ]
    for dtype in DTYPES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return randn(g, *shape, dtype=dtype)

        for batch, m, n in shapes:
            yield frobenius_check(draw(batch, m, n), draw(batch, m, n), batch)
            yield frobenius_check(draw(batch, n, m).mT, draw(batch, m, n), batch)
        yield frobenius_check(draw(3, 40, 70).mT, draw(3, 40, 70).mT, 3)
        yield frobenius_check(draw(3, 70, 40), draw(3, 40, 70).mT, 3)
        yield frobenius_check(draw(1, 24, 16), draw(5, 24, 16), 5)
        yield frobenius_check(draw(70, 5, 40).transpose(0, 1), draw(40, 70, 5).permute(2, 1, 0), 5)
        yield frobenius_check(draw(3, 20, 1).expand(3, 20, 24), draw(3, 20, 24), 3)
        yield frobenius_check(draw(3, 20, 48)[..., ::2], draw(3, 20, 24), 3)
        yield frobenius_check(draw(3, 16, 16), draw(3, 16, 16), 3, (1, 0))
        yield frobenius_check(draw(3, 16, 16), draw(3, 16, 16), 3, (0, 1))


def kronecker_check(b: torch.Tensor, a: torch.Tensor, a2: torch.Tensor | None, symmetric: bool, batch: int) -> Check:
    """b [B or 1, N, O, O2], a [B or 1, N, I], a2 [B or 1, N, I2] of any strides."""
    right, dtype = (a if a2 is None else a2), b.dtype
    (N, O, O2), I, I2 = b.shape[1:], a.shape[2], right.shape[2]
    numbers = [batch, N, O, O2, I, I2, int(symmetric), int(a2 is None)]
    for z in (b, a, right):
        numbers += [z.stride(0) if z.shape[0] > 1 else 0, *z.stride()[1:]]
    wide = [z.double().expand(batch, *z.shape[1:]) for z in (b, a, right)]
    want = torch.einsum("bnop,bni,bnj->boipj", *wide).reshape(batch, O * I, O2 * I2)
    squares = torch.einsum("bnop,bni,bnj->boipj", *[z.square() for z in wide]).reshape(want.shape)
    buffers = [storage(b), storage(a), storage(right), poisoned(want.numel(), dtype)]
    case = Case("kronecker_sum", FORMATS[dtype], numbers, buffers)
    return bounded(case, 3, want, squares.sqrt(), N, split=True, exact=mirrored(want) if symmetric else None)


def kronecker_sum(g: torch.Generator, quick: bool) -> Iterator[Check]:
    shapes = [
        (1, 1, 1, 1),
        (1, 5, 3, 4),
        (2, 9, 5, 7),
        (1, 40, 9, 6),
        (1, 3, 17, 5),
        (1, 33, 4, 18),
        (2, 0, 2, 3),
        (1, 4, 0, 3),
    ]
    if not quick:
        shapes += [(1, 700, 3, 4), (1, 17, 23, 21), (3, 31, 12, 13)]
    for dtype in DTYPES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return randn(g, *shape, dtype=dtype)

        for batch, N, O, I in shapes:
            b = draw(batch, N, O, O)
            yield kronecker_check((b + b.mT) / 2, draw(batch, N, I), None, True, batch)
            yield kronecker_check(b, draw(batch, N, I), None, False, batch)
        yield kronecker_check(draw(2, 21, 4, 3), draw(2, 21, 5), draw(2, 21, 6), False, 2)
        yield kronecker_check(draw(2, 4, 21, 3).transpose(1, 2), draw(1, 5, 21).mT, draw(2, 6, 21).mT, False, 2)
        yield kronecker_check(draw(1, 600, 3, 2), draw(1, 600, 5), None, False, 1)  # few tiles: the depth is split


# V, N, S, O, I: no shared positions; a few; about a tile of them; more, with either form the cheaper
LAYERS = [
    (1, 1, 1, 1, 1),
    (3, 5, 1, 7, 9),
    (2, 70, 1, 16, 24),
    (2, 5, 3, 8, 16),
    (3, 4, 5, 13, 11),
    (1, 3, 40, 24, 8),
    (2, 2, 70, 9, 5),
    (1, 2, 9, 70, 67),
    (1, 2, 2, 130, 20),
    (1, 30, 4, 5, 3),
    (1, 3, 5, 128, 128),
    (2, 3, 0, 4, 5),
    (2, 0, 3, 4, 5),
    (0, 3, 1, 4, 5),
    (1, 2, 3, 0, 4),
]
MORE_LAYERS = [(1, 2, 130, 200, 40), (2, 140, 1, 40, 9), (4, 9, 17, 33, 65), (1, 4, 66, 130, 72)]


# V, N, S of two layers
GRAM_PAIRS = [
    ((2, 5, 3), (3, 4, 7)),
    ((1, 70, 1), (2, 9, 1)),
    ((2, 3, 2), (1, 3, 70)),
    ((1, 3, 80), (2, 2, 5)),
]


def draw_layers(g: torch.Generator, quick: bool) -> Iterator[Layer]:
    for dtype in DTYPES:
        for shape in LAYERS if quick else LAYERS + MORE_LAYERS:
            yield layer(g, *shape, dtype=dtype)
        yield layer(g, 2, 6, 3, 8, 16, dtype=dtype, pad=1)
        yield layer(g, 2, 6, 1, 8, 16, dtype=dtype, pad=3)


def jacobian_norms(g: torch.Generator, quick: bool) -> Iterator[Check]:
    for x in draw_layers(g, quick):
        yield norms_check(x)


def jacobian_gram(g: torch.Generator, quick: bool) -> Iterator[Check]:
    for number, x in enumerate(draw_layers(g, quick)):
        if x.g.shape[3] * x.a.shape[2] <= 2700:
            yield gram_check(x, None, number % 3 == 0, g)
    for dtype in DTYPES:
        for left, right in [
            ((2, 5, 3), (3, 4, 7)),
            ((1, 70, 1), (2, 9, 1)),
            ((2, 3, 2), (1, 3, 70)),
            ((1, 3, 80), (2, 2, 5)),
        ]:
            for O, I in [(8, 16), (5, 3)]:
                yield gram_check(layer(g, *left, O, I, dtype), layer(g, *right, O, I, dtype, pad=1), O == 5, g)


def gauss_newton_block(g: torch.Generator, quick: bool) -> Iterator[Check]:
    for number, x in enumerate(draw_layers(g, quick)):
        if x.g.shape[3] * x.a.shape[2] <= 1000:
            yield block_check(x, draw_signs(g, x) if number % 2 else None)
    for dtype in DTYPES:
        x = layer(g, 20, 9, 1, 6, 5, dtype)  # many columns
        yield block_check(x, None)
        yield block_check(x, draw_signs(g, x))
        yield block_check(layer(g, 2, 300, 2, 3, 2, dtype), None)  # few tiles: the depth is split


def gauss_newton_diagonal(g: torch.Generator, quick: bool) -> Iterator[Check]:
    for number, x in enumerate(draw_layers(g, quick)):
        yield diagonal_check(x, draw_signs(g, x) if number % 2 else None)


GENERATORS = {
    f.__name__: f
    for f in (
        outer,
        frobenius_inner,
        kronecker_sum,
        curvature_block,
        jacobian_norms,
        jacobian_gram,
        gauss_newton_block,
        gauss_newton_diagonal,
    )
}
PRODUCTS = [name for name in GENERATORS if name not in ("outer", "frobenius_inner")]  # TF32 is for these


def cases(operator: str, seed: int = 0, quick: bool = True) -> list[Check]:
    checks = list(GENERATORS[operator](torch.Generator().manual_seed(seed), quick))
    if operator in PRODUCTS:
        checks += [in_tf32(check) for check in checks if check.case.format == "float32"]
    return checks
