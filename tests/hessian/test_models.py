"""The Hessian and the residual in every representation, for every model of the engine's list, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.models import CASES
from tests.engine.test_matrices import call, close, own_rule, part, problem  # noqa: F401
from torch_curvature import reference
from torch_curvature.matrices import activation_space

MATRICES = {"hessian": (tc.Hessian, reference.hessian), "residual": (tc.Residual, reference.residual)}


def check(matrix: Any, truth: Tensor, whole: Tensor, model: nn.Module) -> None:
    """All representations; a part that vanishes is compared with the size of the ``whole`` Hessian."""
    names = list(reference.parameters(model))
    dense = matrix.dense()
    close(dense, truth, whole)
    assert torch.equal(dense, dense.T)
    blocks = matrix.blocks()
    assert list(blocks) == names
    for name, block in blocks.items():
        close(block, part(truth, model, [name]), whole)
        assert torch.equal(block, block.T)
    for module, block in matrix.blocks(by="module").items():
        members = [n for n in names if n.rpartition(".")[0] == module]
        close(block, part(truth, model, members), whole)
        assert torch.equal(block, block.T)
    diagonal = matrix.diagonal()
    assert {n: d.shape for n, d in diagonal.items()} == {n: p.shape for n, p in reference.parameters(model).items()}
    close(torch.cat([d.flatten() for d in diagonal.values()]), truth.diagonal(), whole)
    close(matrix.trace(), truth.trace(), whole)
    close(matrix.frobenius_norm(), truth.norm(), whole)
    v, V = torch.randn(len(truth)), torch.randn(len(truth), 3)
    close(matrix @ v, truth @ v, whole * v.norm())
    close(matrix @ V, truth @ V, whole * V.norm())
    pieces = v.split([p.numel() for p in reference.parameters(model).values()])
    named = {n: x.reshape(p.shape) for (n, p), x in zip(reference.parameters(model).items(), pieces)}
    close(torch.cat([x.flatten() for x in (matrix @ named).values()]), truth @ v, whole * v.norm())


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", CASES)
def test_every_representation(name: str, kind: str) -> None:
    model, inputs, targets = problem(name)
    data, loss = (inputs, targets), nn.CrossEntropyLoss()
    ours, theirs = MATRICES[kind]
    matrix = ours(model, loss, data)
    check(matrix, theirs(model, loss, data), reference.hessian(model, loss, data), model)
    assert not matrix._distrusted


@pytest.mark.parametrize("way", ["activation space", "products"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_for_every_parameter(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cost: all that can be done in activation space, with several positions too; and nothing of it."""
    monkeypatch.setattr(activation_space, "within_cost", lambda passes, products: way == "activation space")
    model, inputs, targets = problem(name)
    data, loss = (inputs, targets), nn.CrossEntropyLoss(reduction="sum")
    truth = reference.hessian(model, loss, data)
    matrix = tc.Hessian(model, loss, data)
    close(matrix.dense(), truth)
    for module, block in matrix.blocks(by="module").items():
        members = [n for n in reference.parameters(model) if n.rpartition(".")[0] == module]
        close(block, part(truth, model, members), truth)
    close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal(), truth)
    assert not matrix._distrusted


@pytest.mark.parametrize("name", ["mlp", "one layer used three times", "GPT block", "recurrent cells in a loop"])
def test_outputs_of_many_columns_come_out_of_second_order_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tc.Hessian, "_loss_columns", lambda *args: None)
    monkeypatch.setattr(activation_space, "within_cost", lambda passes, products: True)
    model, inputs, targets = problem(name)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    close(tc.Hessian(model, loss, (inputs, targets)).dense(), reference.hessian(model, loss, (inputs, targets)))


def test_a_small_budget_only_makes_chunks() -> None:
    model = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    data, loss = (torch.randn(40, 5), torch.randint(0, 3, (40,))), nn.CrossEntropyLoss()
    truth = reference.hessian(model, loss, data)
    matrix = tc.Hessian(model, loss, data, memory_budget=0.004)
    assert matrix.budget.working_bytes() // 8 < 20 * 40 * 43 * 8  # twenty columns at three layers do not go at once
    close(matrix.dense(), truth)
    close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal())
    V = torch.randn(len(truth), 30)
    close(matrix @ V, truth @ V)


def test_frobenius_norm_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(60, 64), nn.Tanh(), nn.Linear(64, 5))
    data, loss = (torch.randn(3, 60), torch.randint(0, 5, (3,))), nn.CrossEntropyLoss()
    matrix = tc.Hessian(model, loss, data, memory_budget=0.5)
    P = sum(p.numel() for p in model.parameters())
    assert P > 4096
    monkeypatch.setattr(matrix, "dense", lambda: pytest.fail("the dense matrix was formed"))
    close(matrix.frobenius_norm(), tc.Hessian(model, loss, data).dense().norm())


def test_not_everything_goes_through_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multilayer perceptron stays in activation space; its Hessian takes no product but those of the checks."""
    calls = []
    original = activation_space.unit_products
    monkeypatch.setattr(activation_space, "unit_products", lambda *args: calls.append(args) or original(*args))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    tc.Hessian(model, nn.CrossEntropyLoss(), (torch.randn(7, 6), torch.randint(0, 3, (7,)))).dense()
    assert not calls
