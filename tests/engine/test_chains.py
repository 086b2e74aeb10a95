"""Columns through a chain of dense layers and elementwise functions in one call, against autograd's own passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import torch_curvature as tc
from torch_curvature import backprop, chains, nodes, reference

from .test_matrices import close

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

dense_chain = torch.ops.torch_curvature.dense_chain
LARGE = chains.MOST_WEIGHTS // 4 + 1  # more weights than a chain has, in a layer of four outputs
EVERY: list[Callable[[Tensor], Tensor]] = [
    *(torch.relu, torch.tanh, torch.sigmoid, F.gelu, F.silu, F.elu, F.softplus, F.hardtanh, F.hardswish, F.mish),
    *(F.logsigmoid, torch.sin, torch.cos, torch.exp),
]


class Sum(nn.Module):
    """x + f(x)."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def perceptron(widths: list[int], functions: list[Any], N: int, bias: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and those of each layer: weights stored either way, functions in place too."""
    x, layers = torch.randn(N, widths[0]), []
    for i, (I, O) in enumerate(itertools.pairwise(widths)):
        w, b = nn.Parameter(torch.randn(O, I) / I**0.5), nn.Parameter(torch.randn(O))
        if i % 2:
            x = torch.addmm(b, x, nn.Parameter(w.detach().T.clone()), beta=0.5)
        else:
            x = F.linear(x, w, b if bias else None)
        layers.append(x)
        if i < len(functions):
            x = functions[i](x)
    return x, layers


@pytest.mark.parametrize("V", [1, 2, 9])
@pytest.mark.parametrize("N", [1, 31, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perceptrons(V: int, N: int, dtype: torch.dtype) -> None:
    for widths in ([5, 1], [3, 9, 4], [6, 40, 33, 17, 2], [1, 1, 1], [64, 64, 32, 10]):
        functions = [EVERY[int(i)] for i in torch.randint(len(EVERY), (len(widths) - 1,), device="cpu")]
        torch.set_default_dtype(dtype)
        try:
            outputs, layers = perceptron(widths, functions, N, bias=bool(N % 2))
            columns = torch.randn(V, *outputs.shape).transpose(0, 1).contiguous().transpose(0, 1)
        finally:
            torch.set_default_dtype(torch.float64)
        edges = [get_gradient_edge(z) for z in reversed(layers[1:] + layers[:1])]
        truth = torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, retain_graph=True)
        found = chains.pull_back(outputs, edges, columns)
        roots = chains.pull_back(outputs, edges, columns, True)
        assert found is not None
        assert roots is not None
        slack = 1e-5 if dtype == torch.float32 else 1e-13
        for ours, root, theirs in zip(found, roots, truth, strict=True):
            size = float(theirs.abs().max()) + 1e-30
            assert ours.shape == theirs.shape
            assert not ours.requires_grad
            assert float((ours - theirs).abs().max()) <= slack * size
            expected = theirs.square().sum(0, keepdim=True).sqrt()
            assert float((root - expected).abs().max()) <= slack * size * V


def test_every_elementwise_kind() -> None:
    seen = set()
    for function in [*EVERY, torch.relu_, torch.tanh_, lambda x: F.leaky_relu(x, 0.3)]:
        outputs, layers = perceptron([3, 5, 4], [function, function], 6)
        seen |= {node.name() for node in nodes.known_graph(outputs) or []}
        edges, columns = [get_gradient_edge(z) for z in layers], torch.randn(3, 6, 4)
        truth = torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, retain_graph=True)
        for ours, theirs in zip(chains.pull_back(outputs, edges, columns) or [], truth, strict=True):
            close(ours, theirs)
    assert nodes.IN_PLACE.keys() <= seen


def _residual(z: Tensor, w: Tensor) -> Tensor:
    return z.relu() + z


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a sum": _residual,
    "a scaled product": lambda z, w: torch.addmm(torch.zeros(4), z, w, alpha=2.0),
    "a weight that is computed": lambda z, w: z @ w.tanh(),
    "a bias that is computed": lambda z, w: torch.addmm(w[0].tanh(), z, w),
    "a weight that depends on the layer": lambda z, w: z @ (z.T @ z),
    "a view": lambda z, w: z.view(2, -1, 4).view(-1, 4),
    "three axes": lambda z, w: z.view(2, -1, 4) @ w,
    "softmax": lambda z, w: z.softmax(1),
    "another dtype": lambda z, w: z.float(),
    "a hidden layer of large weights": lambda z, w: z @ torch.ones(4, LARGE) @ torch.ones(LARGE, 4),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_chain(name: str) -> None:
    w, x = nn.Parameter(torch.randn(4, 4)), torch.randn(6, 4)
    z = F.linear(x, nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)))
    outputs = LEFT[name](z, w)
    columns = torch.randn(2, *outputs.shape).to(outputs)
    assert chains.pull_back(outputs, [get_gradient_edge(z)], columns) is None


def test_what_was_no_chain_is_not_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    search, calls = chains.chain_between, []
    monkeypatch.setattr(chains, "chain_between", lambda *a: (calls.append(a), search(*a))[1])
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    residual = nn.Sequential(nn.Linear(3, 4), Sum(block), nn.Linear(4, 2))
    data, loss = (torch.randn(6, 3), torch.randn(6, 2)), nn.MSELoss()
    truth = reference.gauss_newton(residual, loss, data)
    for expected in (1, 0, 0):
        calls.clear()
        diagonal = tc.GaussNewton(residual, loss, data).diagonal()
        close(torch.cat([d.flatten() for d in diagonal.values()]), truth.diagonal())
        assert len(calls) == expected


