"""Callables of unknown form: proved separable over samples and exact, or refused with advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.losses.loss_cases import indices, normal, uniform
from tests.losses.loss_oracle import check
from torch_curvature.losses import interpret
from torch_curvature.losses.generic import GenericLoss

REDUCTIONS = ("sum", "mean")
LossFunction = Callable[[Tensor, Any], Tensor]
Maker = Callable[[str], LossFunction]


def reduce(x: Tensor, reduction: str) -> Tensor:
    return x.sum() if reduction == "sum" else x.mean()


def focal(u: Tensor, y: Tensor, r: str) -> Tensor:
    log_p = u.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return reduce(-((1 - log_p.exp()) ** 2) * log_p, r)


GENERIC: dict[str, Maker] = {  # outputs [N, 3, 4], targets real [N, 3, 4]
    "square": lambda r: lambda u, y: reduce((u - y) ** 2, r),
    "half of a torch loss": lambda r: lambda u, y: 0.5 * F.mse_loss(u, y, reduction=r),
    "not convex": lambda r: lambda u, y: reduce((u - y).sin().prod(-1), r),
    "norm of a sample": lambda r: lambda u, y: reduce((u - y).square().sum((1, 2)).sqrt(), r),
    "coupled on axis 1": lambda r: lambda u, y: reduce((u * y).logsumexp(1), r),
    "coupled on axis 2": lambda r: lambda u, y: reduce((u + y).logsumexp(2), r),
    "linear": lambda r: lambda u, y: reduce(u * y, r),
    "constant": lambda r: lambda u, y: reduce(y.square(), r),
    "two torch losses": lambda r: lambda u, y: F.mse_loss(u[:, 0], y[:, 0], reduction=r)
    + F.huber_loss(u, y, reduction=r),
    "focal": lambda r: lambda u, y: focal(u, (y * 100).long().remainder(4)[..., 0], r),
    "temperature": lambda r: lambda u, y: F.cross_entropy(u.mT / 2.5, y.mT.softmax(1), reduction=r),
    "nonlinear at zero": lambda r: lambda u, y: F.mse_loss(torch.expm1(u), y, reduction=r),
    "used twice": lambda r: lambda u, y: F.mse_loss(torch.cat([u, u], 2), torch.cat([y, -y], 2), reduction=r),
    "distillation": lambda r: lambda u, y: F.kl_div(
        u.log_softmax(1), y.softmax(1), reduction="batchmean" if r == "mean" else r),
    "shifted": lambda r: lambda u, y: F.mse_loss(u + 1, y, reduction=r),
    "learned targets": lambda r: lambda u, y: F.mse_loss(u[:, :1], u[:, 1:2] * y[:, :1], reduction=r),
    "predicted variance": lambda r: lambda u, y: F.gaussian_nll_loss(u[:, 0], y[:, 0], u[:, 1].exp(), reduction=r),
}  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", GENERIC)
@pytest.mark.parametrize("samples", [1, 5])
def test_any_other_callable_is_exact(name: str, reduction: str, samples: int) -> None:
    generator = torch.Generator().manual_seed(7)
    outputs, targets = normal(generator, samples, 3, 4), normal(generator, samples, 3, 4)
    loss_fn = GENERIC[name](reduction)
    bound = check(loss_fn, outputs, targets)
    assert isinstance(bound, GenericLoss)
    assert bound.denominator == (samples if reduction == "mean" else 1)


def test_zero_outputs_do_not_pass_for_a_rearrangement() -> None:
    """expm1 has value 0 and slope 1 at 0, as the identity has, but curvature."""
    outputs, targets = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    assert isinstance(check(lambda u, y: F.mse_loss(torch.expm1(u), y), outputs, targets), GenericLoss)


def test_separable_axes_share_their_products() -> None:
    """A loss that couples 4 of the 3 x 4 outputs has 3 blocks of 4, found by probing."""
    generator = torch.Generator().manual_seed(1)
    outputs = normal(generator, 2, 3, 4)
    bound = interpret(lambda u, y: u.logsumexp(2).sum()).bind(outputs, None)
    assert isinstance(bound, GenericLoss)
    assert bound._blocks.shape == (2, 3, 4, 4)
    assert interpret(lambda u, y: (u**4).sum()).bind(outputs, None).num_columns == 12


class Doubled(nn.MSELoss):
    """A subclass of a loss of torch is what it computes, not what it inherits."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


