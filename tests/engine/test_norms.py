"""Squared norms over all parameters: dense layers in one pass, the others one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import factors, norms, reference
from torch_curvature.factors import Factor, squared_norms
from torch_curvature.joining import with_ones

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

dense_norms = torch.ops.torch_curvature.dense_norms


def factor(V: int, N: int, S: int, O: int, I: int | None, bias: bool, dtype: torch.dtype) -> Factor:
    g, a = torch.randn(V, N, S, O, dtype=dtype), None if I is None else torch.randn(N, S, I, dtype=dtype)
    found = Factor(g, a, torch.Size([O] if I is None else [O, I]))
    if not bias or a is None:
        return found
    return found.with_bias("bias", lambda: torch.cat([a, torch.ones_like(a[..., :1])], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "N"), [(1, 1), (1, 50), (3, 7), (1, 3000)])
def test_one_pass_and_one_by_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, V: int, N: int) -> None:
    calls = []
    helper = norms._dense_norms
    monkeypatch.setattr(norms, "_dense_norms", lambda *a: (calls.append(len(a[0])), helper(*a))[1])
    dense = [(1, 3, 5, True), (1, 40, 33, False), (1, 7, None, False), (1, 1, 1, True), (1, 17, 64, True)]
    every = [factor(V, N, *sizes, dtype) for sizes in [*dense, (4, 3, 5, False), (3, 6, None, False)]]
    strided = torch.randn(V, N, 1, 8, dtype=dtype)[..., ::2], torch.randn(N, 1, 6, dtype=dtype)[..., ::3]
    every.append(Factor(*strided, torch.Size([4, 2])))
    found = norms.total_squared_norms(iter(every))
    assert found is not None
    assert found.dtype == dtype
    expected = torch.zeros(V, N)
    for f in every:
        J = f.jacobian().double()
        expected += J.square().sum(-1) + (f.g.double().sum(2).square().sum(-1) if f.bias else 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-12)
    assert calls == [5]
    torch.testing.assert_close(sum(squared_norms(f) for f in every), found)


@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "N", "S", "O", "I"),
    [(1, 3, 1, 5, 7), (2, 4, 3, 6, 5), (1, 5, 16, 64, 64), (3, 2, 17, 33, 20), (1, 2, 300, 9, 8), (2, 3, 70, 40, 3)],
)
def test_weight_and_bias_at_several_positions(
    monkeypatch: pytest.MonkeyPatch, helped: bool, dtype: torch.dtype, V: int, N: int, S: int, O: int, I: int
) -> None:
    if not helped:
        monkeypatch.setattr(factors, "takes_helpers", lambda x: False)
    g, a = torch.randn(V, N, S, O).to(dtype), torch.randn(N, S, I).to(dtype)
    wide = [x.double() for x in (g, a)]
    expected = torch.einsum("vnso,nsi->vnoi", *wide).square().sum((2, 3)) + wide[0].sum(2).square().sum(2)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2}[dtype]
    for derivatives in (g, g.mT.contiguous().mT, torch.stack([g, g], -1)[..., 0]):
        for inputs in (a, a.mT.contiguous().mT):
            whole = Factor(derivatives, inputs, torch.Size([O, I]))
            found = squared_norms(whole.with_bias("bias", partial(with_ones, inputs)))
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
            part = whole.with_bias("bias", partial(with_ones, inputs)).samples(1, 3)
            torch.testing.assert_close(squared_norms(part).double(), expected[:, 1:3], rtol=tolerance, atol=0)


def test_helper_of_weight_and_bias() -> None:
    with_bias, without = torch.ops.torch_curvature.norms_with_bias, tc.ops.jacobian_norms
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for S in (1, 5, 40):
            g, a = torch.randn(2, 3, S, 6, dtype=dtype), torch.randn(3, S, 4, dtype=dtype)
            torch.testing.assert_close(with_bias(g, a), without(g, with_ones(a)), rtol=1e-2, atol=0)
    assert torch.equal(with_bias(torch.randn(2, 3, 0, 6), torch.randn(3, 0, 4)), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="g"):
        with_bias(torch.randn(2, 3, 4, 6), torch.randn(2, 4, 4))


def test_nothing() -> None:
    assert norms.total_squared_norms([]) is None


def test_under_a_transform() -> None:
    g, a = torch.randn(4, 2, 6, 1, 3), torch.randn(4, 6, 1, 5)

    def of(g: Tensor, a: Tensor) -> Tensor:
        found = norms.total_squared_norms([Factor(g, a, torch.Size([3, 5]))])
        assert found is not None
        return found

    torch.testing.assert_close(
        torch.func.vmap(of)(g, a), g[:, :, :, 0].square().sum(-1) * a[:, None, :, 0].square().sum(-1)
    )
    x = g[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(x, a[0]).sum(), x)
    torch.testing.assert_close(gradient, 2 * g[0] * a[0].square().sum(-1)[None, :, :, None])


@pytest.mark.parametrize("parameter_gradients", [True, False])
def test_tracked_norms(parameter_gradients: bool) -> None:
    """Of layers of one position a sample, of several, and parameters that are no layer's, together."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.scale, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(20, 2)
            self.first = nn.Linear(12, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.scale(self.rows(self.first(x.flatten(1)).view(-1, 4, 3)))).flatten(1))

    model, x = Mixed(), torch.randn(9, 4, 3)
    for _ in range(2):
        with tc.track(model, parameter_gradients=parameter_gradients) as tracked:
            model(x).square().sum().backward()
        expected = sum(J.flatten(1).square().sum(1) for J in tracked.gradients().values())
        torch.testing.assert_close(tracked.gradient_norms(squared=True), expected)


