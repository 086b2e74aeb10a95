"""Exact Fisher columns against an explicit expectation over targets, and Monte Carlo columns against both.

The oracle enumerates (or integrates) the model's predictive distribution of every position, takes the score of each
target by autograd of the unweighted loss, and multiplies by the observed mass of the position, written out once more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.losses.loss_cases import WEIGHT, indices, normal, uniform
from tests.losses.loss_oracle import block_diagonal, sum_of_columns
from torch_curvature import reference
from torch_curvature.losses import interpret

partial = functools.partial
Information = Callable[[Tensor], Tensor]


def second_moment(score_of: Callable[[Tensor], Tensor], targets: list[Tensor], chances: list[Tensor]) -> Tensor:
    """`sum_y p(y) s(y) s(y)^T`."""
    return sum(p * torch.outer(score_of(y), score_of(y)) for y, p in zip(targets, chances))  # type: ignore[return-value]


def score(loss: Callable[[Tensor, Tensor], Tensor], u: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.func.grad(lambda v: loss(v, y))(u)


def softmax_information(u: Tensor) -> Tensor:
    classes = [torch.tensor(k) for k in range(len(u))]
    return second_moment(score(F.cross_entropy, u), classes, list(u.softmax(0)))


def log_probability_information(u: Tensor) -> Tensor:
    classes = [torch.tensor(k) for k in range(len(u))]
    return second_moment(score(F.nll_loss, u), classes, list(u.exp()))


def scalar_information(
    loss: Callable[[Tensor, Tensor], Tensor], distribution: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]
) -> Information:
    def information(u: Tensor) -> Tensor:
        targets, chances = distribution(u)
        return sum(p * score(loss, u)(y) ** 2 for y, p in zip(targets, chances))  # type: ignore[return-value]

    return information


def bernoulli(p: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.zeros_like(p), torch.ones_like(p)], [1 - p, p]


def poisson(rate: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    counts = torch.arange(60, dtype=torch.float64)
    return list(counts), list((counts * rate.log() - rate - torch.lgamma(counts + 1)).exp())


def gaussian(mean: Tensor, variance: float) -> tuple[list[Tensor], list[Tensor]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    points = [mean + math.sqrt(variance) * x for x in nodes]
    return points, [torch.tensor(w) / math.sqrt(2 * math.pi) for w in weights]


def laplace(mean: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The score of |u - y| takes one value on either side of u."""
    return [mean - 1, mean + 1], [torch.tensor(0.5), torch.tensor(0.5)]


def index_mass(weight: Tensor | None, ignored: int, smoothing: float, classes: int, y: int) -> float:
    if y == ignored:
        return 0.0
    w = torch.ones(classes) if weight is None else weight
    return float((1 - smoothing) * w[y] + smoothing * w.sum() / classes)


def per_position(outputs: Tensor, class_axis: bool, information: Information, mass: Callable[[tuple], float]) -> Tensor:
    """`[N * C, N * C]`: the information of each position times its mass, at its place."""
    total = torch.zeros(outputs.numel(), outputs.numel(), dtype=outputs.dtype)
    places = torch.arange(outputs.numel()).reshape(outputs.shape)
    rest = [outputs.shape[0], *outputs.shape[2:]] if class_axis else list(outputs.shape)
    for where in itertools.product(*(range(size) for size in rest)):
        at: tuple[Any, ...] = (where[0], slice(None), *where[1:]) if class_axis else where
        place = places[at].reshape(-1)
        total[place.unsqueeze(1), place] = mass(where) * information(outputs[at])
    return total


def class_case(rest: tuple[int, ...], weight: Tensor | None, ignored: int, smoothing: float, log: bool) -> Any:
    generator = torch.Generator().manual_seed(len(rest))
    outputs, y = 1.5 * normal(generator, 3, 5, *rest), indices(generator, 5, (3, *rest), ignored)
    if log:
        outputs = outputs.log_softmax(1)
        loss: Any = partial(F.nll_loss, weight=weight, ignore_index=ignored)
    else:
        loss = partial(F.cross_entropy, weight=weight, ignore_index=ignored, label_smoothing=smoothing)
    information = log_probability_information if log else softmax_information
    return loss, outputs, y, per_position(
        outputs, True, information, lambda at: index_mass(weight, ignored, smoothing, 5, int(y[at]))
    )  # fmt: skip


def soft_case(weight: Tensor | None, smoothing: float) -> Any:
    generator = torch.Generator().manual_seed(9)
    outputs, t = normal(generator, 3, 5, 2), uniform(generator, 3, 5, 2)
    w = torch.ones(5, dtype=torch.float64) if weight is None else weight

    def mass(at: tuple) -> float:
        return float((w * ((1 - smoothing) * t[at[0], :, at[1]] + smoothing / 5)).sum())

    loss = partial(F.cross_entropy, weight=weight, label_smoothing=smoothing)
    return loss, outputs, t, per_position(outputs, True, softmax_information, mass)


