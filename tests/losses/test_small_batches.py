"""One pass over the logits, and one over the columns, give what operators of torch give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_curvature import losses
from torch_curvature.losses import small_batches, softmax
from torch_curvature.losses.softmax import _columns

DTYPES = [torch.float32, torch.float64]
SLACK = {torch.float32: 2e-6, torch.float64: 1e-14}


def _probabilities(s: int, N: int, K: int) -> Tensor:
    """Confident ones, zeros and exact ones among them."""
    p = (8 * torch.randn(s, N, K, dtype=torch.float64, device="cpu")).softmax(-1)
    p[:, ::3] = F.one_hot(torch.randint(K, (s, len(range(0, N, 3))), device="cpu"), K).to(p)
    p[:, 1::3, K // 2 :] = 0
    return p / p.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("s", "N", "K", "low", "high"), [(1, 7, 10, 0, 9), (3, 5, 4, 1, 3), (2, 40, 2, 0, 1), (1, 3, 1, 0, 0)]
)
def test_columns(dtype: torch.dtype, s: int, N: int, K: int, low: int, high: int) -> None:
    p, mass = _probabilities(s, N, K).to(dtype), torch.randn(s, N, dtype=dtype, device="cpu")
    mass[:, 2] = 0
    for given, weight in ((p, mass), (p.mT.contiguous().mT, mass.T.contiguous().T)):
        fused = small_batches.softmax_columns(given, weight, low, high)
        assert fused is not None
        assert fused.shape == (s, high - low, N, K)
        torch.testing.assert_close(fused, _columns(p, mass, low, high), atol=SLACK[dtype], rtol=1e3 * SLACK[dtype])


@pytest.mark.parametrize("function", ["kernel", "formula"])
def test_all_columns_are_a_square_root(function: str) -> None:
    p, mass = _probabilities(2, 9, 6), torch.rand(2, 9, dtype=torch.float64, device="cpu")
    s = small_batches.softmax_columns(p, mass, 0, 5) if function == "kernel" else _columns(p, mass, 0, 5)
    assert s is not None
    hessian = mass[..., None, None] * (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))
    torch.testing.assert_close(torch.einsum("scnj,scnk->snjk", s, s), hessian, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_far_below_the_largest(dtype: torch.dtype) -> None:
    """Relative to their own size, down to what is no normal number any more."""
    limit = {torch.float32: -104.0, torch.float64: -745.0}[dtype]
    x = torch.cat([torch.linspace(limit, 0, 999, dtype=dtype), -torch.logspace(-12, 0, 50, dtype=dtype)]).to("cpu")
    u = torch.stack([torch.zeros_like(x), x], 1).unsqueeze(1)
    found = small_batches.softmax_targets(u, torch.zeros(len(x), 1, dtype=torch.long, device="cpu"), -100)
    assert found is not None
    ratio = found.p[:, 0, 1] / found.p[:, 0, 0]
    exact = x.double().exp()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (ratio.double() - exact).abs()
    assert bool((error <= 4 * torch.finfo(dtype).eps * exact + 2 * smallest).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("helped", [True, False])
def test_subtract_targets(dtype: torch.dtype, helped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not helped:
        monkeypatch.setattr(small_batches, "takes_helpers", lambda x: False)
    y, valid = torch.randint(5, (6, 7), device="cpu"), torch.rand(7, 6, dtype=dtype, device="cpu").T
    valid[2, 3] = valid[4, 0] = 0
    y[2, 3] = -100
    for g in (torch.randn(6, 7, 5, dtype=dtype, device="cpu"), torch.randn(6, 5, 7, dtype=dtype, device="cpu").mT):
        one_hot = torch.nn.functional.one_hot(y.clamp(min=0), 5).to(dtype)
        expected = g - one_hot * valid.unsqueeze(-1)
        assert small_batches.subtract_targets(g, y, valid) is g
        assert torch.equal(g, expected)


def test_errors_of_subtract_targets() -> None:
    g, y, valid = (x.to("cpu") for x in (torch.zeros(2, 3, 4), torch.full((2, 3), 4), torch.ones(2, 3)))
    with pytest.raises(RuntimeError, match="y holds 4, which is none of the 4 classes"):
        torch.ops.torch_curvature.subtract_targets_(g, y, valid)
    with pytest.raises(RuntimeError, match="are needed"):
        torch.ops.torch_curvature.subtract_targets_(g, y[:1], valid)


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets(dtype: torch.dtype) -> None:
    u = 5 * torch.randn(6, 4, 7, dtype=dtype, device="cpu").mT
    y = torch.randint(4, (6, 7), device="cpu")
    y[y == 2] = -100
    found = small_batches.softmax_targets(u, y, -100)
    assert found is not None
    torch.testing.assert_close(found.p, u.softmax(-1), atol=SLACK[dtype], rtol=SLACK[dtype])
    assert torch.equal(found.valid, (y != -100).to(dtype))
    assert found.total.dtype == torch.float64
    assert int(found.total) == int((y != -100).sum())
    assert not found.outside
    assert not found.nan
    assert found.every == bool((y != -100).all())
    y[3, 3] = 4
    assert small_batches.softmax_targets(u, y, -100).outside
    for bad, wrong in ((float("nan"), True), (float("inf"), True), (-float("inf"), False)):
        logits = u.clone()
        logits[1, 2, 1] = bad
        assert small_batches.softmax_targets(logits, y, -100).nan is wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype) -> None:
    for V, N, D, K in ((1, 40, 1, 10), (3, 5, 4, 7), (2, 3, 1, 1)):
        p, u = _probabilities(N, D, K).to(dtype), torch.randn(V, N, K, D, dtype=dtype, device="cpu").mT
        mass = torch.randn(D, N, dtype=dtype, device="cpu").T
        found = small_batches.softmax_product(p, mass, u)
        assert found is not None
        hessian = mass[..., None, None] * (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))
        expected = (hessian.double() @ u.double().unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found.double(), expected, atol=10 * SLACK[dtype], rtol=0)
    assert small_batches.softmax_product(p, mass, u.half()) is None


def test_one_pass_and_operators_bind_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """All quantities of a loss bound with and without the helpers."""
    for shape in ((5, 4), (3, 4, 6), (2, 4, 2, 3)):
        u = torch.randn(shape, dtype=torch.float64, device="cpu")
        y = torch.randint(4, (shape[0], *shape[2:]), device="cpu")
        for ignored in (-100, 1):
            loss = losses.interpret(torch.nn.CrossEntropyLoss(ignore_index=ignored))
            results = []
            monkeypatch.undo()
            for few in (small_batches.FEW, -1):
                monkeypatch.setattr(small_batches, "FEW", few)
                if few < 0:
                    monkeypatch.setattr(softmax, "softmax_product", lambda *a: None)
                    monkeypatch.setattr(softmax, "softmax_columns", lambda *a: None)
                bound = loss.bind(u, y)
                s = torch.cat([s for s, _ in bound.columns()])
                product = bound.hessian_product(torch.ones(1, *shape, dtype=u.dtype, device="cpu"))
                results.append((bound.value(), bound.gradient(), s, product, bound.denominator))
            for ours, theirs in zip(*results):
                torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-13)


def test_a_transform_takes_operators_of_torch() -> None:
    p, mass = _probabilities(1, 4, 3), torch.ones(1, 4, dtype=torch.float64, device="cpu")
    seen = []

    def of(scale: Tensor) -> Tensor:
        seen.append(small_batches.softmax_columns(p * scale, mass, 0, 2))
        return scale

    torch.func.grad(of)(torch.ones((), dtype=torch.float64, device="cpu"))
    assert seen == [None]
    assert small_batches.softmax_columns(p.requires_grad_(), mass, 0, 2) is None
    assert small_batches.softmax_targets(p.half(), torch.zeros(1, 4, dtype=torch.long, device="cpu"), -100) is None
