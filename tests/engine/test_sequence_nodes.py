"""Derivatives through the nodes of sequence models and of what moves numbers about, against autograd's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import torch_curvature as tc
from torch_curvature import backprop, nodes, reference, sequences

from .models import CASES
from .test_matrices import close
from .test_nodes import N, compare, graph, names_of

softmax_back_ = torch.ops.torch_curvature.softmax_back_
layer_norm_back_ = torch.ops.torch_curvature.layer_norm_back_


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "FEW_ENTRIES", 0)


Graph = Callable[[Tensor, Tensor, Tensor], Tensor]


def _embedded(x: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return (x + F.embedding(torch.tensor([[0, 3, 1]] * N), u)) @ u


def _normalised(x: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(F.layer_norm(F.layer_norm(x, (3, 4)), (4,), b, b) * 2, (3, 4), u[:3], u[1:])


def _attended(x: Tensor, u: Tensor, b: Tensor) -> Tensor:
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    return torch.ops.aten._scaled_dot_product_attention_math(x @ u, x, x, mask)[0]


def _cut(x: Tensor, u: Tensor, b: Tensor) -> Tensor:
    return x[:, 1:] * x[:, :2] + x[..., -3:-1].sum() * x[:, ::2]


# A function of [N, 3, 4] and the weights u [4, 4] and b [4] for every kind of node, some for several uses of one.
GRAPHS: dict[str, list[Graph]] = {
    "TransposeBackward0": [lambda x, u, b: x.transpose(-1, 1) @ u[:3], lambda x, u, b: x.mT.tanh()],
    "PermuteBackward0": [lambda x, u, b: x.permute(2, -3, 1), lambda x, u, b: x.movedim(0, -1).tanh()],
    "ExpandBackward0": [lambda x, u, b: (x @ u)[:, :1].expand(N, 5, 4) + b, lambda x, u, b: x[None].expand(2, N, 3, 4)],
    "UnsqueezeBackward0": [lambda x, u, b: x.unsqueeze(-1).tanh(), lambda x, u, b: x.unsqueeze(1)],
    "SqueezeBackward0": [lambda x, u, b: x[:, :1].squeeze().tanh()],
    "SqueezeBackward1": [lambda x, u, b: x[:, :, 1:2].squeeze(-1).tanh(), lambda x, u, b: x.squeeze(0).tanh()],
    "SqueezeBackward2": [lambda x, u, b: x[:, :1, 2:3].squeeze((1, 2)).tanh()],
    "SelectBackward0": [
        lambda x, u, b: x[:, -1].tanh(),
        lambda x, u, b: x[:, 0] + x[:, 0].tanh() * x[:, 2],
        lambda x, u, b: x.tanh()[:, 1] + x[:, 2],
    ],
    "SliceBackward0": [_cut, lambda x, u, b: (x[:, 1:] + x[:, :2]).tanh(), lambda x, u, b: x.tanh()[:, 1:2] + x],
    "SplitBackward0": [
        lambda x, u, b: x.chunk(2, -1)[1].tanh(),
        lambda x, u, b: x.split(2, 1)[0] * x.split(2, 1)[1],
        lambda x, u, b: (lambda p, q: p.relu() * q + q)(*(x @ u).split(2, -1)),
    ],
    "SplitWithSizesBackward0": [lambda x, u, b: (lambda p, q, r: p * r)(*(x @ u).split([1, 2, 1], 2))],
    "UnsafeSplitBackward0": [lambda x, u, b: x.unsafe_split(2, 2)[0] * x.unsafe_split(2, 2)[1]],
    "UnsafeSplitWithSizesBackward0": [lambda x, u, b: x.unsafe_split_with_sizes([1, 3], -1)[1].tanh()],
    "UnbindBackward0": [
        lambda x, u, b: (lambda p, q, r: p * r)(*x.tanh().unbind(1)),
        lambda x, u, b: x.unbind(-1)[3] * 2,
    ],
    "CatBackward0": [
        lambda x, u, b: torch.cat([x, x @ u, x.tanh()], -1),
        lambda x, u, b: torch.cat([x[:, :1], x.tanh()], 1) @ u,
        lambda x, u, b: torch.cat([x @ u, x], 1).tanh(),
    ],
    "StackBackward0": [lambda x, u, b: torch.stack([x, x @ u, x.tanh()], -2), lambda x, u, b: torch.stack([x, x])],
    "SumBackward0": [lambda x, u, b: x.sum() * x],
    "MeanBackward0": [lambda x, u, b: x.tanh().mean() * x],
    "SumBackward1": [
        lambda x, u, b: x.tanh().sum(-1, keepdim=True) * x,
        lambda x, u, b: x.sum((1, -1)).tanh(),
        lambda x, u, b: (x @ u).sum(1).relu(),
    ],
    "SubBackward0": [
        lambda x, u, b: torch.sub(x @ u, x.tanh(), alpha=0.3),
        lambda x, u, b: b - x,
        lambda x, u, b: x - 1,
    ],
    "RsubBackward1": [lambda x, u, b: 1 - x.tanh(), lambda x, u, b: torch.rsub(x, 2, alpha=0.5)],
    "NegBackward0": [lambda x, u, b: -x, lambda x, u, b: (-(x @ u)).tanh()],
    "MulBackward0": [
        lambda x, u, b: x * b,
        lambda x, u, b: (x @ u) * x.tanh(),
        lambda x, u, b: x * 0.3,
        lambda x, u, b: x[:, :1] * x,
        lambda x, u, b: (x @ u) * torch.randn(N, 3, 4),
        lambda x, u, b: x * x,
    ],
    "MulBackward1": [_attended],
    "DivBackward0": [lambda x, u, b: x / (2 + x.tanh()), lambda x, u, b: x / 3, lambda x, u, b: b / x.exp()],
    "WhereBackward0": [
        lambda x, u, b: torch.where(x > 0, x @ u, x.tanh()),
        lambda x, u, b: torch.where(x[:, :1] > 0, b, x),
        lambda x, u, b: torch.where(torch.ones(3, 4) > 0, x, 0.0),
    ],
    "MaskedFillBackward0": [lambda x, u, b: (x @ u).masked_fill(torch.ones(3, 4).tril() == 0, -1.0).softmax(-1)],
    "BmmBackward0": [
        lambda x, u, b: (x @ u).bmm(x.mT),
        lambda x, u, b: x.mT @ x,
        lambda x, u, b: x.mT @ torch.randn(N, 3, 2),
    ],
    "BaddbmmBackward0": [
        lambda x, u, b: torch.baddbmm(x.tanh() @ x.mT, x, x.mT, beta=0.3, alpha=-1.2),
        lambda x, u, b: torch.baddbmm(b[:3], x, x.mT),
    ],
    "SoftmaxBackward0": [
        lambda x, u, b: (x @ u).softmax(-1),
        lambda x, u, b: x.softmax(1),
        lambda x, u, b: x.mT.softmax(2).mT,
    ],
    "SafeSoftmaxBackward0": [_attended],
    "LogSoftmaxBackward0": [lambda x, u, b: (x @ u).log_softmax(-1), lambda x, u, b: x.log_softmax(1)],
    "NativeLayerNormBackward0": [_normalised, lambda x, u, b: F.layer_norm(x, (4,)) + F.layer_norm(x @ u, (4,), b)],
    "NativeGroupNormBackward0": [
        lambda x, u, b: F.group_norm(x @ u, 3) + F.group_norm(x.mT, 2, b, b).mT,
        lambda x, u, b: F.group_norm(x.view(2, 4, 6, 1), 2, b, u[0]),
    ],
    "EmbeddingBackward0": [_embedded],
}


@pytest.mark.parametrize("few", [0, 1 << 16])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_known_node(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "SIDE_BY_SIDE", few)
    for of in GRAPHS[name]:
        compare(name, *graph(of))


def test_without_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "takes_helpers", lambda x: False)
    for name in ("SoftmaxBackward0", "SafeSoftmaxBackward0", "NativeLayerNormBackward0", "NativeGroupNormBackward0"):
        for of in GRAPHS[name]:
            compare(name, *graph(of))


def test_every_known_kind_has_a_graph() -> None:
    covered = set().union(*(names_of(graph(of)[0]) for several in GRAPHS.values() for of in several))
    assert covered >= nodes.FOR_SEVERAL


LEFT: dict[str, Graph] = {
    "a constant beside another": lambda x, u, b: torch.cat([torch.ones(N, 1, 4), x, torch.ones(N, 2, 4), x], 1),
    "two outputs, one of another function": lambda x, u, b: torch.stack(x.aminmax(dim=1)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_autograd(name: str) -> None:
    outputs, z, parameters = graph(LEFT[name])
    assert nodes.pull_back(outputs, [get_gradient_edge(z)], torch.randn(3, *outputs.shape)) is None
    assert nodes.push_forward(outputs, parameters, parameters) is None


def test_a_constant_beside() -> None:
    """Its size is what is left."""
    outputs, z, _ = graph(lambda x, u, b: torch.cat([torch.ones(N, 2, 4), x, x.tanh()], 1))
    columns = torch.randn(3, *outputs.shape)
    (truth,) = torch.autograd.grad(outputs, z, columns, is_grads_batched=True, retain_graph=True)
    (found,) = nodes.pull_back(outputs, [get_gradient_edge(z)], columns) or [torch.zeros(())]
    close(found, truth)


def test_rows_without_gradient_are_left_to_forward_mode() -> None:
    table = nn.Parameter(torch.randn(5, 4))
    outputs = F.embedding(torch.tensor([0, 3]), table, padding_idx=3)
    assert nodes.push_forward(outputs, {"t": table}, {"t": table}) is None


def test_one_column_and_few_are_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, z, _ = graph(lambda x, u, b: x.softmax(-1))
    edges = [get_gradient_edge(z)]
    assert nodes.pull_back(outputs, edges, torch.randn(1, *outputs.shape)) is None
    assert nodes.pull_back(outputs, edges, torch.randn(2, *outputs.shape)) is not None
    monkeypatch.setattr(nodes, "FEW_ENTRIES", 2 * z.numel() + 1)
    assert nodes.pull_back(outputs, edges, torch.randn(2, *outputs.shape)) is None
    assert nodes.pull_back(outputs, edges, torch.randn(3, *outputs.shape)) is not None


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each pass of several columns went by nodes."""
    calls: list[bool] = []
    way = backprop.pull_back

    def counted(outputs: Tensor, edges: Any, columns: Tensor) -> Any:
        found = way(outputs, edges, columns)
        if len(columns) > 1:
            calls.append(found is not None)
        return found

    monkeypatch.setattr(backprop, "pull_back", counted)
    yield calls
    monkeypatch.undo()


