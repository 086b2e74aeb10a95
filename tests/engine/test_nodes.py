"""Derivatives through the nodes of autograd's graph that are known, against autograd's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import torch_curvature as tc
from torch_curvature import nodes, reference
from torch_curvature.trust import proven

from .models import Function
from .test_matrices import close

LOSS = nn.CrossEntropyLoss()
N = 4

# A function of [N, 3, 4] and the weights u [4, 4] and b [4] for every known kind of node.
GRAPHS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "AddmmBackward0": lambda x, u, b: torch.addmm(b, x.flatten(0, 1), u, beta=0.7, alpha=-1.3),
    "MmBackward0": lambda x, u, b: x.flatten(0, 1).mm(u),
    "AddBackward0": lambda x, u, b: torch.add(x @ u, x.tanh() + x, alpha=0.3),
    "ReluBackward0": lambda x, u, b: (x @ u).relu_() @ u,
    "TanhBackward0": lambda x, u, b: torch.tanh_(x @ u) @ u,
    "SigmoidBackward0": lambda x, u, b: torch.sigmoid(x @ u),
    "GeluBackward0": lambda x, u, b: F.gelu(F.gelu(x @ u), approximate="tanh"),
    "SiluBackward0": lambda x, u, b: F.silu(x @ u),
    "EluBackward0": lambda x, u, b: F.elu(F.selu(x @ u), 0.7),
    "LeakyReluBackward0": lambda x, u, b: F.leaky_relu(x @ u, 0.2),
    "SoftplusBackward0": lambda x, u, b: F.softplus(x @ u, 2.0),
    "HardtanhBackward0": lambda x, u, b: F.hardtanh(F.relu6(x @ u), -0.5, 0.5),
    "HardswishBackward0": lambda x, u, b: F.hardswish(x @ u + 1),
    "MishBackward0": lambda x, u, b: F.mish(x @ u),
    "LogSigmoidBackward0": lambda x, u, b: F.logsigmoid(x @ u),
    "SinBackward0": lambda x, u, b: torch.sin(x @ u),
    "CosBackward0": lambda x, u, b: torch.cos(x @ u),
    "ExpBackward0": lambda x, u, b: torch.exp(x @ u),
    "PowBackward0": lambda x, u, b: (x @ u) ** 3,
    "SqrtBackward0": lambda x, u, b: (torch.exp(x @ u) ** 1.5).sqrt(),
    "RsqrtBackward0": lambda x, u, b: torch.exp(x @ u).rsqrt(),
    "AbsBackward0": lambda x, u, b: (x @ u).abs(),
    "LogBackward0": lambda x, u, b: torch.exp(x @ u).tanh().log(),
    "ErfBackward0": lambda x, u, b: (x @ u).erf(),
    "ViewBackward0": lambda x, u, b: F.linear(x, u, b).view(N, 12),
    "UnsafeViewBackward0": lambda x, u, b: F.linear(x, u),
    "TBackward0": lambda x, u, b: F.linear(F.linear(x, u, b), u.t(), b),
}


def graph(of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, dict[str, nn.Parameter]]:
    """Outputs, something in the middle, and the parameters."""
    parameters = {
        "w": nn.Parameter(torch.randn(4, 4)),
        "u": nn.Parameter(torch.randn(4, 4)),
        "b": nn.Parameter(torch.randn(4)),
    }
    x = torch.randn(12, 4)
    z = F.linear(x, parameters["w"], parameters["b"])
    return of(z.view(N, 3, 4), parameters["u"], parameters["b"]), z, parameters


def names_of(outputs: Tensor) -> set[str]:
    found = nodes.known_graph(outputs)
    assert found is not None, "a node of this graph is not known"
    return {node.name() for node in found}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_known_node(name: str) -> None:
    compare(name, *graph(GRAPHS[name]))


def compare(name: str, outputs: Tensor, z: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Derivatives backwards and forwards through a graph that has a node of this name, with autograd's."""
    assert name in names_of(outputs)
    columns = torch.randn(5, *outputs.shape)
    edges = [get_gradient_edge(z), get_gradient_edge(outputs)]
    truth = torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, retain_graph=True)
    kept = columns.clone()
    found = nodes.pull_back(outputs, edges, columns)
    assert found is not None
    assert torch.equal(columns, kept)
    for ours, theirs in zip(found, truth, strict=True):
        assert ours is not None
        assert not ours.requires_grad
        close(ours, theirs)
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, list(parameters.values()), u, create_graph=True, allow_unused=True)
    terms = [(g * t).sum() for g, t in zip(pulled, tangents.values()) if g is not None]
    (expected,) = torch.autograd.grad(sum(terms), u)
    ahead = nodes.push_forward(outputs, parameters, tangents)
    assert ahead is not None
    assert not ahead.requires_grad
    close(ahead, expected)


def test_what_arrives_in_several_places_is_not_overwritten() -> None:
    """One term passed on to two functions, to one function twice, past a function, and asked for on the way."""
    u = nn.Parameter(torch.randn(4, 4))
    z = torch.randn(N, 4) @ u
    a = z @ u
    b = a.relu() + a.tanh()
    c = (b + b).view(2, 2, 4).view(N, 4)
    outputs = (torch.sigmoid(c) + (c.relu() + c)).relu() @ u
    edges = [get_gradient_edge(t) for t in (z, a, b, c, outputs)]
    columns = torch.randn(5, *outputs.shape)
    truth = torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, retain_graph=True)
    found = nodes.pull_back(outputs, edges, columns)
    assert found is not None
    for ours, theirs in zip(found, truth, strict=True):
        close(ours, theirs)
    for edge, theirs in zip(edges, truth):
        (ours,) = nodes.pull_back(outputs, [edge], columns)
        close(ours, theirs)


