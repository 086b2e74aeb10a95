"""``J v`` and ``J^T u`` of a chain in one call each, against autograd's own derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import chain_products, chains, nodes, reference
from torch_curvature.chain_products import product_chain

from .test_chains import EVERY
from .test_matrices import close

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

ahead, back = torch.ops.torch_curvature.dense_chain_ahead, torch.ops.torch_curvature.dense_chain_back


class Perceptron(nn.Module):
    """Weights stored either way, with and without biases, functions at random."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterDict()
        self.functions = [EVERY[int(i)] for i in torch.randint(len(EVERY), (len(widths),))]
        for i, (I, O) in enumerate(itertools.pairwise(widths)):
            self.weights.append(nn.Parameter(torch.randn((I, O) if i % 2 else (O, I)) / I**0.5))
            if i != 2:
                self.biases[str(i)] = nn.Parameter(torch.randn(O))

    def forward(self, x: Tensor) -> Tensor:
        for i, w in enumerate(self.weights):
            b = self.biases[str(i)] if i != 2 else None
            if not i % 2:
                x = F.linear(x, w, b)
            else:
                x = x @ w if b is None else torch.addmm(b, x, w)
            if i + 1 < len(self.weights) or len(self.weights) == 2:
                x = self.functions[i](x)
        return x


def compare(outputs: Tensor, parameters: dict[str, nn.Parameter], slack: float = 1e-10) -> None:
    chain = product_chain(outputs, parameters)
    assert chain is not None
    u = torch.randn_like(outputs)
    truth = torch.autograd.grad(outputs, list(parameters.values()), u, retain_graph=True, allow_unused=True)
    ours = chain.back(u)
    for p, theirs in zip(parameters.values(), truth, strict=True):
        assert (id(p) in ours) == (theirs is not None)
        if theirs is not None:
            assert ours[id(p)].shape == p.shape
            assert not ours[id(p)].requires_grad
            assert float((ours[id(p)] - theirs).norm()) <= slack * float(theirs.norm()) + 1e-30
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    found = chain.ahead({id(p): tangents[name] for name, p in parameters.items()})
    expected = nodes.push_forward(outputs, parameters, tangents)
    assert expected is not None
    assert not found.requires_grad
    assert float((found - expected).norm()) <= slack * float(expected.norm())
    forward = sum((g * tangents[n]).sum() for n, g in zip(parameters, truth, strict=True) if g is not None)
    assert float(((found * u).sum() - forward).abs()) <= 1e3 * slack * float(found.norm() * u.norm())