BY_NODES = [
    *(
        "sequence of dense layers changed in place",
        "root mean square normalisation, sequences",
        "embedding with padding",
    ),
    *("LSTM classifier", "GRU, two layers, both directions, time first", "recurrent cells in a loop", "time first"),
    *("LSTM with projections and the plain recurrent layers", "self-attention", "cross-attention", "GPT block"),
    *(
        "transformer encoder",
        "transformer decoder, time first",
        "tied embedding",
        "class token, positions, layer scale",
    ),
    *("rows looked up for all samples and used twice", "branches", "U-shaped skip"),
]


@pytest.mark.parametrize("name", BY_NODES)
def test_models(name: str, taken: list[bool]) -> None:
    case = CASES[name]
    model, x = case.build(), case.inputs(3)
    with torch.no_grad():
        outputs = model(x) if isinstance(x, Tensor) else model(**x) if isinstance(x, dict) else model(*x)
    targets, loss = torch.randn_like(outputs), nn.MSELoss()
    truth = reference.gauss_newton(model, loss, (x, targets))
    for _ in range(2):
        taken.clear()
        close(tc.GaussNewton(model, loss, (x, targets)).dense(), truth)
        diagonal = tc.GaussNewton(model, loss, (x, targets)).diagonal()
        close(torch.cat([d.flatten() for d in diagonal.values()]), truth.diagonal())
        v = torch.randn(len(truth))
        close(tc.GaussNewton(model, loss, (x, targets)) @ v, truth @ v)
    assert taken
    assert all(taken)