@pytest.mark.parametrize("wrong", [None, "chain", "nodes"])
def test_one_column_goes_node_by_node_where_several_go_by_a_chain(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways are compared with autograd's before one is taken."""
    monkeypatch.setattr(chains, "FEW_WEIGHTS", 0)
    taken: list[str] = []
    for place, name, way in ((chains, "chain", chains.pull_back), (backprop, "nodes", backprop.pull_back)):

        def counted(*args: Any, name: str = name, way: Any = way) -> Any:
            found = way(*args)
            if found is not None:
                taken.append(name)
                found = [2 * part for part in found] if name == wrong else found
            return found

        monkeypatch.setattr(place, "pull_back", counted)
    model, loss = (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)),
        nn.CrossEntropyLoss(),
    )
    data = torch.randn(9, 5), torch.randint(4, (9,))
    for _ in range(2):
        taken.clear()
        gram = tc.EmpiricalFisher(model, loss, data).gram()
        close(gram.trace(), reference.empirical_fisher(model, loss, data).trace())
        assert taken[-1:] == (["nodes"] if wrong is None else taken[-1:])
        diagonal = tc.GaussNewton(model, loss, data).diagonal()
        close(torch.cat([d.flatten() for d in diagonal.values()]), reference.gauss_newton(model, loss, data).diagonal())
    assert taken == (["nodes", "chain"] if wrong is None else [])


def test_edges_off_the_chain() -> None:
    z = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    other = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    edges = [get_gradient_edge(z), get_gradient_edge(other)]
    assert chains.pull_back(z.relu(), edges, torch.randn(2, 6, 4)) is None
    assert chains.pull_back(z.relu(), edges[:1] * 2, torch.randn(2, 6, 4)) is None
    assert chains.pull_back(z.relu(), [], torch.randn(2, 6, 4)) is None


def test_relu_passes_on_what_torch_passes_on() -> None:
    """A derivative at zero is zero, and one where the result is NaN is kept."""
    z = F.linear(torch.tensor([[0.0], [1.0], [-1.0], [float("nan")]]), nn.Parameter(torch.ones(1, 1)))
    outputs, columns = z.relu(), torch.full((2, 4, 1), 3.0)
    columns[1] = float("nan")
    (ours,) = chains.pull_back(outputs, [get_gradient_edge(z)], columns) or ()
    (theirs,) = torch.autograd.grad(outputs, z, columns, is_grads_batched=True)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("operands", "kinds", "message"),
    [
        ([(3, 2)], [0], "does not fit"),
        ([(4, 2), (5, 3)], [0, 1], "does not fit"),
        ([], [2], "fewer operands"),
        ([(4, 2)], [3], "more operands"),
        ([(4, 2)], [7], "no step is of kind 7"),
    ],
)
def test_errors_of_the_helper(operands: list[tuple[int, int]], kinds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dense_chain(torch.randn(2, 5, 4), [torch.randn(shape) for shape in operands], kinds, False)
    with pytest.raises(RuntimeError, match="another dtype"):
        dense_chain(torch.randn(2, 5, 4), [torch.randn(4, 4).float()], [0], False)


def test_sums_of_squares_take_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagonal and trace by one column for all, of one batch and of several; not where columns have signs."""
    taken = []
    pull_back = chains.pull_back

    def counted(*args: Any) -> Any:
        found = pull_back(*args)
        taken.append(args[3] and found is not None)
        return found

    monkeypatch.setattr(chains, "pull_back", counted)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4))
    x, y = torch.randn(40, 6), torch.randint(4, (40,))
    y[3] = -100
    for loss, targets in ((nn.CrossEntropyLoss(), y), (nn.MSELoss(), torch.randn(40, 4))):
        for data in ((x, targets), [(x[:9], targets[:9]), (x[9:], targets[9:])]):
            truth = reference.gauss_newton(model, loss, (x, targets))
            for _ in range(2):
                taken.clear()
                found = tc.GaussNewton(model, loss, data).diagonal()
                close(torch.cat([part.flatten() for part in found.values()]), truth.diagonal())
                close(tc.GaussNewton(model, loss, data).trace(), truth.trace())
            assert all(taken)

    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).square().sum()

    taken.clear()
    found = tc.GaussNewton(model, concave, (x, torch.zeros(40, 4))).diagonal()
    truth = reference.gauss_newton(model, concave, (x, torch.zeros(40, 4)))
    close(torch.cat([part.flatten() for part in found.values()]), truth.diagonal())
    assert not any(taken)


def test_layers_of_several_positions_keep_their_columns() -> None:
    """A layer that is used twice, and one that is applied to rows of a sample: cross terms must not be lost."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))

    model, data = Twice(), (torch.randn(8, 4), torch.randint(3, (8,)))
    truth = reference.gauss_newton(model, nn.CrossEntropyLoss(), data).diagonal()
    for _ in range(3):
        found = tc.GaussNewton(model, nn.CrossEntropyLoss(), data).diagonal()
        close(torch.cat([part.flatten() for part in found.values()]), truth)
