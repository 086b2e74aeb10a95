"""Inner products over all parameters: dense layers in one pass, the others one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Size, Tensor, nn

import torch_curvature as tc
from torch_curvature import grams, reference
from torch_curvature.factors import Factor

from .test_matrices import close
from .test_norms import factor

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helper is one of the CPU

dense_gram = torch.ops.torch_curvature.dense_gram


def rows_of(factor: Factor) -> Tensor:
    """[N V, p] Jacobians, formed, with those of the bias behind them."""
    J = factor.jacobian().double()
    if factor.bias is not None:
        J = torch.cat([J, factor.g.double().sum(2)], 2)
    return J.transpose(0, 1).flatten(0, 1)


def slack(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "N"), [(1, 1), (1, 32), (1, 70), (3, 7), (10, 45), (40, 5), (33, 33)])
def test_one_pass_and_one_by_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, V: int, N: int) -> None:
    calls = []
    helper = grams._dense_gram
    monkeypatch.setattr(grams, "_dense_gram", lambda *a: (calls.append(len(a[0])), helper(*a))[1])
    dense = [(1, 3, 5, True), (1, 40, 33, False), (1, 7, None, False), (1, 1, 1, True), (1, 17, 64, True)]
    every = [factor(V, N, *sizes, dtype) for sizes in [*dense, (4, 3, 5, False), (3, 6, None, False)]]
    strided = torch.randn(V, N, 1, 8, dtype=dtype)[..., ::2], torch.randn(N, 1, 6, dtype=dtype)[..., ::3]
    every.append(Factor(*strided, Size([4, 2])))
    found = grams.total_gram({str(k): f for k, f in enumerate(every)})
    assert found.dtype == dtype
    assert torch.equal(found, found.T)
    rows = torch.cat([rows_of(f) for f in every], 1)
    expected = rows @ rows.T
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=slack(dtype) * float(expected.abs().max()))
    assert calls == [5]
    monkeypatch.setattr(grams, "LIMIT", -1)
    torch.testing.assert_close(
        grams.total_gram({str(k): f for k, f in enumerate(every)}),
        found,
        rtol=0,
        atol=slack(dtype) * float(found.max()),
    )
    assert calls == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "N"), [(1, 33), (2, 17), (9, 1)])
def test_the_helper(dtype: torch.dtype, V: int, N: int) -> None:
    """Rows in any memory order, axes without entries, more outputs than one step takes; the same on one thread."""
    g = [torch.randn(N, V, 1030, dtype=dtype).transpose(0, 1), torch.randn(V, N, 0, dtype=dtype), torch.randn(V, N, 9)]
    a = [torch.randn(N, 40, dtype=dtype)[:, 3:], torch.randn(N, 8, dtype=dtype), torch.randn(N, 0, dtype=dtype)]
    g[2] = g[2].to(dtype)
    for bias in ([0, 1, 1], [1, 0, 0]):
        expected = torch.zeros(N, V, N, V, dtype=torch.float64)
        for x, y, b in zip(g, a, bias, strict=True):
            inner = torch.einsum("vno,wmo->nvmw", x.double(), x.double())
            expected += inner * (y.double() @ y.double().T + b)[:, None, :, None]
        found = dense_gram(g, a, bias)
        assert torch.equal(found, found.T)
        expected = expected.view(N * V, N * V)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=slack(dtype) * float(expected.abs().max()))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(dense_gram(g, a, bias), found)
        finally:
            torch.set_num_threads(threads)


def test_more_layers_than_are_taken_at_a_time() -> None:
    for V, layers in ((1, 3), (2, 9), (3, 10)):
        g, a = ([torch.randn(*shape) for _ in range(layers)] for shape in ((V, 40, 6), (40, 5)))
        bias = [k % 2 for k in range(layers)]
        found = dense_gram(g, a, bias)
        expected = sum(
            torch.einsum("vno,wmo->nvmw", x, x) * (y @ y.T + b)[:, None, :, None]
            for x, y, b in zip(g, a, bias, strict=True)
        )
        torch.testing.assert_close(found, expected.reshape(40 * V, 40 * V))
        assert torch.equal(found, found.T)


def test_values_that_are_not_finite_stay_where_they_are() -> None:
    g, a = torch.randn(2, 40, 6), torch.randn(40, 5)
    g[1, 7, 3] = torch.nan
    found = dense_gram([g], [a], [1]).view(40, 2, 40, 2)
    assert found[7, 1].isnan().all()
    found[7, 1] = 0
    found[:, :, 7, 1] = 0
    assert found.isfinite().all()


def test_of_models() -> None:
    """Layers of one position a sample, of several, and parameters that are no layer's, together; several batches."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.scale, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(20, 2)
            self.first = nn.Linear(12, 12, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.scale(self.rows(self.first(x.flatten(1)).view(-1, 4, 3)))).flatten(1))

    x = torch.randn(9, 4, 3)
    for model in (Mixed(), nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3))):
        J = reference.jacobian(model, x)
        J = J.reshape(-1, J.shape[-1])
        for _ in range(2):
            for data in (x, [(x[:4], None), (x[4:], None)]):
                kernel = tc.Jacobian(model, data).gram()
                assert torch.equal(kernel.flatten(0, 1).flatten(1), kernel.flatten(0, 1).flatten(1).T)
                close(kernel.flatten(0, 1).flatten(1), J @ J.T)
            with tc.track(model) as t:
                model(x).square().sum().backward()
            rows = torch.cat([g.flatten(1) for g in t.gradients().values()], 1)
            close(t.gradient_gram(), rows @ rows.T)


@pytest.mark.parametrize(
    ("g", "a", "bias", "message"),
    [
        ([(2, 5, 3)], [(5, 4)], [], "as many"),
        ([(2, 5, 3), (2, 6, 3)], [(5, 4), (6, 4)], [0, 0], "layer 1 has g"),
        ([(2, 5, 3)], [(6, 4)], [1], "layer 0 has g"),
    ],
)
def test_errors(g: list[tuple[int, ...]], a: list[tuple[int, ...]], bias: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dense_gram([torch.randn(s) for s in g], [torch.randn(s) for s in a], bias)
    with pytest.raises(RuntimeError, match="not contiguous"):
        dense_gram([torch.randn(2, 5, 6)[..., ::2]], [torch.randn(5, 4)], [0])
    with pytest.raises(RuntimeError, match="another dtype"):
        dense_gram([torch.randn(2, 5, 6)], [torch.randn(5, 4).float()], [0])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        dense_gram([torch.randn(2, 5, 6).half()], [torch.randn(5, 4).half()], [0])