@pytest.mark.parametrize("N", [1, 31, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perceptrons(N: int, dtype: torch.dtype) -> None:
    for widths in ([5, 1], [3, 9, 4], [6, 40, 33, 17, 2], [1, 1, 1], [64, 64, 32, 10], [7, 130, 3]):
        model = Perceptron(widths).to(dtype)
        parameters = dict(model.named_parameters())
        slack = 1e-4 if dtype == torch.float32 else 1e-12
        x = torch.randn(N, widths[0], dtype=dtype)
        compare(model(x), parameters, slack)
        compare(model(x.requires_grad_()), parameters, slack)
        compare(model(torch.randn(widths[0], N, dtype=dtype).T), parameters, slack)
        for frozen in parameters:  # each parameter alone, and all but one
            compare(model(x), {frozen: parameters[frozen]}, slack)
            parameters[frozen].requires_grad_(False)
            rest = {n: p for n, p in parameters.items() if n != frozen}
            if rest:
                compare(model(x.detach()), rest, slack)
            parameters[frozen].requires_grad_(True)


def test_a_parameter_that_is_not_used() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    compare(model(torch.randn(5, 3)), dict(model.named_parameters()) | {"unused": nn.Parameter(torch.ones(3))})


LEFT: dict[str, Callable[[Tensor, nn.Parameter, nn.Parameter], Tensor]] = {
    "a parameter used twice": lambda z, w, b: (z @ w).tanh() @ w,
    "a sum": lambda z, w, b: z @ w + z,
    "a bias added by itself": lambda z, w, b: z @ w + b,
    "scales": lambda z, w, b: torch.addmm(b, z, w, alpha=2.0),
    "a scaled bias": lambda z, w, b: torch.addmm(b, z, w, beta=2.0),
    "a weight that is computed": lambda z, w, b: z @ w.tanh(),
    "a bias that is broadcast": lambda z, w, b: torch.addmm(nn.Parameter(b.detach()[:1]), z, w),
    "softmax": lambda z, w, b: (z @ w).softmax(1),
    "a large layer": lambda z, w, b: z @ nn.Parameter(torch.ones(4, chains.MOST_WEIGHTS // 4 + 1)),
    "three axes": lambda z, w, b: z.view(2, -1, 4) @ w,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_chain(name: str) -> None:
    w, b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    outputs = LEFT[name](F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4))), w, b)
    every = {
        str(i): node.variable for i, node in enumerate(nodes.known_graph(outputs) or []) if node.name() == nodes.LEAF
    }
    assert product_chain(outputs, {"w": w, "b": b} | every) is None


def test_nothing_of_the_parameters() -> None:
    outputs = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    assert product_chain(outputs, {"other": nn.Parameter(torch.ones(3))}) is None


@pytest.mark.parametrize(
    ("operands", "kinds", "message"),
    [
        ([(5, 3), (2, 4)], [8], "does not fit"),
        ([(6, 3), (3, 4)], [8], "does not fit"),
        ([(5, 3), (3, 4), (3,)], [24], "does not fit"),
        ([(5, 3)], [8], "fewer operands"),
        ([(5, 3), (3, 4), (4, 4)], [8], "more operands"),
        ([(5, 3), (3, 4)], [8, 3], "no step is of kind 3"),
        ([(5, 3), (3, 4)], [8, 0], "without operands"),
    ],
)
def test_errors_ahead(operands: list[tuple[int, ...]], kinds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ahead([torch.randn(shape) for shape in operands], kinds, 5)


@pytest.mark.parametrize(
    ("operands", "kinds", "message"),
    [
        ([(3, 2)], [4], "does not fit"),
        ([(4, 2), (5, 3)], [12], "does not fit"),
        ([(6, 3)], [8], "does not fit"),
        ([], [4], "fewer operands"),
        ([(5, 3), (5, 3)], [8], "more operands"),
        ([(5, 3), (4, 3)], [8, 4], "only the last"),
        ([(5, 4)], [3], "no step is of kind 3"),
    ],
)
def test_errors_back(operands: list[tuple[int, ...]], kinds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        back(torch.randn(5, 4), [torch.randn(shape) for shape in operands], kinds)
    with pytest.raises(RuntimeError, match="another dtype"):
        back(torch.randn(5, 4), [torch.randn(5, 4).float()], [1])


def test_products_are_by_the_chain_and_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is wrong is not used: backwards it differs from autograd, ahead the two do not fit each other."""
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
    data = torch.randn(40, 6), torch.randint(4, (40,))
    truth = reference.gauss_newton(model, nn.CrossEntropyLoss(), data)
    jacobian = reference.jacobian(model, data[0]).flatten(0, 1)
    v, u = torch.randn(len(truth)), torch.randn(40, 4)
    calls = []
    real_ahead, real_back = chain_products._ahead, chain_products._back

    def check() -> None:
        close(tc.GaussNewton(model, nn.CrossEntropyLoss(), data) @ v, truth @ v)
        close((tc.Jacobian(model, data[0]) @ v).flatten(), jacobian @ v)
        close(tc.Jacobian(model, data[0]).transposed_product(u), jacobian.T @ u.flatten())

    monkeypatch.setattr(chain_products, "_ahead", lambda *a: (calls.append("ahead"), real_ahead(*a))[1])
    monkeypatch.setattr(chain_products, "_back", lambda *a: (calls.append("back"), real_back(*a))[1])
    check()
    check()
    assert calls.count("ahead") == 4
    assert calls.count("back") >= 4
    monkeypatch.setattr(chain_products, "_ahead", lambda *a: 1.01 * real_ahead(*a))
    check()
    monkeypatch.setattr(chain_products, "_ahead", real_ahead)
    monkeypatch.setattr(chain_products, "_back", lambda *a: [1.01 * x for x in real_back(*a)])
    model = nn.Sequential(*model)
    check()
