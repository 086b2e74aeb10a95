"""Every loss on a stand-in for a GPU: value, gradient, columns, products, Fisher matrices and draws as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_curvature as tc
from tests.losses.loss_cases import CASES, Case, normal
from tests.losses.test_callables import GENERIC

from .stand_in import DEVICE, on_device, same, stand_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def quantities(loss_fn: Any, outputs: Tensor, targets: Any, device: torch.device) -> dict[str, Any]:
    """All that a bound loss gives; where it refuses, the error's type."""
    loss = tc.losses.interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    u = torch.arange(2.0 * outputs.numel(), device=device).sin().view(2, *outputs.shape)

    def fisher() -> Any:
        draws = torch.Generator(device).manual_seed(3)
        return list(bound.fisher_columns(2)), bound.sample_columns(2, draws)

    found = {
        "value": bound.value(),
        "gradient": bound.gradient(),
        "columns": list(bound.columns(2)),
        "products": bound.hessian_product(u),
        "denominator": loss.combine([bound.denominator, bound.denominator]),
    }
    try:
        found["fisher"] = fisher()
    except ValueError as error:
        found["fisher"] = type(error).__name__
    return found


def check(loss_fn: Callable[..., Any], outputs: Tensor, targets: Any) -> None:
    expected = quantities(loss_fn, outputs, targets, torch.device("cpu"))
    with stand_in():
        found = quantities(on_device(loss_fn), on_device(outputs), on_device(targets), DEVICE)
        for name, value in expected.items():
            same(found[name], value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_of_torch(case: Case) -> None:
    outputs, targets = case.draw(4, torch.Generator().manual_seed(11))
    check(case.loss("mean"), outputs, targets)


@pytest.mark.parametrize("name", GENERIC)
def test_callables(name: str) -> None:
    generator = torch.Generator().manual_seed(12)
    check(GENERIC[name]("sum"), normal(generator, 4, 3, 4), normal(generator, 4, 3, 4))


@pytest.mark.parametrize("transfer", ["identity", "sigmoid", "softmax", "exp", "tanh"])
def test_matching_losses(transfer: str) -> None:
    generator = torch.Generator().manual_seed(13)
    outputs = normal(generator, 4, 3)
    targets = normal(generator, 4, 3).softmax(1)
    check(tc.MatchingLoss(transfer), outputs, targets)
