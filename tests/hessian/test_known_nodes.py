"""Second derivatives pushed through known nodes: against the reference, and that passes are taken only where needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_curvature as tc
from tests.engine.models import Function
from tests.engine.test_matrices import close, part
from torch_curvature import reference, second_order
from torch_curvature.plan import Plan
from torch_curvature.second_nodes import ELEMENTWISE, Frontier
from torch_curvature.second_order import SecondOrder

LOSS = nn.CrossEntropyLoss()
FUNCTIONS = {
    "Relu": F.relu,
    "LeakyRelu": lambda x: F.leaky_relu(x, 0.2),
    "Hardtanh": F.hardtanh,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Gelu": F.gelu,
    "Gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "Silu": F.silu,
    "Elu": lambda x: F.elu(x, 1.3),
    "Softplus": F.softplus,
    "Hardswish": F.hardswish,
    "Mish": F.mish,
    "LogSigmoid": F.logsigmoid,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Exp": torch.exp,
}


@pytest.fixture(autouse=True)
def no_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains go through a helper of the CPU otherwise."""
    monkeypatch.setattr(second_order, "hessian_chain", lambda *args: None)


def layers(*widths: int) -> list[nn.Linear]:
    return [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]


def sequential(*functions: Callable[[Tensor], Tensor], bias: bool = True) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer, function in zip(m.all, functions):
            x = function(layer(x))
        return m.last(x)

    inner = nn.ModuleList([nn.Linear(4 + (k > 0), 5, bias=bias) for k in range(len(functions))])
    return Function(forward, all=inner, last=nn.Linear(5, 3))


def residual(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    u = h + torch.sigmoid(m.b(h))
    v = u + m.c(torch.tanh(u)) + m.d(h)
    return m.e(torch.add(v, F.silu(v), alpha=0.7))


def twice(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.e(m.b(torch.tanh(m.b(h))) + h + h)


def positions(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x.view(-1, 2, 2)))
    return m.e(torch.sigmoid(m.b(h)).reshape(len(x), -1))


KNOWN: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda f=f: sequential(f, torch.tanh, f)) for name, f in FUNCTIONS.items()},
    "no function between": lambda: sequential(lambda x: x, torch.tanh, lambda x: x),
    "no bias": lambda: sequential(torch.tanh, torch.sigmoid, bias=False),
    "in place": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
    "ends in a function": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()),
    "residual": lambda: Function(residual, **dict(zip("abcde", layers(4, 5, 5, 5, 5, 3)))),
    "used twice": lambda: Function(twice, a=nn.Linear(4, 5), b=nn.Linear(5, 5), e=nn.Linear(5, 3)),
    "frozen in the middle": lambda: frozen(sequential(torch.tanh, torch.sigmoid, torch.tanh)),
}
UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "product": lambda: Function(
        lambda m, x: m.e(m.a(x) * torch.tanh(m.b(x))), a=nn.Linear(4, 5), b=nn.Linear(4, 5), e=nn.Linear(5, 3)
    ),
    "power": lambda: sequential(lambda x: x**3, torch.tanh),
    "normalised": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
    "softmax": lambda: sequential(lambda x: x.softmax(-1), torch.tanh),
    "broadcast": lambda: sequential(lambda x: x + torch.tanh(x[:, :1]), torch.tanh),
    "transposed": lambda: sequential(lambda x: torch.tanh(x.T).T, torch.tanh),
    "weights from activations": lambda: Function(
        lambda m, x: m.e(x @ m.a.weight.cumsum(0).T + torch.tanh(m.a(x))), a=nn.Linear(4, 5), e=nn.Linear(5, 3)
    ),
}


def frozen(model: nn.Module) -> nn.Module:
    for p in model.all[1].parameters():
        p.requires_grad_(False)
    return model


