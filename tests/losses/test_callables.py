"""Callables: recognised as a loss of torch by what they compute, or proved separable, or refused with advice."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import WEIGHT, indices, normal, uniform
from loss_oracle import block_diagonal, full_gradient, full_hessian, sum_of_columns
from torch import Tensor, nn

from torch_curvature.losses import interpret
from torch_curvature.losses.generic import GenericLoss
from torch_curvature.losses.softmax import SoftmaxLoss

REDUCTIONS = ("sum", "mean")
LossFunction = Callable[[Tensor, Any], Tensor]
Maker = Callable[[str], LossFunction]


class Wrapped(nn.Module):
    """A user's module around a loss of torch, which moves the classes."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=WEIGHT, reduction=reduction, label_smoothing=0.1)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs.permute(0, 2, 1).contiguous(), targets)


def check(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Any:
    """All derivatives against those of the loss itself; the bound loss."""
    loss = interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    total = loss.combine([bound.denominator])
    expected = full_hessian(loss_fn, outputs, targets)
    torch.testing.assert_close(bound.value() / total, loss_fn(outputs, targets))
    torch.testing.assert_close(bound.gradient() / total, full_gradient(loss_fn, outputs, targets))
    for max_columns in (None, 2):
        chunks = list(bound.columns(max_columns))
        assert sum(len(s) for s, _ in chunks) == bound.num_columns
        hessian = block_diagonal(sum_of_columns(chunks, outputs.shape)) / total
        torch.testing.assert_close(hessian, expected)
    u = torch.randn(2, *outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = bound.hessian_product(u).reshape(2, -1) / total
    torch.testing.assert_close(product, u.reshape(2, -1) @ expected)
    return bound


TOKENS: dict[str, Maker] = {  # outputs [N, T, 5], targets [N, T] with ignored ones
    "transpose": lambda r: lambda u, y: F.cross_entropy(u.transpose(1, 2), y, reduction=r),
    "view": lambda r: lambda u, y: F.cross_entropy(u.view(-1, 5), y.view(-1), reduction=r),
    "flatten": lambda r: lambda u, y: F.cross_entropy(u.flatten(0, 1), y.flatten(), WEIGHT, reduction=r),
    "shift": lambda r: lambda u, y: F.cross_entropy(u[:, :-1].reshape(-1, 5), y[:, 1:].reshape(-1), reduction=r),
    "masked": lambda r: lambda u, y: F.cross_entropy(u[y != -100], y[y != -100], reduction=r),
    "time first": lambda r: (
        lambda u, y: F.cross_entropy(u.transpose(0, 1).reshape(-1, 5), y.T.reshape(-1), reduction=r)
    ),
    "classes reordered": lambda r: lambda u, y: F.cross_entropy(u.flip(2).transpose(1, 2), y, reduction=r),
    "module": Wrapped,
    "criterion": lambda r: lambda u, y: nn.CrossEntropyLoss(reduction=r)(u.mT, y),
    "log_softmax": lambda r: lambda u, y: F.nll_loss(F.log_softmax(u.flatten(0, 1), -1), y.flatten(), reduction=r),
    "positional": lambda r: lambda u, y: F.cross_entropy(u.mT, y, None, None, -100, None, r, 0.1),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("samples", [1, 3])
def test_flattened_tokens_are_recognised(name: str, reduction: str, samples: int) -> None:
    generator = torch.Generator().manual_seed(3)
    outputs, targets = normal(generator, samples, 4, 5), indices(generator, 5, (samples, 4), -100)
    targets[0, 1] = 3
    assert isinstance(check(TOKENS[name](reduction), outputs, targets), SoftmaxLoss)


REARRANGED: dict[str, tuple[Maker, tuple[int, ...], tuple[int, ...]]] = {
    "squeeze": (lambda r: lambda u, y: F.mse_loss(u.squeeze(-1), y, reduction=r), (4, 1), (4,)),
    "unsqueeze": (lambda r: lambda u, y: F.mse_loss(u.unsqueeze(1), y, reduction=r), (4, 3), (4, 1, 3)),
    "column": (lambda r: lambda u, y: F.binary_cross_entropy_with_logits(u[:, 1], y, reduction=r), (4, 3), (4,)),
    "transposed": (lambda r: lambda u, y: F.huber_loss(u.mT, y, reduction=r), (4, 3, 2), (4, 2, 3)),
    "whole": (lambda r: lambda u, y: F.mse_loss(u.T, y.T, reduction=r), (4, 3), (4, 3)),
    "stack": (lambda r: lambda u, y: F.mse_loss(torch.stack([u[:, 2], u[:, 0]], 1), y, reduction=r), (4, 3), (4, 2)),
    "soft classes": (lambda r: lambda u, y: F.cross_entropy(u.mT, y.mT, reduction=r), (4, 2, 3), (4, 2, 3)),
    "class subset": (lambda r: lambda u, y: F.cross_entropy(u[:, :3], y, reduction=r), (4, 5), (4, 3)),
    "classes on two axes": (lambda r: lambda u, y: F.cross_entropy(u.flatten(1), y, reduction=r), (4, 2, 3), (4, 6)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", REARRANGED)
def test_rearranged_outputs_are_recognised(name: str, reduction: str) -> None:
    maker, output_shape, target_shape = REARRANGED[name]
    generator = torch.Generator().manual_seed(4)
    bound = check(maker(reduction), normal(generator, *output_shape), uniform(generator, *target_shape))
    assert not isinstance(bound, GenericLoss)


def random_rearrangement(seed: int) -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    """A shape of outputs, and a random chain of permutations, slices, flips and reshapes of them."""
    draw = random.Random(seed)
    shape = (draw.choice([2, 3]), *(draw.choice([1, 2, 3, 4]) for _ in range(draw.choice([1, 2, 3]))))
    steps: list[Callable[[Tensor], Tensor]] = []
    probe = torch.empty(shape)
    for _ in range(draw.choice([1, 2, 3, 4])):
        kind, axis = draw.choice(["permute", "slice", "flip", "flatten", "unsqueeze"]), draw.randrange(probe.dim())
        if kind == "permute":
            order = draw.sample(range(probe.dim()), probe.dim())
            steps.append(lambda x, o=order: x.permute(o))
        elif kind == "slice" and probe.shape[axis] > 1:
            steps.append(lambda x, a=axis: x.narrow(a, 1, x.shape[a] - 1))
        elif kind == "flip":
            steps.append(lambda x, a=axis: x.flip(a))
        elif kind == "flatten" and axis + 1 < probe.dim():
            steps.append(lambda x, a=axis: x.flatten(a, a + 1))
        else:
            steps.append(lambda x, a=axis: x.unsqueeze(a))
        probe = steps[-1](probe)
    return shape, lambda x: functools.reduce(lambda value, step: step(value), steps, x)


@pytest.mark.parametrize("seed", range(60))
def test_random_rearrangements(seed: int) -> None:
    """Exact whatever the rearrangement; a softmax that mixes samples is refused."""
    shape, rearrange = random_rearrangement(seed)
    generator = torch.Generator().manual_seed(seed)
    outputs = normal(generator, *shape)
    for reduction in REDUCTIONS:
        y = uniform(generator, *rearrange(outputs).shape)
        bound = check(lambda u, t, y=y, r=reduction: F.mse_loss(rearrange(u), y, reduction=r), outputs, None)
        assert not isinstance(bound, GenericLoss)
    if rearrange(outputs).dim() > 1:
        owner = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        owner = rearrange(owner).movedim(1, -1)

        def loss_fn(u: Tensor, t: Any) -> Tensor:
            return F.cross_entropy(rearrange(u), y)

        if bool((owner == owner[..., :1]).all()):
            assert isinstance(check(loss_fn, outputs, None), SoftmaxLoss)
        else:
            with pytest.raises(ValueError, match=r"neither the sum|couples|on sample 0 alone"):
                interpret(loss_fn).bind(outputs, None)


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
