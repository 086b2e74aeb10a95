"""Second derivatives pushed through a chain in one call: against the general way and the reference, and when taken."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.test_chains import EVERY, LEFT
from tests.engine.test_matrices import close, part
from torch_curvature import chain_hessians, reference, second_order
from torch_curvature.chain_hessians import hessian_chain
from torch_curvature.matrices.activation_space import Contributions
from torch_curvature.second_nodes import Frontier, Pushed, whole
from torch_curvature.second_order import SecondOrder

dense_chain_hessians = torch.ops.torch_curvature.dense_chain_hessians
WIDTHS = [[5, 1], [3, 9, 4], [1, 1, 1, 2], [6, 33, 17, 2], [4, 8, 1, 32, 3], [16, 20, 40, 10]]


@pytest.fixture(autouse=True)
def on_the_cpu(on_the_device_under_test: None) -> Iterator[None]:
    """It is a helper of the CPU."""
    with torch.device("cpu"):
        yield


def chain(widths: list[int], N: int, bias: bool, frozen: int | None) -> tuple[Tensor, dict[int, Any], dict[int, Any]]:
    """Outputs, and the nodes of layers' outputs and inputs; one layer is none of them."""
    x, edges, inputs = torch.randn(N, widths[0]), {}, {}
    for k, (I, O) in enumerate(itertools.pairwise(widths)):
        if k != frozen and edges:
            inputs[10 + k] = x.grad_fn
        w, b = nn.Parameter(torch.randn(O, I) / I**0.5), nn.Parameter(torch.randn(O))
        z = F.linear(x, w, b if bias else None) if k % 2 else torch.addmm(b, x, nn.Parameter(w.detach().T.clone()))
        if k != frozen:
            edges[k] = z.grad_fn
        last = k == len(widths) - 2
        x = z if random.random() < (0.7 if last else 0.1) else random.choice(EVERY)(z)
    return x, edges, inputs