def test_every_known_kind_has_a_graph() -> None:
    covered = set().union(*(names_of(graph(of)[0]) for of in GRAPHS.values()))
    elsewhere = nodes.SPATIAL.keys() | nodes.FOR_SEVERAL  # in test_spatial and test_sequence_nodes
    assert nodes.KINDS.keys() - covered - elsewhere == {"ReshapeAliasBackward0"}  # of older torch: no view could be had


UNKNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cumulative sums": lambda z, b: z.cumsum(1),
    "unknown in the middle": lambda z, b: (z + z.roll(1, 0)).tanh(),
    "another dtype": lambda z, b: (z + b.float().double()).float() + z,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_left_to_autograd(name: str) -> None:
    b, x = nn.Parameter(torch.randn(4)), torch.randn(N, 4, requires_grad=True)
    z = F.linear(x, torch.eye(4), b)
    outputs = UNKNOWN[name](z, b)
    assert nodes.pull_back(outputs, [get_gradient_edge(z)], torch.randn(3, *outputs.shape).to(outputs)) is None
    assert nodes.push_forward(outputs, {"b": b}, {"b": torch.ones_like(b)}) is None


def test_broadcast_terms_have_sums() -> None:
    z = F.linear(torch.randn(1, 4), torch.randn(4, 4, requires_grad=True))
    outputs = z + F.linear(torch.randn(N, 4), torch.randn(4, 4, requires_grad=True))
    columns = torch.randn(3, N, 4)
    found = nodes.pull_back(outputs, [get_gradient_edge(z)], columns)
    assert found is not None
    close(found[0], columns.sum(1, keepdim=True))


def test_what_leads_to_no_edge_need_not_be_known() -> None:
    z = F.linear(torch.randn(N, 4), torch.randn(4, 4, requires_grad=True))
    other = torch.randn(N, 4, requires_grad=True).cumsum(1)
    columns = torch.randn(3, N, 4)
    found = nodes.pull_back(z.tanh() + other, [get_gradient_edge(z)], columns)
    assert found is not None
    close(found[0], columns * (1 - z.detach().tanh().square()))
    assert nodes.known_graph(z.tanh() + other) is None


def counting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of autograd's passes was batched, from now on."""
    passes: list[bool] = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(bool(kwargs.get("is_grads_batched")))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return passes


def test_a_proved_plan_needs_no_batched_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    passes = counting(monkeypatch)
    truth = reference.gauss_newton(model, LOSS, (x, y))
    passes.clear()
    close(tc.GaussNewton(model, LOSS, (x, y)).dense(), truth)
    assert any(passes), "the way through the nodes was not compared with autograd"
    passes.clear()
    close(tc.GaussNewton(model, LOSS, (x, y)).dense(), truth)
    close(tc.GaussNewton(model, LOSS, (x, y)) @ torch.ones(len(truth)), truth.sum(1))
    assert not any(passes)


def test_a_node_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = nodes.KINDS["TanhBackward0"]
    monkeypatch.setitem(nodes.IN_PLACE, "TanhBackward0", lambda node, G: G.mul_(2))
    monkeypatch.setitem(
        nodes.KINDS, "TanhBackward0", nodes.Kind(lambda node, G, i: 2 * wrong.back(node, G, i), lambda node, t: t[0])
    )
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    truth = reference.gauss_newton(model, LOSS, (x, y))
    for _ in range(2):
        matrix = tc.GaussNewton(model, LOSS, (x, y))
        close(matrix.dense(), truth)
        assert set(matrix.coverage().values()) == {"closed rule"}
        close(matrix @ torch.ones(len(truth)), truth.sum(1))


@pytest.mark.parametrize("how", ["tensor", "node", "module"])
def test_hooks_that_change_gradients(how: str) -> None:
    """They are part of what autograd differentiates, wherever they come from and from whichever pass on."""
    hooked: list[bool] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.first(x)
        if hooked and how == "tensor":
            z.register_hook(lambda g: 2 * g)
        if hooked and how == "node":
            z.grad_fn.register_prehook(lambda gs: (2 * gs[0],))
        return m.last(torch.tanh(z))

    model = Function(forward, first=nn.Linear(3, 5), last=nn.Linear(5, 3))
    x, y = torch.randn(N, 3), torch.randint(3, (N,))
    plain = tc.GaussNewton(model, LOSS, (x, y)).diagonal()
    handle = None
    if how == "module":
        handle = model.first.register_full_backward_hook(lambda m, before, after: None)
        changed = model.last.register_full_backward_pre_hook(lambda m, gs: (2 * gs[0],))
    hooked.append(True)
    doubled = tc.GaussNewton(model, LOSS, (x, y)).diagonal()
    close(doubled["first.weight"], 4 * plain["first.weight"])
    if handle is not None:
        handle.remove()
        changed.remove()


def test_what_vanishes_proves_nothing() -> None:
    """Products with zero agree whatever is wrong: what they agree on must be compared again."""
    zero, one = torch.zeros(3), torch.ones(3)
    assert proven([zero, None], [zero, None]) is None
    assert proven([zero, one], [zero, one]) is True
    assert proven([zero, one], [zero, 2 * one]) is False
    assert proven([zero], [None]) is False
