"""How often the host waits for a device: a few times for a batch, whatever its size and that of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc

from .stand_in import DEVICE, on_device, stand_in


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0]).transpose(1, 2)


Draw = Callable[[], tuple[Tensor, Tensor]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: (torch.randn(6, 4), torch.randint(0, 3, (6,))),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        lambda: (torch.randn(6, 2, 4, 4), torch.randint(0, 3, (6,))),
    ),
    "tokens": (lambda: Tokens().eval(), lambda: (torch.randint(0, 7, (6, 5)), torch.randint(0, 3, (6, 5)))),
}
# Most reads for a batch after the first: the checks of the loss (one read for all of them), the number of columns that
# its positions need, and whether they are signed.
LOSS = 3
QUANTITIES: dict[str, tuple[Callable[[nn.Module, Any], Any], int]] = {
    "dense": (lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d).dense(), LOSS),
    "diagonal": (lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d).diagonal(), LOSS),
    "kronecker": (lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d).kronecker(), LOSS),
    "gram": (lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d).gram(), LOSS),
    "@": (lambda m, d: _product(tc.GaussNewton(m, nn.CrossEntropyLoss(), d)), 2),
    "gradient second moment": (lambda m, d: tc.EmpiricalFisher(m, nn.CrossEntropyLoss(), d).dense(), 1),
    "gradient norms": (lambda m, d: tc.EmpiricalFisher(m, nn.CrossEntropyLoss(), d).gradient_norms(), 1),
    "sampled Fisher": (lambda m, d: tc.Fisher(m, nn.CrossEntropyLoss(), d, samples=2).diagonal(), LOSS),
    "Jacobian gram": (lambda m, d: tc.Jacobian(m, d).gram(), 0),
    "Hessian": (lambda m, d: tc.Hessian(m, nn.CrossEntropyLoss(), d).dense(), LOSS),
    "Hessian diagonal": (lambda m, d: tc.Hessian(m, nn.CrossEntropyLoss(), d).diagonal(), LOSS),
    "Hessian @": (lambda m, d: _product(tc.Hessian(m, nn.CrossEntropyLoss(), d)), 1),
}
# Beside these: rows of an embedding table are those that the batch uses (a data-dependent shape, once or twice), and
# the channels of a convolution that a position connects, once.
OF_THE_MODEL = {"mlp": 0, "convolution": 1, "tokens": 4}
PLACES = 2  # index tensors sent for a batch, of layers whose output does not lie sample by sample: Hessians only


def _product(matrix: Any) -> Tensor:
    return matrix @ torch.ones(sum(p.numel() for p in matrix.parameters.values()), device=DEVICE)


def counted(model: nn.Module, batches: list[Any], quantity: Callable[..., Any]) -> tuple[Counter, Counter]:
    with stand_in() as gpu:
        quantity(on_device(model), [on_device(batch) for batch in batches])
        return gpu.reads, gpu.sends


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", MODELS)
def test_reads_and_sends_of_a_batch(name: str, quantity: str) -> None:
    build, draw = MODELS[name]
    model, batches = build(), [draw() for _ in range(4)]
    compute, most = QUANTITIES[quantity]
    few, many = counted(model, batches[:2], compute), counted(model, batches, compute)
    reads, sends = ((b - a) for a, b in zip(few, many))
    assert reads.total() <= 2 * (most + OF_THE_MODEL[name]), reads
    assert sends.total() <= 2 * (PLACES if "Hessian" in quantity and name == "tokens" else 0), sends


@pytest.mark.parametrize("quantity", ["dense", "@", "Hessian", "Jacobian gram"])
def test_reads_do_not_grow_with_the_batch(quantity: str) -> None:
    model = MODELS["mlp"][0]()
    few, many = (
        counted(model, [(torch.randn(N, 4), torch.randint(0, 3, (N,)))], QUANTITIES[quantity][0]) for N in (4, 40)
    )
    assert few == many


def test_training_steps_after_the_first_are_tracked_without_a_read() -> None:
    """The first step checks the plan of the model against autograd's own gradient."""
    build, draw = MODELS["mlp"]
    with stand_in() as gpu:
        model, reads = on_device(build()), []
        for _ in range(3):
            x, y = on_device(draw())
            with tc.track(model) as t:
                nn.functional.cross_entropy(model(x), y).backward()
            t.gradient_norms()
            reads.append(gpu.reads.total())
        assert reads[0] > 0
        assert reads == reads[:1] * 3
