"""Losses x reductions x splits of the data: the result is that of all the data at once, whatever the split."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.backprop import Backpropagation
from torch_curvature.matrices.dual import _tiles, frobenius_from_gram, gather

from .models import Function

N, T, C = 7, 3, 4


def vector_model(outputs: int = C) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def token_model() -> nn.Module:
    return Function(
        lambda m, x: m.head(torch.tanh(m.table(x))).transpose(1, 2), table=nn.Embedding(5, 3), head=nn.Linear(3, C)
    )


def vectors() -> Tensor:
    return torch.randn(N, 3)


def words() -> Tensor:
    return torch.randint(0, 5, (N, T))


def classes(ignored: int | None = None) -> Tensor:
    y = torch.randint(0, C, (N,))
    if ignored is not None:
        y[[1, 2, 5]] = ignored
    return y


def token_classes(ignored: int = -100) -> Tensor:
    """A sample without a valid token, one with all of them."""
    y = torch.randint(0, C, (N, T))
    y[0] = ignored
    y[torch.rand(N, T) < 0.3] = ignored
    y[1] = torch.randint(0, C, (T,))
    return y


def soft() -> Tensor:
    return torch.softmax(torch.randn(N, C), 1)


def numbers() -> Tensor:
    return torch.randn(N, C)


def bits() -> Tensor:
    return torch.randint(0, 2, (N, C)).to(torch.get_default_dtype())


def counts() -> Tensor:
    return torch.poisson(torch.full((N, C), 2.0))


WEIGHT = [0.5, 2.0, 1.0, 0.1]
Loss = Callable[..., Any]
LOSSES: dict[str, tuple[Callable[[str], Loss], Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    "cross entropy": (lambda r: nn.CrossEntropyLoss(reduction=r), vector_model, vectors, classes),
    "cross entropy, class weights": (
        lambda r: nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT), reduction=r),
        vector_model, vectors, classes,
    ),
    "cross entropy, ignored targets": (
        lambda r: nn.CrossEntropyLoss(reduction=r), vector_model, vectors, lambda: classes(-100)
    ),
    "cross entropy, weights and ignored class": (
        lambda r: partial(F.cross_entropy, weight=torch.tensor(WEIGHT), ignore_index=2, reduction=r),
        vector_model, vectors, lambda: classes(2),
    ),
    "cross entropy, label smoothing": (
        lambda r: nn.CrossEntropyLoss(label_smoothing=0.2, weight=torch.tensor(WEIGHT), reduction=r),
        vector_model, vectors, classes,
    ),
    "cross entropy, soft targets": (lambda r: nn.CrossEntropyLoss(reduction=r), vector_model, vectors, soft),
    "cross entropy, tokens, padding": (lambda r: nn.CrossEntropyLoss(reduction=r), token_model, words, token_classes),
    "cross entropy, tokens, weights": (
        lambda r: nn.CrossEntropyLoss(weight=torch.tensor(WEIGHT), reduction=r), token_model, words, token_classes
    ),
    "binary cross entropy": (lambda r: nn.BCEWithLogitsLoss(reduction=r), vector_model, vectors, bits),
    "binary cross entropy, pos_weight": (
        lambda r: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(WEIGHT), weight=torch.rand(4), reduction=r),
        vector_model, vectors, bits,
    ),
    "squared error": (lambda r: nn.MSELoss(reduction=r), vector_model, vectors, numbers),
    "huber": (lambda r: nn.HuberLoss(delta=0.7, reduction=r), vector_model, vectors, numbers),
    "smooth l1": (lambda r: partial(F.smooth_l1_loss, beta=0.5, reduction=r), vector_model, vectors, numbers),
    "poisson": (lambda r: nn.PoissonNLLLoss(reduction=r), vector_model, vectors, counts),
    "any callable": (
        lambda r: lambda u, y: getattr((torch.log(torch.cosh(u - y)) * u.square().cos().exp()).sum(1), r)(),
        vector_model, vectors, numbers,
    ),
}  # fmt: skip

SPLITS = {"one batch": [7], "unequal": [3, 1, 3], "single samples": [1] * 7}


def close(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    assert float((ours - truth).norm()) <= 1e-9 * float(truth.norm()), float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_split_invariance(name: str, reduction: str) -> None:
    make_loss, make_model, make_inputs, make_targets = LOSSES[name]
    state = torch.get_rng_state()
    undivided = make_loss("sum")
    torch.set_rng_state(state)  # the same weights
    loss, model, x, y = make_loss(reduction), make_model(), make_inputs(), make_targets()
    G = reference.gauss_newton(model, loss, (x, y))
    divisor = {"sum": 1, "mean": N}[reduction] if name == "any callable" else None  # it cannot tell
    E = reference.empirical_fisher(model, loss, (x, y), denominator=divisor)
    v = torch.randn(len(G))
    each = reference.per_sample_gradients(model, undivided, (x, y))
    norms = torch.cat([g.flatten(1) for g in each.values()], 1).norm(dim=1)
    for split in SPLITS.values():
        data: Any = [(a, b) for a, b in zip(x.split(split), y.split(split))] if len(split) > 1 else (x, y)
        ours = tc.GaussNewton(model, loss, data)
        close(ours.dense(), G)
        close(torch.cat([d.flatten() for d in ours.diagonal().values()]), G.diagonal())
        close(ours.trace(), G.trace())
        close(ours @ v, G @ v)
        close(ours.frobenius_norm(), G.norm())
        second = tc.EmpiricalFisher(model, loss, data)
        close(second.dense(), E)
        close(second @ v, E @ v)
        close(second.gradient_norms(), norms)
        if name != "any callable":
            close(ours.gram().norm(), G.norm())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("huber", "smooth l1", "any callable")])
def test_fisher_over_splits(name: str, reduction: str) -> None:
    make_loss, make_model, make_inputs, make_targets = LOSSES[name]
    loss, model, x, y = make_loss(reduction), make_model(), make_inputs(), make_targets()
    truth = reference.fisher(model, loss, (x, y))
    for split in ([7], [2, 5]):
        ours = tc.Fisher(model, loss, list(zip(x.split(split), y.split(split))))
        close(ours.dense(), truth)
        v = torch.randn(len(truth))
        close(ours @ v, truth @ v)


@pytest.mark.parametrize("name", ["cross entropy", "cross entropy, tokens, padding", "squared error", "poisson"])
def test_monte_carlo_fisher_converges_and_is_reproducible(name: str) -> None:
    make_loss, make_model, make_inputs, make_targets = LOSSES[name]
    loss, model, x, y = make_loss("mean"), make_model(), make_inputs(), make_targets()
    truth = reference.fisher(model, loss, (x, y))
    few = tc.Fisher(model, loss, (x, y), samples=50, generator=torch.Generator().manual_seed(1))
    many = tc.Fisher(model, loss, (x, y), samples=20000, generator=torch.Generator().manual_seed(1))
    rough, fine = few.dense(), many.dense()
    assert float((fine - truth).norm() / truth.norm()) < 0.05
    assert float((fine - truth).norm()) < float((rough - truth).norm())
    assert torch.equal(rough, few.dense())
    v = torch.randn(len(truth))
    close(few @ v, rough @ v)
    close(torch.cat([d.flatten() for d in few.diagonal().values()]), rough.diagonal())
    small = tc.Fisher(model, loss, (x, y), samples=40, memory_budget=1e-5)
    assert float((small.trace() - truth.trace()) / truth.trace()) < 0.5


def test_loader_equals_concatenated_data() -> None:
    """A DataLoader yields lists; its last batch is smaller."""
    model, loss, x, y = vector_model(), nn.CrossEntropyLoss(), vectors(), classes(-100)
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    truth = reference.gauss_newton(model, loss, (x, y))
    matrix = tc.GaussNewton(model, loss, loader)
    close(matrix.dense(), truth)
    close(matrix.gram().norm(), truth.norm())
    one_batch = next(iter(DataLoader(TensorDataset(x, y), batch_size=7)))
    close(tc.GaussNewton(model, loss, one_batch).dense(), truth)
    J = reference.jacobian(model, x)
    close(tc.Jacobian(model, loader).dense(), J)
    close(tc.Jacobian(model, loader).gram(), torch.einsum("ncp,mdp->ncmd", J, J))
    v, u = torch.randn(J.shape[2]), torch.randn(J.shape[:2])
    close(tc.Jacobian(model, loader) @ v, J @ v)
    close(tc.Jacobian(model, loader).transposed_product(u), torch.einsum("ncp,nc->p", J, u))


@pytest.mark.parametrize("name", ["cross entropy", "cross entropy, tokens, padding", "any callable"])
def test_columns_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small memory budget splits the columns and the samples; the results are the same."""
    make_loss, make_model, make_inputs, make_targets = LOSSES[name]
    loss, model, x, y = make_loss("mean"), make_model(), make_inputs(), make_targets()
    truth = reference.gauss_newton(model, loss, (x, y))
    widths: list[int] = []
    to_edges = Backpropagation.to_edges
    monkeypatch.setattr(Backpropagation, "to_edges", lambda b, s: widths.append(len(s)) or to_edges(b, s))
    small = tc.GaussNewton(model, loss, [(x, y)], memory_budget=2e-5)
    small.diagonal()
    widths.clear()  # of the check on the first batch
    close(small.dense(), truth)
    assert len(widths) > 1
    assert max(widths) < 4
    close(torch.cat([b.diagonal() for b in small.blocks("module").values()]), truth.diagonal())
    close(torch.cat([d.flatten() for d in small.diagonal().values()]), truth.diagonal())
    V = torch.randn(len(truth), 20)
    close(small @ V, truth @ V)
    whole = tc.GaussNewton(model, loss, (x, y))
    for key, (A, B) in small.kronecker().items():
        close(A, whole.kronecker()[key][0])
        close(B, whole.kronecker()[key][1])
    if name != "any callable":
        close(tc.GaussNewton(model, loss, [(x, y)], memory_budget=4e-5).gram(), whole.gram())
    tiled = tc.GaussNewton(model, loss, [(x, y)], memory_budget=1e-6)
    tiled.budget.require = lambda *args: None  # the dual in tiles, whatever its size
    close(frobenius_from_gram(tiled), truth.norm())
    assert len(_tiles(gather(tiled, "gram")[0], 4)) > 1
    J = tc.Jacobian(model, x, memory_budget=2e-4)
    close(J.dense(), reference.jacobian(model, x))


