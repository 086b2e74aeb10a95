"""Losses, reductions and splits into batches: one normalisation, and the result of the concatenated data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.test_matrices import close
from tests.losses.loss_cases import GRID, IDS, Case
from torch_curvature import reference

N = 7


class Shaped(nn.Module):
    """A small network with outputs of any shape, in the domain of the loss."""

    def __init__(self, shape: torch.Size, domain: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, shape.numel())
        self.shape, self.domain = shape, domain

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(torch.tanh(self.first(x))).reshape(x.shape[0], *self.shape)
        if self.domain == "probability":
            return torch.sigmoid(out)
        return nn.functional.softplus(out) + 0.2 if self.domain == "rate" else out


def problem(case: Case) -> tuple[nn.Module, Tensor, Any]:
    outputs, targets = case.draw(N, torch.Generator().manual_seed(7))
    domain = "probability" if case.name.startswith("bce-") else "rate" if "rate" in case.name else "any"
    return Shaped(outputs.shape[1:], domain), torch.randn(N, 3), targets


@pytest.mark.parametrize(("case", "reduction"), GRID, ids=IDS)
def test_hessian_and_residual_of_every_loss(case: Case, reduction: str) -> None:
    model, x, y = problem(case)
    loss = case.loss(reduction)
    H, R = reference.hessian(model, loss, (x, y)), reference.residual(model, loss, (x, y))
    close(tc.Hessian(model, loss, (x, y)).dense(), H)
    close(tc.Residual(model, loss, (x, y)).dense(), R, H)
    if y.shape[0] != N:
        return
    batches = [(x[:2], y[:2]), (x[2:6], y[2:6]), (x[6:], y[6:])]
    split = tc.Hessian(model, loss, batches)
    close(split.dense(), H)
    close(torch.cat([d.flatten() for d in split.diagonal().values()]), H.diagonal(), H)
    v = torch.randn(len(H))
    close(split @ v, H @ v, H * v.norm())
    parts = tc.hessian_split(model, loss, batches)
    close(parts.residual, R, H)
    close(parts.hessian, H)


def cubic(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 3).sum(1).mean()


def wave(outputs: Tensor, targets: Tensor) -> Tensor:
    return (torch.sin(outputs).prod(1) + (outputs * targets).sum(1)).sum()


@pytest.mark.parametrize("loss", [cubic, wave])
def test_losses_that_are_not_convex(loss: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3))
    data = (torch.randn(N, 3), torch.randn(N, 3))
    H, G = reference.hessian(model, loss, data), reference.gauss_newton(model, loss, data)
    assert float(torch.linalg.eigvalsh(G)[0]) < -1e-3
    matrix = tc.Hessian(model, loss, data)
    close(matrix.dense(), H)
    close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), H.diagonal())
    for name, block in matrix.blocks().items():
        close(block, _part(H, model, name))
    parts = tc.hessian_split(model, loss, data)
    close(parts.gauss_newton, G)
    close(parts.residual, reference.residual(model, loss, data))


def _part(matrix: Tensor, model: nn.Module, wanted: str) -> Tensor:
    start = 0
    for name, p in model.named_parameters():
        if name == wanted:
            return matrix[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    raise KeyError(wanted)


def test_loader_of_token_batches_with_ignored_targets() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))
    x, y = torch.randint(0, 6, (9, 4)), torch.randint(0, 6, (9, 4))
    y[torch.rand(9, 4) < 0.4] = -100
    y[3] = -100

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch["x"]).flatten(0, 1).unflatten(0, (-1, 4)).transpose(1, 2), batch["y"]

    loss = nn.CrossEntropyLoss(weight=torch.rand(6) + 0.1)
    wrapped = _Transposed(model)
    truth = reference.hessian(wrapped, loss, (x, y))
    loader = torch.utils.data.DataLoader([{"x": a, "y": b} for a, b in zip(x, y)], batch_size=4)
    matrix = tc.Hessian(model, loss, loader, forward=forward)
    close(matrix.dense(), truth)
    v = torch.randn(len(truth), 2)
    close(matrix @ v, truth @ v)


class _Transposed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).transpose(1, 2)