def batch(N: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randint(0, 3, (N,))


def no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        pytest.fail("a second-order pass was made")

    monkeypatch.setattr(SecondOrder, "hessians", refuse)
    monkeypatch.setattr(SecondOrder, "pull", refuse)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = SecondOrder.hessians

    def hessians(self: SecondOrder, edge: int, *args: Any) -> Any:
        made.append(edge)
        return original(self, edge, *args)

    monkeypatch.setattr(SecondOrder, "hessians", hessians)
    return made


@pytest.mark.parametrize("kind", ["hessian", "residual"])
@pytest.mark.parametrize("name", KNOWN)
def test_known_graphs_need_no_second_order_pass(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch is compared with passes; the next, of other values, does without."""
    ours, theirs = {"hessian": (tc.Hessian, reference.hessian), "residual": (tc.Residual, reference.residual)}[kind]
    model = KNOWN[name]()
    for attempt in range(2):
        if attempt:
            no_passes(monkeypatch)
        data = batch()
        truth, whole = theirs(model, LOSS, data), reference.hessian(model, LOSS, data)
        matrix = ours(model, LOSS, data)
        dense = matrix.dense()
        close(dense, truth, whole)
        assert torch.equal(dense, dense.T)
        if name != "used twice":  # whose diagonal blocks are sums over pairs of uses
            for parameter, block in matrix.blocks().items():
                close(block, part(truth, model, [parameter]), whole)
                assert torch.equal(block, block.T)
            for module, block in matrix.blocks("module").items():
                members = [n for n in reference.parameters(model) if n.rpartition(".")[0] == module]
                close(block, part(truth, model, members), whole)
            close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal(), whole)
        assert not matrix._distrusted


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_graphs_take_second_order_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UNKNOWN[name]()
    tc.Hessian(model, LOSS, batch()).dense()
    made = counted(monkeypatch)
    data = batch()
    truth = reference.hessian(model, LOSS, data)
    close(tc.Hessian(model, LOSS, data).dense(), truth)
    close(tc.Residual(model, LOSS, data).dense(), reference.residual(model, LOSS, data), truth)
    assert made


def test_several_positions_come_out_right_either_way() -> None:
    model = Function(positions, a=nn.Linear(2, 3), b=nn.Linear(3, 2), e=nn.Linear(4, 3))
    for _ in range(2):
        data = batch(9)
        close(tc.Hessian(model, LOSS, data).dense(), reference.hessian(model, LOSS, data))


@pytest.mark.parametrize("wrong", ["second derivative", "first derivative"])
def test_what_passes_contradict_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = sequential(torch.tanh, torch.sigmoid), batch()
    if wrong == "second derivative":
        monkeypatch.setitem(ELEMENTWISE, "TanhBackward0", lambda node, c, moved: moved * node._saved_result)
    else:
        original = Frontier._times
        monkeypatch.setattr(Frontier, "_times", lambda self, value, f: original(self, value, f * 1.01))
    for _ in range(2):
        truth = reference.hessian(model, LOSS, data)
        matrix = tc.Hessian(model, LOSS, data)
        close(matrix.dense(), truth)
        for name, block in matrix.blocks().items():
            close(block, part(truth, model, [name]), truth)
        assert not matrix._distrusted


def test_an_exchanged_function_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)), batch()
    tc.Hessian(model, LOSS, data).dense()
    model[1], model[3] = model[3], model[1]
    made = counted(monkeypatch)
    close(tc.Hessian(model, LOSS, data).dense(), reference.hessian(model, LOSS, data))
    assert made


def test_a_perfect_fit_is_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss has no slope nothing is shown of the second derivatives of functions."""
    model, (x, _) = sequential(torch.tanh, torch.sigmoid), batch()
    loss = nn.MSELoss()
    tc.Hessian(model, loss, (x, model(x).detach())).dense()
    made = counted(monkeypatch)
    data = (x, torch.randn(6, 3))
    close(tc.Hessian(model, loss, data).dense(), reference.hessian(model, loss, data))
    assert made


def test_hooks_are_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        h.register_hook(lambda g: 2 * g)
        return m.e(h)

    model = Function(forward, a=nn.Linear(4, 5), e=nn.Linear(5, 3))
    tc.Hessian(model, LOSS, batch(), check_symmetry=False).blocks()
    made = counted(monkeypatch)
    tc.Hessian(model, LOSS, batch(), check_symmetry=False).blocks()
    assert made


def test_many_outputs_are_left_to_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second derivatives by 300 outputs cost more than a pass for each of six numbers."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 300))
    for p in model[2].parameters():
        p.requires_grad_(False)
    for _ in range(2):
        data = (torch.randn(6, 4), torch.randint(0, 300, (6,)))
        made = counted(monkeypatch)
        close(tc.Hessian(model, LOSS, data).dense(), reference.hessian(model, LOSS, data))
    assert made


def test_a_small_budget_takes_passes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    data = (torch.randn(40, 4), torch.randint(0, 3, (40,)))
    truth = reference.hessian(model, LOSS, data)
    pushed: list[Any] = []
    monkeypatch.setattr(Frontier, "push", lambda *args: pushed.append(args))
    close(tc.Hessian(model, LOSS, data, memory_budget=0.001).diagonal()["0.weight"], truth.diagonal()[:80].view(20, 4))
    assert not pushed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(dtype: torch.dtype) -> None:
    model = sequential(torch.tanh, F.gelu)
    x, y = batch(20)
    truth = reference.hessian(model, LOSS, (x, y))
    for _ in range(2):
        ours = tc.Hessian(model.to(dtype), LOSS, (x.to(dtype), y)).dense()
        assert ours.dtype == torch.float32
        assert (ours.double() - truth).norm() <= {torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype] * truth.norm()


def test_the_split_and_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sequential(torch.tanh, F.silu)
    data = [batch(6), batch(6), batch(4)]
    joined = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    whole = reference.hessian(model, LOSS, joined)
    for _ in range(2):
        split = tc.hessian_split(model, LOSS, data)
        close(split.residual, reference.residual(model, LOSS, joined), whole)
        close(split.hessian, whole)
        no_passes(monkeypatch)


def test_plans_keep_what_was_compared_by_graph() -> None:
    model, data = sequential(torch.tanh, torch.sigmoid), batch()
    matrix = tc.Hessian(model, LOSS, data)
    matrix.dense()
    (plan,) = matrix._plans
    assert isinstance(plan, Plan)
    assert plan.second_by_nodes
    assert all(plan.second_by_nodes.values())