def elementwise_case(name: str) -> Any:
    g = torch.Generator().manual_seed(4)
    u, y = normal(g, 3, 2, 2), (uniform(g, 3, 2, 2) * 3).floor()
    one: Callable[[tuple], float] = lambda at: 1.0  # noqa: E731
    if name == "bce_logits":
        weight, positive = uniform(g, 2), 3 * uniform(g, 2, 1)
        y = uniform(g, 3, 2, 2)
        loss: Any = nn.BCEWithLogitsLoss(weight=weight, pos_weight=positive)
        information = scalar_information(F.binary_cross_entropy_with_logits, lambda v: bernoulli(v.sigmoid()))
        return loss, u, y, per_position(
            u, False, information,
            lambda at: float(weight[at[2]] * (positive[at[1], 0] * y[at] + 1 - y[at])),
        )  # fmt: skip
    if name == "bce":
        u, y = 0.1 + 0.8 * uniform(g, 3, 2, 2), uniform(g, 3, 2, 2)
        information = scalar_information(F.binary_cross_entropy, bernoulli)
        weight = uniform(g, 2)
        return nn.BCELoss(weight=weight), u, y, per_position(u, False, information, lambda at: float(weight[at[2]]))
    if name == "mse":
        information = scalar_information(F.mse_loss, lambda v: gaussian(v, 0.5))
        return nn.MSELoss(), u, y, per_position(u, False, information, one)
    if name == "mse-weight":
        information = scalar_information(F.mse_loss, lambda v: gaussian(v, 0.5))
        weight = uniform(g, 3, 2, 2)
        return (
            partial(F.mse_loss, weight=weight),
            u,
            y,
            per_position(u, False, information, lambda at: float(weight[at])),
        )
    if name == "l1":
        return nn.L1Loss(), u, y, per_position(u, False, scalar_information(F.l1_loss, laplace), one)
    if name == "gaussian":
        loss = partial(F.gaussian_nll_loss, var=0.4)
        information = scalar_information(loss, lambda v: gaussian(v, 0.4))
        return loss, u, y, per_position(u, False, information, one)
    if name == "poisson":
        information = scalar_information(F.poisson_nll_loss, lambda v: poisson(v.exp()))
        return nn.PoissonNLLLoss(), u, y, per_position(u, False, information, one)
    if name == "poisson-rate":
        loss = partial(F.poisson_nll_loss, log_input=False, eps=0.1)
        information = scalar_information(loss, lambda v: poisson(v + 0.1))
        return loss, u.abs() + 0.2, y, per_position(u.abs() + 0.2, False, information, one)
    assert name == "kl_div"
    u, t = normal(g, 3, 4).log_softmax(1), uniform(g, 3, 4)
    return nn.KLDivLoss(reduction="batchmean"), u, t, per_position(
        u, True, log_probability_information, lambda at: float(t[at[0]].sum())
    )  # fmt: skip


ELEMENTWISE = (
    "bce_logits", "bce", "mse", "mse-weight", "l1", "gaussian", "poisson", "poisson-rate", "kl_div"
)  # fmt: skip
CASES: dict[str, Callable[[], Any]] = {
    **{
        f"{'nll' if log else 'cross_entropy'}-{list(rest)}-{'plain' if weight is None else 'weight'}-ignore{ignored}"
        f"-smooth{smoothing}": partial(class_case, rest, weight, ignored, smoothing, log)
        for rest in ((), (3,)) for weight in (None, WEIGHT) for ignored in (-100, 2) for smoothing in (0.0, 0.2)
        for log in (False, True) if not (log and smoothing)
    },
    **{
        f"soft-{'plain' if weight is None else 'weight'}-smooth{smoothing}": partial(soft_case, weight, smoothing)
        for weight in (None, WEIGHT) for smoothing in (0.0, 0.2)
    },
    **{name: partial(elementwise_case, name) for name in ELEMENTWISE},
}  # fmt: skip
EQUAL_TO_GAUSS_NEWTON = [
    n for n in CASES if n.split("-")[0] in ("cross_entropy", "soft", "bce_logits", "mse", "gaussian")
]