def same(ours: Pushed, theirs: Pushed, slack: float) -> None:
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert ours.hessians.keys() == theirs.hessians.keys()
    assert {use: found.keys() for use, found in ours.inputs.items()} == {
        use: found.keys() for use, found in theirs.inputs.items()
    }
    pairs = [(ours.gradients[e], theirs.gradients[e]) for e in theirs.gradients]
    pairs += [(ours.hessians[e], theirs.hessians[e]) for e in theirs.hessians]
    pairs += [(whole(ours.inputs[use][e]), d) for use, found in theirs.inputs.items() for e, d in found.items()]
    for a, b in pairs:
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= slack * (float(b.abs().max()) + 1e-30)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("N", [1, 15, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_general_way(dtype: torch.dtype, N: int, pairs: bool) -> None:
    random.seed(int(torch.randint(1 << 30, ())))
    torch.set_default_dtype(dtype)
    try:
        for widths in WIDTHS * 3:
            frozen = random.choice([None, None, *range(len(widths) - 1)]) if len(widths) > 2 else None
            outputs, edges, inputs = chain(widths, N, bool(N % 2), frozen)
            inputs = inputs if pairs else {}
            slope, start = torch.randn(N, outputs.shape[1]), torch.randn(outputs.shape[1], N, outputs.shape[1])
            start = start + start.permute(2, 1, 0)
            for given in (None, start):
                fast = hessian_chain(outputs, edges, inputs, pairs)
                assert fast is not None
                general = Frontier(outputs, edges, inputs, pairs)
                assert fast.cost() == general.cost()
                ours, theirs = fast.push(slope, given), general.push(slope, given)
                assert ours is not None
                assert theirs is not None
                same(ours, theirs, 1e-4 if dtype == torch.float32 else 1e-12)
                for (e, other), M in ours.hessians.items():
                    assert not M.requires_grad
                    assert e != other or torch.equal(M, M.mT)
    finally:
        torch.set_default_dtype(torch.float64)


def perceptron(widths: list[int], functions: list[Callable[[Tensor], Tensor]], bias: bool = True) -> nn.Module:
    class Applied(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    modules: list[nn.Module] = []
    for k, (I, O) in enumerate(itertools.pairwise(widths)):
        modules.append(nn.Linear(I, O, bias=bias))
        if k < len(functions):
            modules.append(Applied(functions[k]))
    return nn.Sequential(*modules)


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: perceptron([4, 3], []),
    "one layer and a function": lambda: perceptron([4, 3], [torch.tanh]),
    "tanh": lambda: perceptron([4, 7, 5, 3], [torch.tanh] * 2),
    "widths of one": lambda: perceptron([1, 1, 6, 3], [torch.tanh, F.gelu]),
    "ReLU": lambda: perceptron([4, 7, 17, 3], [torch.relu, torch.relu_]),
    "sigmoid and GELU": lambda: perceptron([4, 18, 5, 6, 3], [torch.sigmoid, F.gelu, torch.tanh]),
    "no function between": lambda: perceptron([4, 6, 5, 3], [lambda x: x, torch.tanh]),
    "no bias": lambda: perceptron([4, 7, 5, 3], [F.silu, torch.tanh], bias=False),
    "frozen in the middle": lambda: frozen(perceptron([4, 6, 5, 3], [torch.tanh] * 2), "2.weight", "2.bias"),
    "frozen first and last": lambda: frozen(perceptron([4, 6, 5, 3], [torch.tanh] * 2), "0.weight", "0.bias", "4.bias"),
    "wide": lambda: perceptron([5, 33, 18, 3], [torch.tanh] * 2),
}
LOSSES: dict[str, tuple[Any, Callable[[int, int], Tensor]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda N, C: torch.randint(C, (N,))),
    "squares": (nn.MSELoss(), lambda N, C: torch.randn(N, C)),
    "a function": (lambda u, y: (torch.sin(u) * y).sum() + (u[:, 0] ** 2 * u[:, 1]).sum(), torch.randn),
}


def no_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Frontier, "__init__", lambda *args: pytest.fail("the general way was taken"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_against_the_reference(name: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken, proved on the first batch, and the next one does without a second-order pass."""
    no_frontier(monkeypatch)
    model, (function, targets) = MODELS[name](), LOSSES[loss]
    I, C = model[0].weight.shape[1], [m for m in model if isinstance(m, nn.Linear)][-1].weight.shape[0]
    for attempt, N in enumerate((19, 19, 1)):
        if attempt == 1:
            with monkeypatch.context() as patch:
                patch.setattr(SecondOrder, "hessians", lambda *args: pytest.fail("a second-order pass was made"))
                check(model, function, (torch.randn(N, I), targets(N, C)))
        else:
            check(model, function, (torch.randn(N, I), targets(N, C)))


def check(model: nn.Module, loss: Any, data: tuple[Tensor, Tensor]) -> None:
    whole = reference.hessian(model, loss, data)
    for ours, truth in ((tc.Hessian, whole), (tc.Residual, reference.residual(model, loss, data))):
        matrix = ours(model, loss, data)
        dense = matrix.dense()
        close(dense, truth, whole)
        assert torch.equal(dense, dense.T)
        for parameter, block in matrix.blocks().items():
            close(block, part(truth, model, [parameter]), whole)
            assert torch.equal(block, block.T)
        close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal(), whole)
        assert not matrix._distrusted


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    no_frontier(monkeypatch)
    model, data = MODELS["wide"](), (torch.randn(77, 5), torch.randint(3, (77,)))
    truth = reference.hessian(model, nn.CrossEntropyLoss(), data)
    for _ in range(2):
        found = tc.Hessian(model.float(), nn.CrossEntropyLoss(), (data[0].float(), data[1]))
        dense, blocks = found.dense(), found.blocks()
        assert dense.dtype == torch.float32
        assert (dense.double() - truth).norm() <= 1e-5 * truth.norm()
        for name, block in blocks.items():
            assert (block.double() - part(truth, model, [name])).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("wrong", range(9))
def test_what_passes_contradict_is_not_used(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the helper's results in turn is wrong, and has another shape."""
    helper, used = chain_hessians._hessians, []

    def spoilt(*args: Any) -> list[Tensor]:
        found = helper(*args)
        used.append(len(found))
        if wrong < len(found):
            found[wrong] = found[wrong] * 1.01
        return found

    monkeypatch.setattr(chain_hessians, "_hessians", spoilt)
    model, loss = MODELS["tanh"](), nn.CrossEntropyLoss()
    for _ in range(2):
        data = (torch.randn(19, 4), torch.randint(3, (19,)))
        truth = reference.hessian(model, loss, data)
        matrix = tc.Hessian(model, loss, data)
        close(matrix.dense(), truth)
        for name, block in matrix.blocks().items():
            close(block, part(truth, model, [name]), truth)
        close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal())
        assert not matrix._distrusted
    assert max(used) > wrong


@pytest.mark.parametrize("loss", ["cross entropy", "squares"])
def test_an_exchanged_function_is_compared_again(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    original = SecondOrder._agrees

    def counted(self: SecondOrder, *args: Any) -> bool:
        compared.append(args)
        return original(self, *args)

    monkeypatch.setattr(SecondOrder, "_agrees", counted)
    model, (function, targets) = perceptron([4, 5, 5, 3], [torch.tanh, F.silu]), LOSSES[loss]
    tc.Hessian(model, function, (torch.randn(6, 4), targets(6, 3))).dense()
    model[1], model[3] = model[3], model[1]
    for again in (True, False):
        compared.clear()
        data = (torch.randn(6, 4), targets(6, 3))
        close(tc.Hessian(model, function, data).dense(), reference.hessian(model, function, data))
        assert bool(compared) is again


@pytest.mark.parametrize("name", [name for name in LEFT if name not in ("three axes", "another dtype")])
def test_what_is_no_chain(name: str) -> None:
    z = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)))
    outputs = LEFT[name](z, nn.Parameter(torch.randn(4, 4)))
    assert hessian_chain(outputs, {0: z.grad_fn}, {}, True) is None


def test_edges_and_inputs_off_the_chain() -> None:
    z = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    other = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    h = z.relu()
    assert hessian_chain(h, {0: z.grad_fn}, {}, True) is not None
    assert hessian_chain(h, {0: z.grad_fn, 1: other.grad_fn}, {}, True) is None
    assert hessian_chain(h, {0: z.grad_fn, 1: z.grad_fn}, {}, True) is None
    assert hessian_chain(h, {0: h.grad_fn}, {}, True) is not None
    assert hessian_chain(h, {0: h.grad_fn, 1: z.grad_fn}, {}, True) is None  # a function is no layer
    u = F.linear(h, nn.Parameter(torch.randn(3, 4)))
    edges = {0: z.grad_fn, 1: u.grad_fn}
    assert hessian_chain(u, edges, {2: h.grad_fn}, True) is not None
    assert hessian_chain(u, edges, {2: z.grad_fn}, True) is None


def test_what_autograd_no_longer_has() -> None:
    """A result that was changed in place after it was saved."""
    z = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))
    h = z.tanh()
    with torch.no_grad():
        h.add_(1)
    assert hessian_chain(h, {0: z.grad_fn}, {}, True) is None


