"""Several dtypes, autocast, compiled models, and batches whose second derivatives cannot be held."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.test_matrices import close
from torch_curvature import reference

LOSS = nn.CrossEntropyLoss()


class Mixed(nn.Module):
    """Layers in single, double and single precision, or all in double."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5).float(), nn.Linear(5, 3), nn.Linear(3, 3).float()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x.to(self.a.weight.dtype))).double()))
        return self.c(x.to(self.c.weight.dtype))


def test_parameters_of_several_dtypes() -> None:
    model, data = Mixed(), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    truth = reference.hessian(copy.deepcopy(model).double(), LOSS, data)
    for matrix in (tc.Hessian(model, LOSS, data), tc.Hessian(model, LOSS, [data])):
        dense = matrix.dense()
        assert dense.dtype == torch.float64
        assert (dense - truth).norm() <= 1e-5 * truth.norm()
        assert not matrix._distrusted
        diagonal = torch.cat([d.flatten() for d in matrix.diagonal().values()])
        assert (diagonal - truth.diagonal()).norm() <= 1e-5 * truth.norm()
        v = torch.randn(len(truth))
        assert (matrix @ v - truth @ v).norm() <= 1e-5 * truth.norm() * v.norm()


def test_autocast_covers_the_forward_pass_only() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).float()
    data = (torch.randn(8, 4, dtype=torch.float32), torch.randint(0, 3, (8,)))
    truth = tc.Hessian(model, LOSS, data).dense()
    v = torch.randn(len(truth), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        matrix = tc.Hessian(model, LOSS, data)
        dense, product = matrix.dense(), matrix @ v
        blocks, diagonal = matrix.blocks(), matrix.diagonal()
        split = tc.hessian_split(model, LOSS, data)
        assert torch.is_autocast_enabled("cpu")
    assert dense.dtype == product.dtype == split.residual.dtype == torch.float32
    assert all(b.dtype == torch.float32 for b in [*blocks.values(), *diagonal.values()])
    error = float((dense - truth).norm() / truth.norm())
    assert 1e-6 < error < 0.05  # the forward pass was in half precision, what follows was not
    assert (product - truth @ v).norm() <= 0.05 * truth.norm() * v.norm()
    assert (split.hessian - dense).norm() <= 0.01 * truth.norm()


def test_compiled_models() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    close(tc.Hessian(torch.compile(model), LOSS, data).dense(), reference.hessian(model, LOSS, data))


def test_a_batch_whose_second_derivatives_cannot_be_held_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 60), nn.Tanh(), nn.Linear(60, 3))
    x, y = torch.randn(400, 2), torch.randint(0, 3, (400,))
    matrix = tc.Hessian(model, LOSS, (x, y), memory_budget=0.01)
    with pytest.raises(MemoryError, match=r"400 samples.*smaller batches"):
        matrix.blocks()
    truth = tc.Hessian(model, LOSS, (x, y)).blocks()
    for name, diagonal in matrix.diagonal().items():
        close(diagonal.flatten(), truth[name].diagonal())
    batches = list(zip(x.split(50), y.split(50)))
    for name, block in tc.Hessian(model, LOSS, batches, memory_budget=0.01).blocks().items():
        close(block, truth[name])


def test_outputs_of_a_large_vocabulary_form_no_square_of_it() -> None:
    """Products with ten thousand outputs: one Hessian-vector product, no columns."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Tanh(), nn.Linear(4, 10000))
    data = (torch.randint(0, 50, (5,)), torch.randint(0, 10000, (5,)))
    matrix = tc.Hessian(model, LOSS, data, memory_budget=0.2)
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    v[200:] *= 0
    ours = (matrix @ v)[:200]
    first = model[0].weight
    gradient = torch.autograd.grad(LOSS(model(data[0]), data[1]), first, create_graph=True)[0]
    truth = torch.autograd.grad((gradient.flatten() * v[:200]).sum(), first)[0].flatten()
    close(ours, truth)
