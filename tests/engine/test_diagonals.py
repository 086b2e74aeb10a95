"""Diagonals of all parameters: small dense layers in one pass, the others one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Size, Tensor, nn

import torch_curvature as tc
from torch_curvature import diagonals, reference
from torch_curvature.factors import Factor

from .test_matrices import close

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

dense_diagonals = torch.ops.torch_curvature.dense_diagonals


def plain(g: Tensor, a: Tensor | None, sign: Tensor | None) -> Tensor:
    """By the Jacobian, formed."""
    J = g.sum(2) if a is None else torch.einsum("vnso,nsi->vnoi", g, a)
    weight = torch.ones(g.shape[:2]) if sign is None else sign
    return torch.einsum("vn...,vn->...", J.square(), weight.to(J.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "N"), [(1, 1), (1, 50), (3, 7), (9, 300)])
@pytest.mark.parametrize("signed", [False, True])
def test_one_pass_and_one_by_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, V: int, N: int, signed: bool
) -> None:
    calls = []
    helper = diagonals._dense_diagonals
    monkeypatch.setattr(diagonals, "_dense_diagonals", lambda *a: (calls.append(len(a[0])), helper(*a))[1])
    sign = torch.randn(V, N) if signed else None
    sizes = [
        (1, 3, 5, True),
        (1, 40, 33, False),
        (1, 7, None, False),
        (1, 1, 1, True),
        (1, 17, 64, True),
        (4, 3, 5, False),
    ]
    factors, expected = [], {}
    for k, (S, O, I, bias) in enumerate(sizes):
        g, a = torch.randn(V, N, S, O, dtype=dtype), None if I is None else torch.randn(N, S, I, dtype=dtype)
        factor = Factor(g, a, Size([O] if I is None else [O, I]))
        expected[f"{k}"] = plain(g, a, sign)
        if bias and a is not None:
            factor = factor.with_bias(f"{k}.bias", lambda: pytest.fail("no input with ones is needed"))
            expected[f"{k}.bias"] = plain(g, None, sign)
        factors.append((f"{k}", factor))
    g, a = torch.randn(V, N, 1, 6, dtype=dtype), torch.randn(N, 1, 8, dtype=dtype)
    factors.append(("transposed", Factor(g, a, Size([8, 6]), True)))
    expected["transposed"] = plain(g, a, sign).T
    slack = 1e-5 if dtype == torch.float32 else 1e-13
    for few, passes in ((1 << 18, [6]), (6 * N, [3]), (-1, [])):
        monkeypatch.setattr(diagonals, "FEW", few)
        calls.clear()
        found = diagonals.all_diagonals(iter(factors), sign)
        assert calls == passes
        assert found.keys() == expected.keys()
        for name, theirs in expected.items():
            assert found[name].is_contiguous()
            torch.testing.assert_close(found[name], theirs, rtol=slack, atol=slack * float(theirs.abs().max()))


def test_of_models() -> None:
    """Weights stored either way, a scale that is no layer, positions; batches that add up."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.scale, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(20, 3)
            self.turned = nn.Parameter(torch.randn(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.scale(self.rows((x.flatten(1) @ self.turned).view(-1, 4, 3)))).flatten(1))

    model, x, y = Mixed(), torch.randn(9, 4, 3), torch.randint(3, (9,))
    truth = reference.gauss_newton(model, nn.CrossEntropyLoss(), (x, y)).diagonal()
    for data in ((x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        for _ in range(2):
            found = tc.GaussNewton(model, nn.CrossEntropyLoss(), data).diagonal()
            close(torch.cat([part.flatten() for part in found.values()]), truth)


@pytest.mark.parametrize(
    ("g", "a", "wanted", "message"),
    [
        ([(2, 5, 3)], [(5, 4)], [], "as many"),
        ([(2, 5, 3), (2, 6, 3)], [(5, 4), (6, 4)], [1, 1], "layer 1 has g"),
        ([(2, 5, 3)], [(6, 4)], [1], "layer 0 has g"),
        ([(2, 5, 0)], [(5, 4)], [1], "layer 0 has g"),
        ([(2, 5, 3)], [(5, 4)], [0], "nothing is wanted"),
    ],
)
def test_errors(g: list[tuple[int, ...]], a: list[tuple[int, ...]], wanted: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dense_diagonals([torch.randn(s) for s in g], [torch.randn(s) for s in a], wanted, None)
    with pytest.raises(RuntimeError, match="another dtype"):
        dense_diagonals([torch.randn(2, 5, 6)], [torch.randn(5, 4).float()], [1], None)
    with pytest.raises(RuntimeError, match="'sign' must be"):
        dense_diagonals([torch.randn(2, 5, 6)], [torch.randn(5, 4)], [1], torch.ones(2, 4))