@pytest.mark.parametrize(
    ("g", "a", "bias", "message"),
    [
        ([(2, 5, 3)], [(5, 4)], [], "as many"),
        ([], [], [], "as many|no tensor arguments"),
        ([(2, 5, 3), (2, 6, 3)], [(5, 4), (6, 4)], [0, 0], "layer 1 has g"),
        ([(2, 5, 3)], [(6, 4)], [1], "layer 0 has g"),
    ],
)
def test_errors(g: list[tuple[int, ...]], a: list[tuple[int, ...]], bias: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dense_norms([torch.randn(s) for s in g], [torch.randn(s) for s in a], bias)
    with pytest.raises(RuntimeError, match="not contiguous"):
        dense_norms([torch.randn(2, 5, 6)[..., ::2]], [torch.randn(5, 4)], [0])
    with pytest.raises(RuntimeError, match="another dtype"):
        dense_norms([torch.randn(2, 5, 6)], [torch.randn(5, 4).float()], [0])


class Sequences(nn.Module):
    """Fused attention between dense layers over tokens, one bias of two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.last = nn.Linear(4, 12), nn.Linear(4, 3, bias=False)
        self.bias = nn.Parameter(torch.randn(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return nn.functional.linear(torch.tanh(mixed).mean(1), self.last.weight, self.bias)


@pytest.mark.parametrize("first", ["one column", "several"])
def test_fused_attention_of_one_column_and_written_out_of_several(first: str) -> None:
    """What one graph can do is not held against the other; and results have the shapes of the parameters."""
    model, loss = Sequences(), nn.CrossEntropyLoss()
    data = torch.randn(5, 6, 4), torch.randint(3, (5,))
    halves = [(data[0][:2], data[1][:2]), (data[0][2:], data[1][2:])]
    G, E = reference.gauss_newton(model, loss, data), reference.empirical_fisher(model, loss, data)
    gradients = reference.per_sample_gradients(model, nn.CrossEntropyLoss(reduction="sum"), data)
    rows = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    plans: dict[bool, list[Any]] = {True: [], False: []}
    for one_column in (True, False, True) if first == "one column" else (False, True, False):
        if one_column:
            for batches in (data, halves):
                matrix = tc.EmpiricalFisher(model, loss, batches)
                torch.testing.assert_close(matrix.gradient_norms(), rows.norm(dim=1))
                torch.testing.assert_close(matrix.gram(), rows @ rows.T / 5)
                torch.testing.assert_close(matrix.trace(), E.trace())
                diagonal = matrix.diagonal()
                plans[True] += matrix._plans
                torch.testing.assert_close(torch.cat([d.flatten() for d in diagonal.values()]), E.diagonal())
        else:
            several = tc.GaussNewton(model, loss, data)
            diagonal = several.diagonal()
            torch.testing.assert_close(torch.cat([d.flatten() for d in diagonal.values()]), G.diagonal())
            plans[False] += several._plans
        assert {n: d.shape for n, d in diagonal.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert not any(plan is other for plan in plans[True] for other in plans[False])
