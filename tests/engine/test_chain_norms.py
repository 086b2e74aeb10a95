"""Squared norms of gradients by a chain of dense layers, without the derivatives themselves, against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import chains, reference

from .test_matrices import close

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

dense_chain, dense_chain_norms = torch.ops.torch_curvature.dense_chain, torch.ops.torch_curvature.dense_chain_norms
DENSE, SLOPE, POSITIVE, KEEP = chains.DENSE, chains.SLOPE, chains.POSITIVE, chains.KEEP


@pytest.mark.parametrize("V", [1, 2, 7])
@pytest.mark.parametrize("N", [1, 31, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_the_derivatives(V: int, N: int, dtype: torch.dtype) -> None:
    for widths in ([5, 1], [3, 9, 4], [2, 17, 33, 40, 6], [1, 1, 1], [10, 64, 100], [4, 300]):
        x = torch.randn(V, N, widths[0], dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1)
        G = x.double()
        operands: list[Tensor] = []
        kinds = [KEEP]
        kept = [G]
        for i, (O, I) in enumerate(itertools.pairwise(widths)):
            weight = torch.randn(I, O, dtype=dtype).T if i % 2 else torch.randn(O, 2 * I, dtype=dtype)[:, ::2]
            other = torch.randn(N, I, dtype=dtype)
            operands += [weight, other]
            kinds += [DENSE, (SLOPE, POSITIVE)[i % 2], KEEP]
            G = G @ weight.double()
            G = G * (other.double() > 0 if i % 2 else other.double())
            kept.append(G)
        inputs = [torch.randn(N, 2 * w, dtype=dtype)[:, :w] for w in [*widths[1:], 0]]
        ones = [1, 0, 1, 0, 2][: len(kept)]
        found = dense_chain_norms(x, operands, kinds, inputs, ones)
        expected = torch.zeros(V, N)
        for g, a, b in zip(kept, inputs, ones, strict=True):
            expected += g.square().sum(2) * (a.double().square().sum(1) + b)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * float(expected.max()))
        for ours, theirs in zip(dense_chain(x, operands, kinds, False), kept, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * (1 + float(theirs.abs().max())))


def test_nothing() -> None:
    assert dense_chain_norms(torch.randn(2, 0, 4), [], [KEEP], [torch.randn(0, 3)], [1]).shape == (2, 0)
    assert torch.equal(dense_chain_norms(torch.randn(2, 5, 4), [], [], [], []), torch.zeros(2, 5))
    empty = dense_chain_norms(
        torch.randn(1, 3, 0), [torch.randn(0, 2)], [KEEP, DENSE, KEEP], [torch.ones(3, 1)] * 2, [1] * 2
    )
    assert torch.equal(empty, torch.zeros(1, 3))


class Free(nn.Module):
    """Weights that stand on the right of the product, and are used without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))
        self.v = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w).tanh() @ self.v


def _frozen(model: nn.Sequential, *names: str) -> nn.Sequential:
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)
    return model


def _perceptron(bias: bool = True, last: nn.Module | None = None) -> nn.Sequential:
    hidden = nn.Linear(5, 8, bias=bias), nn.ReLU(), nn.Linear(8, 7, bias=bias), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(7, 4, bias=bias), *([last] if last else []))


MODELS: dict[str, Any] = {
    "perceptron": _perceptron,
    "without biases": lambda: _perceptron(False),
    "a function at the end": lambda: _perceptron(last=nn.Softplus()),
    "one layer": lambda: nn.Sequential(nn.Linear(5, 4)),
    "a frozen weight": lambda: _frozen(_perceptron(), "2.weight"),
    "a frozen bias": lambda: _frozen(_perceptron(), "0.bias", "4.bias"),
    "a frozen first layer": lambda: _frozen(_perceptron(), "0.weight", "0.bias"),
    "products": Free,
}


def _weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """With curvature of either sign."""
    return (outputs * outputs * targets).sum()


LOSSES: dict[str, tuple[Any, Any]] = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda N: torch.randint(4, (N,))),
    "squared error": (nn.MSELoss(reduction="sum"), lambda N: torch.randn(N, 4)),
    "of both signs": (_weighted, lambda N: torch.randn(N, 4)),
}


