"""Callables that are a loss of torch on rearranged outputs, recognised by what they compute."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.losses.loss_cases import WEIGHT, indices, normal, uniform
from tests.losses.loss_oracle import check
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
