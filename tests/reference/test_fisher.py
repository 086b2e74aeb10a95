"""Fisher matrices by enumerating what the model predicts, and the denominators that normalise them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_curvature import reference


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def second_moment(
    u: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor], outcomes: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """`E_y [s s^T]` over outcomes `(y, probability)` of one prediction, `s` the gradient of its loss in u."""
    total = u.new_zeros(u.numel(), u.numel())
    for y, probability in outcomes:
        s = reference.output_gradient(loss_fn, u, y).flatten()
        total += probability * torch.outer(s, s)
    return total


def test_softmax_is_the_expectation_over_classes() -> None:
    u = torch.randn(1, 4)
    outcomes = [(torch.tensor([c]), u.softmax(-1)[0, c]) for c in range(4)]
    truth = second_moment(u, F.cross_entropy, outcomes)
    torch.testing.assert_close(reference.output_fisher(nn.CrossEntropyLoss(), u, torch.tensor([2])), truth)
    log_p = u.log_softmax(-1)
    truth = second_moment(log_p, F.nll_loss, outcomes)
    torch.testing.assert_close(reference.output_fisher(F.nll_loss, log_p, torch.tensor([2])), truth)
    divergence = nn.KLDivLoss(reduction="batchmean")
    truth = second_moment(log_p, divergence, [(F.one_hot(y, 4).to(u), p) for y, p in outcomes])
    torch.testing.assert_close(reference.output_fisher(divergence, log_p, torch.rand(1, 4).softmax(-1)), truth)


def test_bernoulli_is_the_expectation_over_both_outcomes() -> None:
    u = torch.randn(1, 1)
    for loss_fn, point in ((nn.BCEWithLogitsLoss(), u), (nn.BCELoss(), u.sigmoid())):
        outcomes = [(torch.full((1, 1), y), (u if y else -u).sigmoid()[0, 0]) for y in (0.0, 1.0)]
        truth = second_moment(point, loss_fn, outcomes)
        torch.testing.assert_close(reference.output_fisher(loss_fn, point, torch.rand(1, 1)), truth)


@pytest.mark.parametrize("log_input", [True, False])
def test_poisson_is_the_expectation_over_counts(log_input: bool) -> None:
    u = torch.rand(1, 1) + 0.3
    loss_fn = nn.PoissonNLLLoss(log_input=log_input)
    rate = u.exp() if log_input else u + loss_fn.eps
    counts = torch.arange(60, dtype=torch.float64)
    p = (counts * rate.log() - rate - (counts + 1).lgamma()).exp()[0]
    truth = second_moment(u, loss_fn, [(c.reshape(1, 1), w) for c, w in zip(counts, p, strict=True)])
    torch.testing.assert_close(reference.output_fisher(loss_fn, u, torch.ones(1, 1)), truth)


def test_continuous_targets_are_an_integral() -> None:
    u = torch.randn(1, 1)
    y = u + torch.linspace(-12, 12, 24001, dtype=torch.float64).reshape(-1, 1, 1)
    width = 24 / 24000
    normal = functools.partial(F.gaussian_nll_loss, var=torch.tensor([[0.7]]))
    for loss_fn, density in (
        (F.mse_loss, (-((y - u) ** 2)).exp() / torch.pi**0.5),
        (F.l1_loss, (-(y - u).abs()).exp() / 2),
        (normal, (-((y - u) ** 2) / 1.4).exp() / (1.4 * torch.pi) ** 0.5),
    ):
        scores = torch.stack([reference.output_gradient(loss_fn, u, one)[0, 0] for one in y[::20]])
        truth = (scores**2 * density[::20].flatten()).sum() * 20 * width
        found = reference.output_fisher(loss_fn, u, torch.randn(1, 1))
        torch.testing.assert_close(found[0, 0], truth, rtol=2e-2 if loss_fn is F.l1_loss else 1e-6, atol=0)


EQUAL_TO_GAUSS_NEWTON: dict[str, tuple[Any, Callable[[], Tensor]]] = {
    "cross entropy": (nn.CrossEntropyLoss(), lambda: torch.randint(3, (5,))),
    "weights, ignored, smoothed": (
        functools.partial(F.cross_entropy, weight=torch.tensor([0.3, 2.0, 1.1]), ignore_index=1, label_smoothing=0.2),
        lambda: torch.tensor([0, 1, 2, 2, 1]),
    ),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(3, (5,))),
    "probabilities": (nn.CrossEntropyLoss(weight=torch.rand(3), label_smoothing=0.1), lambda: torch.rand(5, 3)),
    "binary": (nn.BCEWithLogitsLoss(weight=torch.rand(3), pos_weight=torch.rand(3)), lambda: torch.rand(5, 3)),
    "squared error": (nn.MSELoss(), lambda: torch.randn(5, 3)),
    "squared error, sum": (functools.partial(F.mse_loss, reduction="sum"), lambda: torch.randn(5, 3)),
    "poisson": (nn.PoissonNLLLoss(), lambda: torch.randint(3, (5, 3)).double()),
}


@pytest.mark.parametrize("name", EQUAL_TO_GAUSS_NEWTON)
def test_fisher_is_gauss_newton_in_natural_parameters(name: str) -> None:
    loss_fn, targets = EQUAL_TO_GAUSS_NEWTON[name]
    if isinstance(loss_fn, functools.partial) and "weight" in loss_fn.keywords:
        loss_fn = functools.partial(loss_fn, weight=loss_fn.keywords["weight"].double())
    elif isinstance(loss_fn, nn.Module):
        loss_fn = loss_fn.double()
    network, data = model(), (torch.randn(5, 3), targets())
    found = reference.fisher(network, loss_fn, data)
    torch.testing.assert_close(found, reference.gauss_newton(network, loss_fn, data))
    assert torch.equal(found, found.mT)


def test_tokens_are_predictions_of_their_own() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Unflatten(1, (4, 2)))
    targets = torch.tensor([[0, 3], [-100, 2], [1, -100]])
    data = (torch.randn(3, 3), targets)
    loss_fn = nn.CrossEntropyLoss(weight=torch.rand(4))
    found = reference.fisher(network, loss_fn, data)
    torch.testing.assert_close(found, reference.gauss_newton(network, loss_fn, data))


DENOMINATORS: dict[str, tuple[Any, Tensor, Tensor, float]] = {
    "sum": (nn.MSELoss(reduction="sum"), torch.randn(4, 3), torch.randn(4, 3), 1.0),
    "elements": (nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 3), 12.0),
    "samples": (F.cross_entropy, torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), 4.0),
    "valid targets": (nn.CrossEntropyLoss(ignore_index=2), torch.randn(4, 3), torch.tensor([0, 1, 2, 2]), 2.0),
    "class weights": (
        functools.partial(F.cross_entropy, weight=torch.tensor([0.5, 2.0, 4.0])),
        torch.randn(4, 3),
        torch.tensor([0, 1, 2, 2]),
        10.5,
    ),
    "tokens": (nn.CrossEntropyLoss(), torch.randn(2, 3, 5), torch.randint(3, (2, 5)), 10.0),
    "batch": (nn.KLDivLoss(reduction="batchmean"), torch.randn(4, 3), torch.rand(4, 3), 4.0),
    "perfect fit": (nn.MSELoss(), torch.ones(4, 3), torch.ones(4, 3), 12.0),
}


@pytest.mark.parametrize("name", DENOMINATORS)
def test_denominator(name: str) -> None:
    loss_fn, outputs, targets, truth = DENOMINATORS[name]
    found = reference.denominator(loss_fn, outputs, targets)
    torch.testing.assert_close(found, torch.tensor(truth, dtype=outputs.dtype))


def test_denominators_that_cannot_be_known_are_asked_for() -> None:
    outputs, targets = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="pass denominator"):
        reference.denominator(lambda u, y: ((u - y) ** 2).mean(), outputs, targets)
    with pytest.raises(ValueError, match="no valid target"):
        reference.denominator(nn.CrossEntropyLoss(), outputs, torch.full((3,), -100))

    def odd(u: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        loss = (u - y) ** 2
        return loss.sum() if reduction == "sum" else loss[:1].mean() + loss[1:].mean()

    with pytest.raises(ValueError, match="not its sum over one number"):
        reference.denominator(odd, outputs, targets)
    with pytest.raises(NotImplementedError, match="cross_entropy"):
        reference.output_fisher(nn.HuberLoss(), outputs, targets)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_fisher_sums_over_single_samples(reduction: str) -> None:
    network, x = model(), torch.randn(5, 3)
    for loss_fn, y in (
        (nn.MSELoss(reduction=reduction), torch.randn(5, 3)),
        (nn.CrossEntropyLoss(weight=torch.rand(3), reduction=reduction), torch.randint(3, (5,))),
    ):
        divisor = reference.denominator(loss_fn, network(x), y)
        total = torch.zeros(31, 31)
        summed = type(loss_fn)(**({"weight": loss_fn.weight} if y.ndim == 1 else {}), reduction="sum")
        for n in range(5):
            network.zero_grad()
            summed(network(x[n : n + 1]), y[n : n + 1]).backward()
            gradient = torch.cat([p.grad.flatten() for p in network.parameters()])
            total += torch.outer(gradient, gradient)
        torch.testing.assert_close(reference.empirical_fisher(network, loss_fn, (x, y)), total / divisor)
        asked = reference.empirical_fisher(network, lambda u, t, f=loss_fn: f(u, t), (x, y), denominator=divisor)
        torch.testing.assert_close(asked, total / divisor)