def test_normalised_groups_of_images(taken: list[bool]) -> None:
    first, second = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 6, 2)
    norms = nn.GroupNorm(2, 4), nn.GroupNorm(3, 6, affine=False)
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.SiLU(), nn.Flatten(), nn.Linear(24, 3))
    data, loss = (torch.randn(3, 2, 4, 4), torch.randint(3, (3,))), nn.CrossEntropyLoss()
    truth = reference.gauss_newton(model, loss, data)
    for _ in range(2):
        taken.clear()
        close(tc.GaussNewton(model, loss, data).dense(), truth)
        v = torch.randn(len(truth))
        close(tc.GaussNewton(model, loss, data) @ v, truth @ v)
        close(tc.EmpiricalFisher(model, loss, data).trace(), reference.empirical_fisher(model, loss, data).trace())
    assert taken
    assert all(taken)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "R", "K"), [(1, 1, 1), (3, 5, 7), (2, 300, 33), (9, 4, 64), (0, 3, 4), (2, 0, 4)])
def test_helpers(V: int, R: int, K: int, dtype: torch.dtype) -> None:
    G, p = torch.randn(V, R, K, dtype=dtype), torch.randn(R, K, dtype=dtype).softmax(-1)
    wide, q = G.double(), p.double()
    found = G.clone()
    softmax_back_(found, p)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found.double(), q * (wide - (q * wide).sum(-1, keepdim=True)), rtol=0, atol=tolerance)
    x, w = 3 + torch.randn(R, K, dtype=dtype), torch.randn(K, dtype=dtype)
    mean, scale = x.mean(1, keepdim=True), torch.rand(R, 1, dtype=dtype) + 0.5
    for weight in (w, None):
        found = G.clone()
        layer_norm_back_(found, x, mean, scale, weight)
        normalised = ((x - mean) * scale).double()
        weighted = wide if weight is None else wide * weight.double()
        first, second = weighted.mean(-1, keepdim=True), (weighted * normalised).mean(-1, keepdim=True)
        expected = scale.double() * (weighted - first - normalised * second)
        size = 1 + float(expected.abs().max()) if expected.numel() else 1.0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=20 * tolerance * size)


@pytest.mark.usefixtures("on_the_cpu")
def test_errors_of_the_helpers() -> None:
    G = torch.randn(2, 5, 4)
    with pytest.raises(RuntimeError, match="must be"):
        softmax_back_(G[0], torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="20 entries"):
        softmax_back_(G, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="differ in dtype"):
        softmax_back_(G, torch.randn(5, 4).float())
    with pytest.raises(RuntimeError, match="contiguous"):
        softmax_back_(G, torch.randn(4, 5).T)
    with pytest.raises(RuntimeError, match="float32 or float64"):
        softmax_back_(G.half(), torch.randn(5, 4).half())
    x, row, weight = torch.randn(5, 4), torch.randn(5), torch.randn(4)
    for name, wrong in {"x": (x[:3], row, row, weight), "mean": (x, weight, row, weight)}.items():
        with pytest.raises(RuntimeError, match=f"'{name}'"):
            layer_norm_back_(G, *wrong)
    for name, wrong in {"scale": (x, row, weight, weight), "weight": (x, row, row, row)}.items():
        with pytest.raises(RuntimeError, match=f"'{name}'"):
            layer_norm_back_(G, *wrong)