def test_subclasses_and_hooks_of_torch_losses_count() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs, targets = normal(generator, 4, 3), normal(generator, 4, 3)
    check(Doubled(), outputs, targets)
    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda module, args, result: 3 * result)
    check(hooked, outputs, targets)
    loss = interpret(hooked)
    assert interpret(loss) is loss


def test_targets_of_any_form() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs, y, w = normal(generator, 4, 3), normal(generator, 4, 3), uniform(generator, 4)

    def weighted(u: Tensor, targets: Any) -> Tensor:
        return ((u - targets["y"]).square().sum(1) * targets["more"][0]).sum()

    check(weighted, outputs, {"y": y, "more": (w, None)})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_perfect_fit_still_tells_sum_from_mean(reduction: str) -> None:
    outputs = normal(torch.Generator().manual_seed(0), 3, 2)
    check(lambda u, y: reduce((u - y) ** 2, reduction), outputs, outputs.clone())


def test_loops_where_vectorising_fails() -> None:
    """A callable with data-dependent control flow cannot be vectorised over samples."""

    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        assert u.abs().max().item() < 100
        return ((u - y) ** 4).mean()

    generator = torch.Generator().manual_seed(2)
    check(loss_fn, normal(generator, 4, 3), normal(generator, 4, 3))


REFUSED: dict[str, tuple[LossFunction, str]] = {
    "contrastive": (lambda u, y: (u @ u.T).logsumexp(1).mean(), "neither the sum"),
    "normalised over the batch": (lambda u, y: ((u - u.mean(0)) ** 2).sum(), "neither the sum"),
    "weights sum": (lambda u, y: ((u - y) ** 2 * y[:, :1] ** 2).sum() / (y[:, 0] ** 2).sum(), "neither the sum"),
    "frequencies": (
        lambda u, y: F.mse_loss(u, y / y.abs().sum()), "depends on which others"),
    "not a scalar": (lambda u, y: (u - y) ** 2, "must return one number"),
    "torch loss without reduction": (lambda u, y: F.mse_loss(u, y, reduction="none"), "reduction must be one of"),
    "fixed batch size": (lambda u, y: ((u.view(4, 3) - y.view(4, 3)) ** 2).sum() * 2, "on sample 0 alone"),
    "NaN": (lambda u, y: (u * float("nan")).sum(), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_advice(name: str) -> None:
    loss_fn, message = REFUSED[name]
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(ValueError, match=message):
        interpret(loss_fn).bind(normal(generator, 4, 3), normal(generator, 4, 3))


def test_token_mean_of_unknown_form_is_refused() -> None:
    """Half of a mean over valid tokens: the denominator is not the number of samples."""
    generator = torch.Generator().manual_seed(3)
    outputs, y = normal(generator, 3, 4, 5), indices(generator, 5, (3, 4))
    y[0, 1:] = y[1, :2] = -100

    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(u.mT, y)

    with pytest.raises(ValueError, match="valid tokens"):
        interpret(loss_fn).bind(outputs, y)


def test_token_mean_hidden_by_equal_counts_is_found_in_the_next_batch() -> None:
    """Within each batch all samples have equally many valid tokens, so only a joined batch shows the denominator."""
    generator = torch.Generator().manual_seed(3)
    loss = interpret(lambda u, y: 0.5 * F.cross_entropy(u.mT, y))
    y = indices(generator, 5, (3, 4))
    loss.bind(normal(generator, 3, 4, 5), y)
    y = y.clone()
    y[:, 2:] = -100
    with pytest.raises(ValueError, match="valid tokens"):
        loss.bind(normal(generator, 3, 4, 5), y)


def test_mean_over_batches_of_unequal_shapes_must_be_said_to_be_over_samples() -> None:
    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        return ((u - y) ** 4).mean()

    generator = torch.Generator().manual_seed(3)
    batches = [(normal(generator, 2, length), normal(generator, 2, length)) for length in (3, 5)]
    loss = interpret(loss_fn)
    loss.bind(*batches[0])
    with pytest.raises(ValueError, match="unequal shapes"):
        loss.bind(*batches[1])
    loss = interpret(loss_fn, reduction="mean")
    assert loss.combine([loss.bind(*batch).denominator for batch in batches]) == 4


def test_samples_coupled_in_the_second_derivative_alone() -> None:
    """Where u = y the value and the gradient of this loss are those of its samples alone."""
    outputs = normal(torch.Generator().manual_seed(3), 4, 3)

    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        return (u**4).sum() + ((u - y) * (u - y).roll(1, 0)).sum()

    with pytest.raises(ValueError, match="couples the samples"):
        interpret(loss_fn).bind(outputs, outputs.clone())


def test_a_torch_loss_that_loses_its_weight_when_recorded() -> None:
    """torch drops the weight of l1_loss while a function mode is active; the loss called plainly tells."""
    weight = torch.full((4, 3), 2.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    outputs, targets = normal(generator, 4, 3), normal(generator, 4, 3)

    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        return F.l1_loss(u, y, reduction="sum", weight=weight[: len(u)])

    check(loss_fn, outputs, targets)


def test_coupling_too_weak_for_the_gradient_is_found_in_float32() -> None:
    loss = interpret(lambda u, y: u.square().sum() + 1e-6 * (u * u.roll(1, 0)).sum())
    with pytest.raises(ValueError, match="neither the sum"):
        loss.bind(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), None)


def test_reduction_given_is_checked_and_undetermined_refused() -> None:
    outputs = normal(torch.Generator().manual_seed(0), 3, 2)
    with pytest.raises(ValueError, match="reduction='mean' was given"):
        interpret(lambda u, y: (u**2).sum(), reduction="mean").bind(outputs, None)
    with pytest.raises(ValueError, match="sum and mean cannot be told apart"):
        interpret(lambda u, y: (u * 0).sum()).bind(outputs, None)
    loss = interpret(lambda u, y: (u * 0).sum(), reduction="sum")
    assert loss.bind(outputs, None).num_columns == 0
    with pytest.raises(ValueError, match="was given, but mse_loss"):
        interpret(nn.MSELoss(), reduction="sum")
    with pytest.raises(ValueError, match="once a batch was bound"):
        _ = interpret(lambda u, y: (u**2).sum()).normalisation
    with pytest.raises(ValueError, match="should be a sum"):
        interpret(lambda u, y: F.mse_loss(u, y), reduction="sum").bind(outputs, outputs)


def test_too_large_a_block_is_refused_but_products_work() -> None:
    outputs = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0))
    bound = interpret(lambda u, y: 0.5 * u.logsumexp(1).sum()).bind(outputs, None)
    u = torch.randn(1, 1, 20000, generator=torch.Generator().manual_seed(1))
    p = outputs.double().softmax(1)
    expected = 0.5 * (p * u[0] - p * (p * u[0]).sum())
    torch.testing.assert_close(bound.hessian_product(u)[0], expected.float())
    with pytest.raises(ValueError, match="GiB"):
        list(bound.columns())


def test_wrong_second_derivative_is_refused() -> None:
    """A function whose hand-written derivative is no gradient has a Hessian that is not symmetric."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor) -> Tensor:
            ctx.save_for_backward(u)
            return u.sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (u,) = ctx.saved_tensors
            return grad * torch.stack([u[:, 1], 3 * u[:, 0]], 1)

    outputs = normal(torch.Generator().manual_seed(0), 3, 2)
    bound = interpret(lambda u, y: Wrong.apply(u)).bind(outputs, None)
    with pytest.raises(ValueError, match="not symmetric"):
        list(bound.columns())