def _samples_of_a_mean(loss: Any, data: tuple[Tensor, Tensor]) -> int:
    return len(data[0]) if getattr(loss, "reduction", "sum") == "mean" else 1


def _norms(model: nn.Module, loss: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """[N] squared norms of the gradients of single samples, not divided by their number."""
    shares = reference.per_sample_gradients(model, loss, data)
    return _samples_of_a_mean(loss, data) ** 2 * sum(share.flatten(1).square().sum(1) for share in shares.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("of", LOSSES)
def test_norms_and_traces(name: str, of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    way = chains.squared_norms
    monkeypatch.setattr(chains, "squared_norms", lambda *a: (found := way(*a), taken.append(found is not None))[0])
    model, (loss, targets), N = MODELS[name](), LOSSES[of], 37
    data = torch.randn(N, 5), targets(N)
    batches = [(data[0][:9], data[1][:9]), (data[0][9:], data[1][9:])]
    norms = _norms(model, loss, data)
    for given in (data, batches):
        for _ in range(2):
            close(tc.EmpiricalFisher(model, loss, given).gradient_norms(squared=True), norms)
            close(tc.EmpiricalFisher(model, loss, given).gradient_norms(), norms.sqrt())
            close(tc.GaussNewton(model, loss, given).trace(), reference.gauss_newton(model, loss, data).trace())
        close(tc.EmpiricalFisher(model, loss, given).trace(), norms.sum() / _samples_of_a_mean(loss, data))
        inputs = given[0] if given is data else [(x,) for x, _ in given]
        close(tc.Jacobian(model, inputs).frobenius_norm(), reference.jacobian(model, data[0]).square().sum().sqrt())
    assert taken
    assert all(taken)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.first(x).tanh()))


OTHERS: dict[str, Any] = {
    "a layer used twice": Twice,
    "several positions": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), nn.Flatten(), nn.Linear(15, 4)
    ),
    "a normalisation": lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)),
    "a scale": lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 4)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain(name: str) -> None:
    model, loss, data = OTHERS[name](), nn.CrossEntropyLoss(), (torch.randn(9, 5), torch.randint(4, (9,)))
    norms = _norms(model, loss, data)
    for _ in range(2):
        close(tc.EmpiricalFisher(model, loss, data).gradient_norms(squared=True), norms)
        close(tc.GaussNewton(model, loss, data).trace(), reference.gauss_newton(model, loss, data).trace())


def test_dtype_of_the_parameters() -> None:
    """As all results: that of the parameters with the most digits, although it is not that of the chain."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).float()
    model.register_parameter("apart", nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    data = torch.randn(5, 3, dtype=torch.float32), torch.randn(5, 2, dtype=torch.float32)
    assert tc.EmpiricalFisher(model, nn.MSELoss(), data).gradient_norms().dtype == torch.float64


@pytest.mark.parametrize(
    ("inputs", "ones", "message"),
    [
        ([], [], "2 inputs and numbers are needed"),
        ([(5, 3), (5, 2)], [1], "2 inputs and numbers are needed"),
        ([(5, 3), (6, 2)], [1, 1], r"must be \[N, I\]"),
        ([(5, 3), (5,)], [1, 1], r"must be \[N, I\]"),
    ],
)
def test_errors_of_the_helper(inputs: list[tuple[int, ...]], ones: list[int], message: str) -> None:
    x, weight = torch.randn(2, 5, 4), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=message):
        dense_chain_norms(x, [weight], [KEEP, DENSE, KEEP], [torch.randn(shape) for shape in inputs], ones)
    with pytest.raises(RuntimeError, match="an input has another dtype"):
        dense_chain_norms(x, [], [KEEP], [torch.randn(5, 3).float()], [1])
    with pytest.raises(RuntimeError, match="contiguous rows"):
        dense_chain_norms(x, [], [KEEP], [torch.randn(3, 5).T], [1])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        dense_chain_norms(x.half(), [], [KEEP], [torch.randn(5, 3).half()], [1])
