"""Models as users write them, beyond the list: first and second derivatives, one batch and an uneven loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_curvature as tc
from torch_curvature import reference

from .models import Function
from .models.case import parameter
from .test_losses_and_splits import close

N = 5


def mixture(m: Any, x: Tensor) -> Tensor:
    """Experts weighted by a router."""
    weights = m.router(x).softmax(-1)
    return sum(weights[:, i : i + 1] * torch.tanh(expert(x)) for i, expert in enumerate((m.first, m.second)))


def routed(m: Any, x: Tensor) -> Tensor:
    """Each sample to one of two experts, by its values."""
    out = x.new_zeros(len(x), 3)
    there, here = (x[:, 0] > 0).nonzero()[:, 0], (x[:, 0] <= 0).nonzero()[:, 0]
    return out.index_copy(0, there, m.first(x[there])).index_copy(0, here, torch.tanh(m.second(x[here])))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixture of experts": (
        lambda: Function(mixture, router=nn.Linear(4, 2), first=nn.Linear(4, 3), second=nn.Linear(4, 3)), (4,),
    ),
    "hard routing": (lambda: Function(routed, first=nn.Linear(4, 3), second=nn.Linear(4, 3)), (4,)),
    "weights made by a network": (
        lambda: Function(
            lambda m, x: torch.bmm(torch.tanh(m.make(x)).view(-1, 3, 4), x.unsqueeze(-1)).squeeze(-1),
            make=nn.Linear(4, 12),
        ),
        (4,),
    ),
    "einsum over heads": (
        lambda: Function(lambda m, x: torch.einsum("ni,hio->nho", x, m.w).tanh().sum(1), w=parameter(2, 4, 3)), (4,),
    ),
    "orthogonal weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)), (4,),
    ),
    "gated units": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.LayerNorm(3), nn.Linear(3, 3)), (4,)),
    "rectifiers": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Hardswish(), nn.Linear(5, 3), nn.Mish()), (4,),
    ),
    "pooled convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.CELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 3)), (2, 4, 4),
    ),
    "enlarged image": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ELU(), nn.Flatten(), nn.Linear(32, 3)
        ),
        (2, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_against_the_reference(name: str) -> None:
    build, shape = MODELS[name]
    model, x, y = build(), torch.randn(N, *shape), torch.randint(0, 3, (N,))
    loss, loader = nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), batch_size=3)
    for ours, theirs in ((tc.GaussNewton, reference.gauss_newton), (tc.Hessian, reference.hessian)):
        truth = theirs(model, loss, (x, y))
        matrix, v = ours(model, loss, (x, y)), torch.randn(len(truth))
        close(matrix.dense(), truth)
        close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal())
        close(matrix @ v, truth @ v)
        close(ours(model, loss, loader).dense(), truth)
    with tc.track(model) as t:
        loss(model(x), y).backward()
    rows = reference.per_sample_gradients(model, loss, (x, y))
    for key, gradient in t.gradients().items():
        close(gradient, rows[key])


def test_layers_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(4, 5).float(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(torch.tanh(self.low(x.float())).double())

    model, data = Mixed(), (torch.randn(N, 4), torch.randint(0, 3, (N,)))
    found = tc.GaussNewton(model, nn.CrossEntropyLoss(), data).dense()
    assert found.dtype == torch.float64
    wide = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for mine, theirs in zip(wide.parameters(), model.parameters()):
            mine.copy_(theirs)
    torch.testing.assert_close(found, reference.gauss_newton(wide, nn.CrossEntropyLoss(), data), rtol=1e-4, atol=1e-6)