def test_large_vocabulary_products_take_no_square_array() -> None:
    """50 000 classes: a C x C array would take 20 GB."""
    model = nn.Linear(3, 50_000)
    x, y = torch.randn(4, 3), torch.randint(0, 50_000, (4,))
    v = torch.randn(200_000)
    product = tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)) @ v
    Jv = F.linear(x, v[:150_000].view(50_000, 3), v[150_000:])
    p = torch.softmax(model(x), 1).detach()
    u = p * Jv - p * (p * Jv).sum(1, keepdim=True)
    close(product, torch.cat([(u.T @ x).flatten(), u.sum(0)]) / 4)
    estimate = tc.Fisher(model, nn.CrossEntropyLoss(), (x, y), samples=20).trace()
    exact = ((p * (1 - p)).sum(1) * (x.square().sum(1) + 1)).mean()
    assert abs(float(estimate / exact) - 1) < 0.5


def test_several_vectors_and_dictionaries() -> None:
    model, loss, x, y = vector_model(), nn.CrossEntropyLoss(), vectors(), classes()
    matrix = tc.GaussNewton(model, loss, (x, y))
    named = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    result = matrix @ named
    assert {n: t.shape for n, t in result.items()} == {n: p.shape for n, p in model.named_parameters()}
    flat = torch.cat([t.flatten() for t in named.values()])
    close(torch.cat([t.flatten() for t in result.values()]), matrix.dense() @ flat)
    assert (matrix @ torch.zeros(len(flat), 0)).shape == (len(flat), 0)
