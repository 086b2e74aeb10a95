"""Products of matrices by the other library, made to be taken on any processor, against those of torch."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import torch_curvature as tc
from torch_curvature import backprop, dense_products, nodes, reference

LOSS = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def taken(on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Float32, and every product however small by oneDNN; how many were."""
    torch.set_default_dtype(torch.float32)  # that of the other tests comes back with them
    calls: list[int] = []

    def linear(x: Tensor, w: Tensor, *rest: object) -> Tensor:
        calls.append(1)
        return torch.ops.mkldnn._linear_pointwise(x, w, *rest)

    monkeypatch.setattr(dense_products, "_linear", linear)
    monkeypatch.setattr(dense_products, "ENOUGH", 0)
    monkeypatch.setattr(nodes, "FEW_ENTRIES", 0)
    return calls


def close(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    assert float((ours.double() - truth).norm()) <= 1e-5 * float(truth.norm())


def lefts(R: int, K: int) -> list[Tensor]:
    return [torch.randn(R, K), torch.randn(K, R).T, torch.randn(R, 2 * K)[:, ::2], torch.randn(1, K).expand(R, K)]


def rights(K: int, M: int) -> list[Tensor]:
    return [torch.randn(K, M), torch.randn(M, K).T, torch.randn(2 * K, M)[1::2]]


def _plain(x: Tensor) -> bool:
    return x.is_contiguous() or x.T.is_contiguous()


@pytest.mark.parametrize(("R", "K", "M"), [(1, 1, 1), (5, 3, 7), (64, 33, 10), (1, 300, 40), (130, 1, 17), (16, 64, 1)])
def test_values(R: int, K: int, M: int, taken: list[int]) -> None:
    for x in lefts(R, K):
        for y in rights(K, M):
            before, total = (x.clone(), y.clone()), torch.randn(R, M)
            close(dense_products.product(x, y), x.double() @ y.double())
            expected = total.double() + x.double() @ y.double()
            close(dense_products.product(x, y, total), expected)
            close(total, expected)
            assert torch.equal(x, before[0])
            assert torch.equal(y, before[1])
    assert len(taken) == 2 * sum(_plain(x) and _plain(y) for x in lefts(R, K) for y in rights(K, M))


def test_strides_that_one_dnn_does_not_know(taken: list[int]) -> None:
    x = torch.randn(6, 20)
    for y in (torch.randn(140).as_strided((20, 7), (3, 5)), torch.randn(7).expand(20, 7)):
        close(dense_products.product(x, y), x.double() @ y.double())
    assert not taken


def test_what_is_not_taken(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(dense_products.product(x, y), x @ y)
    monkeypatch.setattr(dense_products, "ENOUGH", 25)
    x, y = x.float(), y.float()
    assert torch.equal(dense_products.product(x, y), x @ y)
    assert torch.equal(dense_products.product(x, y, torch.ones(4, 2)), torch.ones(4, 2).addmm_(x, y))
    assert torch.equal(dense_products.product(x[:0], y), x[:0] @ y)
    monkeypatch.setattr(dense_products, "ENOUGH", 0)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(dense_products.product(x, y), x @ y)
    assert not taken
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    assert dense_products.takes_one_dnn(x)
    monkeypatch.setattr(dense_products, "_linear", None)
    assert not dense_products.takes_one_dnn(x)


def test_only_where_products_are_half_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "products_half_wide", lambda: False)
    assert dense_products._one_dnn() is None
    monkeypatch.setattr(dense_products, "products_half_wide", lambda: True)
    assert (dense_products._one_dnn() is not None) == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert dense_products._one_dnn() is None


def test_one_column_goes_node_by_node(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = torch.randn(3, 4, 5), nn.Parameter(torch.randn(5, 6))
    z = x @ u
    outputs = F.layer_norm(z, (6,)).softmax(-1) @ torch.randn(6, 2)
    column = torch.randn(1, *outputs.shape)
    pulled = nodes.pull_back(outputs, [get_gradient_edge(z)], column)
    assert pulled is not None
    assert taken
    close(pulled[0][0], torch.autograd.grad(outputs, z, column[0], retain_graph=True)[0].double())
    monkeypatch.setattr(dense_products, "ENOUGH", outputs[..., 0].numel() * 6 * 2 + 1)  # one more than the product has
    assert nodes.pull_back(outputs, [get_gradient_edge(z)], column) is None
    assert nodes.pull_back(outputs, [get_gradient_edge(z)], column.expand(2, *outputs.shape)) is not None


def test_graphs_of_mostly_large_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_products, "ENOUGH", 100)
    start = torch.randn(4, 5, requires_grad=True)

    def graph(*widths: int) -> list[object]:
        x = start
        for width in widths:
            x = x @ torch.randn(x.shape[1], width)
        return nodes.graph_behind(x)

    assert dense_products.mostly_large(graph(5))  # 4 x 5 x 5
    assert not dense_products.mostly_large(graph(4))
    assert dense_products.mostly_large(graph(5, 1))
    assert not dense_products.mostly_large(graph(5, 1, 1))
    assert not dense_products.mostly_large(nodes.graph_behind(start.tanh()))
    given = torch.randn(50, 50) @ nn.Parameter(torch.randn(50, 5))  # whose left factor has no derivative
    assert not dense_products.mostly_large(nodes.graph_behind(given))


class Block(nn.Module):
    """Attention and a perceptron on [N, 5, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.mT).softmax(-1) @ v
        return (x + self.down(F.gelu(self.up(x)))).mean(1)


@pytest.mark.parametrize(
    "build", [Block, lambda: nn.Sequential(nn.Linear(8, 9), nn.Softplus(), nn.Flatten(), nn.Linear(45, 8))]
)
def test_matrices(build: type[nn.Module], taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backprop.chains, "MOST_WEIGHTS", 0)
    model, x, y = build(), torch.randn(6, 5, 8), torch.randint(8, (6,))
    exact = deepcopy(model).double()
    G = reference.gauss_newton(exact, LOSS, (x.double(), y))
    ours = tc.GaussNewton(model, LOSS, (x, y))
    for _ in range(2):  # the first is compared with autograd's passes on the way
        close(torch.cat([d.flatten() for d in ours.diagonal().values()]), G.diagonal())
    v = torch.randn(len(G))
    close(ours @ v, G @ v.double())
    found = tc.EmpiricalFisher(model, LOSS, (x, y))
    gradients = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(LOSS(exact(x[i : i + 1].double()), y[i : i + 1]), exact.parameters())
            ]
        )
        for i in range(6)
    ]
    J = torch.stack(gradients)
    for _ in range(2):
        close(found.gradient_norms(), J.norm(dim=1))
    taken.clear()
    close(found.gradient_norms(), J.norm(dim=1))
    assert taken
