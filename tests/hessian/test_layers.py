"""Blocks between layers: whatever lies between two of them, and wherever their parameters are in the matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_curvature as tc
from tests.engine.test_matrices import close, part
from torch_curvature import reference
from torch_curvature.matrices import activation_space, blocks, symmetric_sum


class Branches(nn.Module):
    """Every layer sees all earlier ones: what a layer is multiplied with moves with each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(11, 4)
        self.third = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.tanh(self.first(x))
        two = torch.sigmoid(self.second(torch.cat([x, one], 1))) * one[:, :4]
        return self.third(torch.cat([x, one, two], 1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * x
        return self.last(x)


class StoredTransposed(nn.Module):
    """``x @ W`` with W [I, O], a bias in front of it, and the later layer registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.randn(3))
        self.late = nn.Parameter(torch.randn(7, 3) / 3)
        self.between = nn.Linear(20, 7)
        self.early = nn.Parameter(torch.randn(5, 20) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.early)
        return torch.addmm(self.c, F.silu(self.between(x)), self.late)


class Tied(nn.Module):
    """One weight twice, once as it is and once transposed, between layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.middle(torch.tanh(self.encoder(x))))
        h = torch.tanh(self.middle(h))
        return self.head(torch.sin(F.linear(h, self.encoder.weight.T)))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(8, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(torch.tanh(self.table(x)))))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def chain(*widths: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        parts = [[nn.Linear(i, o), nn.Tanh()] for i, o in itertools.pairwise(widths)]
        return nn.Sequential(*[m for pair in parts for m in pair][:-1])

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a chain": chain(5, 7, 6, 3),
    "wider than a tile": chain(17, 33, 18, 3),
    "one unit wide": chain(5, 1, 4, 1, 3),
    "branches": Branches,
    "residual connections": Residual,
    "stored transposed, in another order": StoredTransposed,
    "tied": Tied,
    "rows of a table": Table,
    "frozen parts": frozen,
}


def samples(name: str, N: int) -> tuple[Tensor, Tensor]:
    width = {"wider than a tile": 17, "residual connections": 6}.get(name, 5)
    x = torch.randint(0, 8, (N,)) if name == "rows of a table" else torch.randn(N, width)
    return x, torch.randint(0, 3, (N,))


def check(got: Tensor, truth: Tensor, whole: Tensor) -> None:
    close(got, truth, whole)
    assert torch.equal(got, got.T)


@pytest.mark.parametrize("split", [[11], [4, 1, 6]])
@pytest.mark.parametrize("name", MODELS)
def test_every_block(name: str, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the first batch, added to by the others."""
    monkeypatch.setattr(activation_space, "within_cost", lambda passes, products: True)
    model, loss = MODELS[name](), nn.CrossEntropyLoss(label_smoothing=0.1)
    data = [samples(name, N) for N in split]
    joined = tuple(torch.cat(parts) for parts in zip(*data))
    truth = reference.hessian(model, loss, joined)
    for ours, theirs in ((tc.Hessian, reference.hessian), (tc.Residual, reference.residual)):
        matrix, want = ours(model, loss, data), theirs(model, loss, joined)
        check(matrix.dense(), want, truth)
        for module, block in matrix.blocks(by="module").items():
            names = [n for n in reference.parameters(model) if n.rpartition(".")[0] == module]
            check(block, part(want, model, names), truth)
        for key, block in matrix.blocks().items():
            check(block, part(want, model, [key]), truth)
        assert not matrix._distrusted
    gauss_newton = tc.GaussNewton(model, loss, data)
    want = reference.gauss_newton(model, loss, joined)
    check(gauss_newton.dense(), want, want)
    for module, block in gauss_newton.blocks(by="module").items():
        names = [n for n in reference.parameters(model) if n.rpartition(".")[0] == module]
        check(block, part(want, model, names), want)


@pytest.mark.parametrize("matrix", [tc.Hessian, tc.GaussNewton])
@pytest.mark.parametrize("name", ["a chain", "branches", "residual connections", "stored transposed, in another order"])
def test_layers_go_straight_into_their_places(
    name: str, matrix: type[tc.Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for a pair of layers: no temporary, no parameter by itself."""
    calls = []
    together = activation_space.curvature_blocks
    for module in (activation_space, blocks):
        monkeypatch.setattr(
            module,
            "curvature_blocks",
            lambda given: (calls.extend(block._asdict() for block in given), together(given))[1],
        )
    monkeypatch.setattr(blocks, "kronecker_sum", lambda *args, **more: pytest.fail("a temporary"))
    monkeypatch.setattr(activation_space, "within_cost", lambda passes, products: True)
    monkeypatch.setattr(activation_space, "pair_block", lambda *args: pytest.fail("a pair of parameters by itself"))
    model = MODELS[name]()
    layers = {"branches": 3, "residual connections": 4}.get(name, 3)
    matrix(model, nn.CrossEntropyLoss(), samples(name, 6)).dense()
    assert len(calls) == layers * (layers + 1) // 2
    if matrix is tc.Hessian:  # both terms in each call between two layers
        assert sum(call.get("d") is not None for call in calls) == layers * (layers - 1) // 2


def test_what_was_written_before_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that results are written into holds anything."""
    for module in (symmetric_sum, blocks):
        monkeypatch.setattr(
            module, "large_matrix", lambda rows, columns, like: like.new_full((rows, columns), float("nan"))
        )
    for name in ("tied", "rows of a table", "branches", "frozen parts"):
        model, loss, data = MODELS[name](), nn.CrossEntropyLoss(), samples(name, 6)
        truth = reference.hessian(model, loss, data)
        close(tc.Hessian(model, loss, data).dense(), truth)
        close(tc.GaussNewton(model, loss, data).dense(), reference.gauss_newton(model, loss, data))
