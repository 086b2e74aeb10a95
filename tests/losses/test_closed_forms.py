"""Value, gradient, Hessian, its square root and its products of every loss of torch, against the loss itself."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch

from tests.losses.loss_cases import CASES, GRID, IDS, Case
from tests.losses.loss_oracle import block_diagonal, full_gradient, full_hessian, sum_of_columns
from torch_curvature.losses import interpret
from torch_curvature.losses.functional import CLOSED_FORMS
from torch_curvature.losses.generic import GenericLoss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(("case", "reduction"), GRID, ids=IDS)
@pytest.mark.parametrize("samples", [1, 4])
def test_matches_the_loss_itself(case: Case, reduction: str, samples: int) -> None:
    generator = torch.Generator().manual_seed(samples)
    outputs, targets = case.draw(samples, generator)
    loss_fn = case.loss(reduction)
    loss = interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    assert not isinstance(bound, GenericLoss)
    total = loss.combine([bound.denominator])
    assert loss.normalisation == ("sum" if reduction == "sum" else "mean")

    expected_hessian = full_hessian(loss_fn, outputs, targets)
    expected_gradient = full_gradient(loss_fn, outputs, targets)
    torch.testing.assert_close(bound.value() / total, loss_fn(outputs, targets))
    torch.testing.assert_close(bound.gradient() / total, expected_gradient)
    for max_columns in (None, 1, 3):
        chunks = list(bound.columns(max_columns))
        assert sum(len(s) for s, _ in chunks) == bound.num_columns
        assert all(len(s) <= (max_columns or math.inf) for s, _ in chunks)
        hessian = block_diagonal(sum_of_columns(chunks, outputs.shape)) / total
        torch.testing.assert_close(hessian, expected_hessian)
    u = torch.randn(3, *outputs.shape, dtype=torch.float64, generator=generator)
    product = bound.hessian_product(u).reshape(3, -1) / total
    torch.testing.assert_close(product, u.reshape(3, -1) @ expected_hessian)


@pytest.mark.parametrize(("case", "reduction"), GRID, ids=IDS)
def test_value_is_twice_differentiable(case: Case, reduction: str) -> None:
    outputs, targets = case.draw(3, torch.Generator().manual_seed(8))
    loss_fn = case.loss(reduction)
    loss = interpret(loss_fn)

    def value(x: torch.Tensor) -> torch.Tensor:
        bound = loss.bind(x, targets)
        return bound.value() / bound.denominator

    x = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x, create_graph=True)
    torch.testing.assert_close(gradient.detach(), full_gradient(loss_fn, outputs, targets))
    u = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, x, u, allow_unused=True)
        product = torch.zeros_like(x) if product is None else product
    else:
        product = torch.zeros_like(x)
    expected = full_hessian(loss_fn, outputs, targets) @ u.flatten()
    torch.testing.assert_close(product.flatten(), expected)


def test_every_closed_form_has_a_case() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covered = {interpret(case.loss("sum")).name for case in CASES}
    assert covered == {form.name for form in CLOSED_FORMS}


@pytest.mark.parametrize(
    ("name", "legacy", "modern"),
    [
        ("mse_loss", {"size_average": False}, "sum"),
        ("mse_loss", {"size_average": True}, "mean"),
        ("mse_loss", {"reduce": True, "reduction": "sum"}, "mean"),
        ("cross_entropy", {"size_average": False, "reduction": "mean"}, "sum"),
    ],
)
def test_deprecated_arguments_mean_what_torch_makes_of_them(name: str, legacy: dict, modern: str) -> None:
    function = getattr(torch.nn.functional, name)
    outputs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 2, 1, 1]) if name == "cross_entropy" else outputs.flip(0)
    loss = interpret(functools.partial(function, **legacy))
    bound = loss.bind(outputs, targets)
    assert loss.normalisation == modern
    torch.testing.assert_close(bound.value() / bound.denominator, function(outputs, targets, **legacy))


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weight_of_every_element(name: str, reduction: str) -> None:
    """The mean divides by the sum of the weights."""
    generator = torch.Generator().manual_seed(2)
    outputs, targets = (torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.rand(3, 4, dtype=torch.float64, generator=generator)

    loss_fn = functools.partial(getattr(torch.nn.functional, name), weight=weight, reduction=reduction)
    bound = interpret(loss_fn).bind(outputs, targets)
    hessian = block_diagonal(sum_of_columns(bound.columns(), outputs.shape)) / bound.denominator
    torch.testing.assert_close(hessian, full_hessian(loss_fn, outputs, targets))
    torch.testing.assert_close(bound.value() / bound.denominator, loss_fn(outputs, targets))


def test_columns_are_no_more_than_needed() -> None:
    """Softmax: C - 1 (one for two classes); only valid positions; only elements inside the quadratic part of Huber."""
    cross_entropy = interpret(torch.nn.functional.cross_entropy)
    assert cross_entropy.bind(torch.randn(6, 10), torch.zeros(6, dtype=torch.long)).num_columns == 9
    assert cross_entropy.bind(torch.randn(6, 2), torch.zeros(6, dtype=torch.long)).num_columns == 1
    y = torch.full((3, 7), -100)
    y[0, 6] = y[1, 0] = y[1, 3] = 2
    assert cross_entropy.bind(torch.randn(3, 4, 7), y).num_columns == 2 * 3
    assert cross_entropy.bind(torch.randn(3, 4, 7), torch.full((3, 7), -100)).num_columns == 0
    huber = interpret(torch.nn.functional.huber_loss)
    assert huber.bind(torch.tensor([[0.1, 5.0, 5.0], [5.0, 5.0, 0.1]]), torch.zeros(2, 3)).num_columns == 1
    assert interpret(torch.nn.functional.l1_loss).bind(torch.randn(2, 3), torch.zeros(2, 3)).num_columns == 0