def test_transforms_are_left_to_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_order, "hessian_chain", hessian_chain)
    z = F.linear(torch.randn(6, 4), nn.Parameter(torch.randn(4, 4)))

    def inside(x: Tensor) -> Tensor:
        assert hessian_chain(z, {0: z.grad_fn}, {}, True) is None
        return x

    torch.func.vmap(inside)(torch.randn(3))


@pytest.mark.parametrize(
    ("operands", "kinds", "pairs", "message"),
    [
        ([(3, 2)], [0], True, "does not fit"),
        ([(4, 2), (5, 3)], [0, 1], True, "does not fit"),
        ([(5, 4), (5, 3)], [7], True, "does not fit"),
        ([(5, 4)], [7], True, "fewer operands"),
        ([(4, 2)], [3], True, "more operands"),
        ([], [8], True, "no step is of kind 8"),
        ([(5, 4)], [3, 5], True, "followed by the layer"),
        ([], [4], True, "must follow the layer"),
        ([(4, 2)], [0, 4], False, "must follow the layer"),
    ],
)
def test_errors_of_the_helper(operands: list[tuple[int, int]], kinds: list[int], pairs: bool, message: str) -> None:
    given = [torch.randn(shape) for shape in operands]
    with pytest.raises(RuntimeError, match=message):
        dense_chain_hessians(torch.randn(5, 4), None, given, kinds, pairs)


def test_shapes_and_dtypes_of_the_helper() -> None:
    slope = torch.randn(5, 4)
    for start in (torch.randn(4, 5, 3), torch.randn(5, 4, 4), torch.randn(4, 5, 4).float()):
        with pytest.raises(RuntimeError, match="'start' must be"):
            dense_chain_hessians(slope, start, [], [3], True)
    with pytest.raises(RuntimeError, match="another dtype"):
        dense_chain_hessians(slope, None, [torch.randn(4, 4).float()], [0], True)
    with pytest.raises(RuntimeError, match="must be \\[N, F\\]"):
        dense_chain_hessians(slope[0], None, [], [3], True)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        dense_chain_hessians(slope.half(), None, [], [3], True)
    assert [list(t.shape) for t in dense_chain_hessians(torch.randn(0, 4), None, [], [3], True)] == [[0, 4]]


def test_diagonal_derivatives_of_inputs_use_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers do not go straight into their places, as for parameters of several dtypes."""
    monkeypatch.setattr(Contributions, "_layers", lambda self, group, at: {})
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3))
    data, loss = (torch.randn(7, 4), torch.randint(3, (7,))), nn.CrossEntropyLoss()
    found, expected = tc.Hessian(model, loss, data).dense(), tc.reference.hessian(model, loss, data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