@pytest.mark.parametrize("name", CASES)
def test_exact_fisher_is_the_expectation(name: str) -> None:
    loss_fn, outputs, targets, expected = CASES[name]()
    loss = interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    for max_columns in (None, 2):
        chunks = list(bound.fisher_columns(max_columns))
        assert all(sign is None for _, sign in chunks)
        assert sum(len(s) for s, _ in chunks) == bound.num_fisher_columns
        torch.testing.assert_close(block_diagonal(sum_of_columns(chunks, outputs.shape)), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_slow_reference_agrees(name: str) -> None:
    loss_fn, outputs, targets, expected = CASES[name]()
    denominator = interpret(loss_fn).bind(outputs, targets).denominator
    torch.testing.assert_close(reference.output_fisher(loss_fn, outputs, targets), expected / denominator)


@pytest.mark.parametrize("name", [*EQUAL_TO_GAUSS_NEWTON, "poisson"])
def test_fisher_equals_gauss_newton_for_matching_losses(name: str) -> None:
    loss_fn, outputs, targets, expected = CASES[name]()
    columns = interpret(loss_fn).bind(outputs, targets).columns()
    torch.testing.assert_close(block_diagonal(sum_of_columns(columns, outputs.shape)), expected)


@pytest.mark.parametrize("name", CASES)
def test_monte_carlo_converges_to_the_fisher(name: str) -> None:
    """Every entry of the mean over 30000 draws lies in its empirical Bernstein interval of confidence 1 - 3e-8.

    `|mean - truth| <= sqrt(2 V L / n) + 7 B L / (3 (n - 1))` with L = log(2 / 3e-8) = 18, sample variance V and range B
    (Maurer and Pontil, COLT 2009): six standard errors, and a term for rare events that were not drawn.
    """
    loss_fn, outputs, targets, expected = CASES[name]()
    samples, width = 30000, math.prod(outputs.shape[1:])
    bound = interpret(loss_fn).bind(outputs, targets)
    s = bound.sample_columns(samples, torch.Generator().manual_seed(1))
    assert s.shape == (samples, *outputs.shape)
    flat = s.reshape(samples, -1, width)
    for n in range(outputs.shape[0]):
        draws = samples * flat[:, n, :, None] * flat[:, n, None, :]
        truth = expected[n * width : (n + 1) * width, n * width : (n + 1) * width]
        error = draws.std(0) / math.sqrt(samples)
        bound_on = 6 * error + 42 * (draws.max() - draws.min()) / (samples - 1)
        assert bool(((draws.mean(0) - truth).abs() <= bound_on + 1e-12).all())
        assert bool((bound_on <= 0.25 * truth.abs().max() + 1e-12).all())  # and the interval is telling


def test_draws_are_reproducible_and_leave_the_global_state_alone() -> None:
    for name in ("cross_entropy-[3]-weight-ignore2-smooth0.2", "nll-[3]-plain-ignore-100-smooth0.0", *ELEMENTWISE):
        loss_fn, outputs, targets, _ = CASES[name]()
        bound = interpret(loss_fn).bind(outputs, targets)
        before = torch.get_rng_state()
        first, second, other = (bound.sample_columns(3, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("loss_fn", "outputs", "targets", "message"),
    [
        (nn.HuberLoss(), torch.ones(2, 3), torch.zeros(2, 3), "huber_loss has no predictive distribution"),
        (nn.SmoothL1Loss(), torch.ones(2, 3), torch.zeros(2, 3), "smooth_l1_loss has no predictive distribution"),
        (lambda u, y: (u**4).sum(), torch.ones(2, 3), None, "no predictive distribution is known"),
        (nn.NLLLoss(), torch.ones(2, 3), torch.tensor([0, 1]), "must be log probabilities"),
        (nn.KLDivLoss(reduction="sum"), torch.ones(2, 3, 2), torch.ones(2, 3, 2), "the axis of the classes"),
        (F.cross_entropy, torch.ones(2, 3), -torch.ones(2, 3), "non-negative"),
        (nn.BCEWithLogitsLoss(weight=torch.tensor([-1.0, 1, 1])), torch.ones(2, 3), torch.ones(2, 3), "non-negative"),
    ],
)
def test_refused_by_name(loss_fn: Any, outputs: Tensor, targets: Any, message: str) -> None:
    bound = interpret(loss_fn).bind(outputs, targets)
    with pytest.raises(ValueError, match=message):
        bound.fisher_columns()
    with pytest.raises(ValueError, match=message):
        _ = bound.num_fisher_columns
    with pytest.raises(ValueError, match=message):
        bound.sample_columns(2)


def test_samples_must_be_positive() -> None:
    for name in ("cross_entropy-[]-plain-ignore-100-smooth0.0", "nll-[]-plain-ignore-100-smooth0.0", "mse"):
        loss_fn, outputs, targets, _ = CASES[name]()
        with pytest.raises(ValueError, match="samples must be at least 1"):
            interpret(loss_fn).bind(outputs, targets).sample_columns(0)
