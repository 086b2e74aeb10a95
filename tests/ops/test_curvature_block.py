"""curvature_block: blocks between the parameters of two layers, written into their places of a symmetric matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_curvature as tc
from torch_curvature.ops import Places, curvature_block
from torch_curvature.ops.curvature_block import _by_kronecker_sum

# N, O, I, O2, I2, D: tiles that are full and not, one input, one output, more samples than a chunk, no sample.
SIZES = [
    (5, 3, 4, 2, 3, 3),
    (7, 5, 17, 4, 9, 16),
    (6, 33, 33, 16, 17, 32),
    (3, 2, 1, 40, 5, 1),
    (4, 3, 5, 1, 1, 0),
    (1, 1, 1, 1, 1, 1),
    (600, 18, 20, 10, 7, 20),
    (300, 4, 33, 9, 40, 30),
    (1100, 3, 35, 18, 5, 34),  # blocks of samples
    (140, 5, 65, 7, 43, 64),  # ranges of inputs, several chunks of samples
    (70, 17, 11, 6, 25, 10),
    (33, 3, 24, 35, 12, 24),
    (0, 3, 4, 2, 3, 2),
]


def value(m: Tensor, a: Tensor, a2: Tensor, g: Tensor | None, d: Tensor | None) -> Tensor:
    """The formula, [O I, O2 I2]."""
    X = m[:, :, None, :] * a[:, None, :, None]
    if g is not None and d is not None:
        X[:, :, : d.shape[1]] += g[:, :, None, None] * d[:, None]
    return torch.einsum("noip,nj->oipj", X, a2).flatten(2).flatten(0, 1)


def places(kind: str, O: int, I: int, start: int) -> tuple[Places, int]:
    """Somewhere from ``start`` on, and where they end."""
    if kind == "weight":
        return Places(start, I, 1), start + O * I
    if kind == "transposed":
        return Places(start, 1, O), start + O * I
    if kind == "bias behind":
        return Places(start, I - 1, 1, start + O * (I - 1) + 2), start + O * I + 2
    if kind == "bias in front":
        return Places(start + O + 1, I - 1, 1, start), start + O * I + 1
    return Places(start, 1, O, start + O * (I - 1)), start + O * I  # transposed, then a bias


KINDS = ["weight", "transposed", "bias behind", "bias in front", "transposed with bias"]


def index(p: Places, O: int, I: int) -> list[int]:
    return [
        p.last + o if p.last >= 0 and i == I - 1 else p.start + o * p.per_output + i * p.per_input
        for o in range(O)
        for i in range(I)
    ]


def spread(out: Tensor, block: Tensor, rows: list[int], columns: list[int], add: bool) -> Tensor:
    want = out.clone()
    r, c = torch.tensor(rows)[:, None], torch.tensor(columns)[None]
    want[r, c] = block + out[r, c] if add else block
    want[c.T, r.T] = want[r, c].T
    return want


def inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    N, O, I, O2, I2, D = size
    shapes = (N, O, O2), (N, I), (N, I2), (N, O), (N, D, O2)
    return tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)


def symmetric(P: int, dtype: torch.dtype = torch.float64) -> Tensor:
    out = torch.randn(P, P, dtype=torch.float64).to(dtype)
    return out.triu() + out.triu(1).T


def strided(t: Tensor, way: int) -> Tensor:
    """The same values behind other strides."""
    if way == 0 or t.numel() == 0:
        return t
    if way == 1:
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if way == 2:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t.movedim(0, -1).contiguous().movedim(-1, 0)  # samples side by side


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("second_term", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_two_layers(size: tuple[int, ...], second_term: bool, add: bool) -> None:
    _, O, I, O2, I2, _ = size
    k = SIZES.index(size) + 3 * add + second_term
    rows, end = places(KINDS[k % 5], O, I, 1)
    columns, end = places(KINDS[(k + 2) % 5], O2, I2, end)
    m, a, a2, g, d = (strided(t, (k + i) % 4) for i, t in enumerate(inputs(size)))
    more = {"g": g, "d": d} if second_term else {}
    block = value(m, a, a2, more.get("g"), more.get("d"))
    wide = symmetric(end + 5)
    out = wide[: end + 3, : end + 3]
    want = spread(out, block, index(rows, O, I), index(columns, O2, I2), add)
    outside = wide[end + 3 :].clone()
    got = curvature_block(out, m, a, a2, rows=rows, columns=columns, add=add, **more)
    assert got is out
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(out, out.T)
    assert torch.equal(wide[end + 3 :], outside)
    again = symmetric(end + 3) if not add else None
    if again is not None:  # what it does where there is no kernel
        _by_kronecker_sum(again, m, a, a2, more.get("g"), more.get("d"), rows, columns, add)
        i, j = index(rows, O, I), index(columns, O2, I2)
        torch.testing.assert_close(again[i][:, j], block, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again[j][:, i], block.T, rtol=1e-12, atol=1e-12)


DIAGONALS = [
    (5, 3, 4, 2, 3),
    (9, 5, 17, 16, 9),
    (140, 4, 33, 32, 17),
    (70, 17, 11, 11, 25),
    (6, 2, 40, 1, 3),
    (1100, 3, 35, 18, 5),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", DIAGONALS)
def test_diagonal_second_term(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """As if d were given in full."""
    N, O, I, O2, I2 = size
    m, a, a2, g, _ = inputs((*size, 0), dtype)
    diagonal = torch.randn(O2, N, dtype=torch.float64).to(dtype).T
    rows, end = places("bias behind", O, I, 0)
    columns, end = places("weight", O2, I2, end)
    out = torch.zeros(end, end, dtype=dtype)
    curvature_block(out, m, a, a2, g=g, d=diagonal, rows=rows, columns=columns)
    full = [t.double() for t in (m, a, a2, g, torch.diag_embed(diagonal))]
    block, size_of_terms = value(*full), value(*(t.abs() for t in full))
    error = (out[index(rows, O, I)][:, index(columns, O2, I2)].double() - block).abs()
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 8 * N**0.5
    assert bool((error <= eps * size_of_terms + torch.finfo(dtype).eps * block.abs()).all())
    assert torch.equal(out, out.T)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "size",
    [(5, 3, 4), (600, 9, 17), (9, 17, 33), (4, 1, 3), (300, 4, 40), (7, 3, 41), (70, 9, 1), (0, 2, 3), (1200, 2, 90)],
)
def test_one_layer(size: tuple[int, int, int], kind: str, add: bool) -> None:
    N, O, I = size
    rows, end = places(kind, O, I, 2)
    m, a = torch.randn(N, O, O, dtype=torch.float64), torch.randn(N, I, dtype=torch.float64)
    full = m.triu() + m.triu(1).mT  # the upper triangle is the one that counts
    out = symmetric(end + 1)
    at = index(rows, O, I)
    want = spread(out, value(full, a, a, None, None), at, at, add)
    for given in (m, m.mT.contiguous().mT, strided(m, 3)):
        got = out.clone()
        curvature_block(got, given, a, rows=rows, add=add)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(got, got.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [0, 3])
@pytest.mark.parametrize("size", SIZES)
def test_other_dtypes(size: tuple[int, ...], way: int, dtype: torch.dtype) -> None:
    """Rounded once, behind a sum in float32."""
    N, O, I, O2, I2, _ = size
    m, a, a2, g, d = (strided(t, way) for t in inputs(size, dtype))
    rows, end = places("bias behind", O, I, 0)
    columns, end = places("weight", O2, I2, end)
    out = torch.zeros(end, end, dtype=dtype)
    curvature_block(out, m, a, a2, g=g, d=d, rows=rows, columns=columns)
    block = value(*(t.double() for t in (m, a, a2, g, d)))
    error = (out[index(rows, O, I)][:, index(columns, O2, I2)].double() - block).abs()
    size_of_terms = value(*(t.double().abs() for t in (m, a, a2, g, d)))
    eps = torch.finfo(torch.float32).eps * 8 * max(1, N) ** 0.5
    assert bool((error <= eps * size_of_terms + torch.finfo(dtype).eps * block.abs() + 1e-30).all())
    assert torch.equal(out, out.T)


def test_one_thread_or_several_give_the_same_bits() -> None:
    size = (600, 18, 20, 10, 7, 20)
    m, a, a2, g, d = inputs(size, torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = torch.zeros(430, 430)
            curvature_block(out, m, a, a2, g=g, d=d, rows=Places(0, 20, 1), columns=Places(360, 7, 1))
            found.append(out)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_no_number_stays_visible() -> None:
    m, a, a2, g, d = inputs((5, 3, 4, 2, 3, 3))
    d[2, 1, 1] = float("nan")
    out = torch.zeros(18, 18, dtype=torch.float64)
    curvature_block(out, m, a, a2, g=g, d=d, rows=Places(0, 4, 1), columns=Places(12, 3, 1))
    hit = torch.zeros(3, 4, 2, 3, dtype=torch.bool)
    hit[:, 1, 1] = True
    assert torch.equal(out[:12, 12:].isnan(), hit.view(12, 6))


def _call(**changed: object) -> Tensor:
    m, a, a2, g, d = inputs((5, 3, 4, 2, 3, 3))
    given = {"out": torch.zeros(18, 18, dtype=torch.float64), "m": m, "a": a, "a2": a2, "g": g, "d": d}
    given |= {"rows": Places(0, 4, 1), "columns": Places(12, 3, 1)}
    return curvature_block(**(given | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"a": torch.randn(5, 4)}, TypeError, "'m' is torch.float64 and 'a' is torch.float32"),
        ({"out": torch.zeros(18, 18)}, TypeError, "'out' is torch.float32"),
        ({"a": torch.randn(4, 4).double()}, RuntimeError, r"'a' has shape \[4, 4\].* must be 5 \(N\)"),
        ({"g": torch.randn(5, 2).double()}, RuntimeError, r"'g' has shape \[5, 2\].* must be 3 \(O\)"),
        ({"g": None}, RuntimeError, "'d' is given without 'g'"),
        ({"d": torch.randn(5, 5, 2).double()}, RuntimeError, r"'d' has shape \[5, 5, 2\].* at most 4 \(I\)"),
        ({"d": torch.randn(5, 3).double()}, RuntimeError, r"'d' has shape \[5, 3\].* must be 2 \(O2\)"),
        ({"d": torch.randn(4, 2).double()}, RuntimeError, r"'d' has shape \[4, 2\].* must be 5 \(N\)"),
        (
            {"a": torch.randn(5, 1).double(), "d": torch.randn(5, 2).double()},
            RuntimeError,
            r"axis -1 .*at most 1 \(I\)",
        ),
        ({"a2": None}, ValueError, "'columns' is given without 'a2'"),
        ({"columns": None}, ValueError, "'a2' is given without 'columns'"),
        ({"rows": Places(7, 4, 1)}, RuntimeError, r"'rows' = \[7, 4, 1, -1\].*outside 'out'"),
        ({"columns": Places(0, 2, 1, 17)}, RuntimeError, r"'columns' = \[0, 2, 1, 17\].*outside 'out'"),
        ({"rows": Places(-1, 4, 1)}, RuntimeError, "outside 'out'"),
        ({"out": torch.zeros(18, 17).double()}, RuntimeError, r"'out' has shape \[18, 17\]"),
        ({"out": torch.zeros(18, 36).double()[:, ::2]}, RuntimeError, "rows of 'out' must be contiguous"),
        ({"m": torch.randn(3, 2).double()}, RuntimeError, "'m' has shape"),
        ({"a2": None, "columns": None, "g": None, "d": None}, RuntimeError, "'m' must be symmetric"),
        ({"a": torch.randn(5, 4).double().requires_grad_()}, RuntimeError, "differentiat"),
    ],
)
def test_errors(changed: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changed)


def test_rows_beyond_the_second_term_may_all_be() -> None:
    """d with no row at all is no second term."""
    m, a, a2, g, d = inputs((5, 3, 4, 2, 3, 0))
    out = torch.zeros(18, 18, dtype=torch.float64)
    tc.ops.curvature_block(out, m, a, a2, g=g, d=d, rows=Places(0, 4, 1), columns=Places(12, 3, 1))
    torch.testing.assert_close(out[:12, 12:], value(m, a, a2, None, None))
