"""The list of losses, options, output shapes and targets that the tests of this folder run over."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

partial = functools.partial


@dataclass(frozen=True)
class Case:
    """`loss(reduction)` builds the loss; `draw(N, generator)` its outputs and targets, in float64."""

    name: str
    loss: Callable[[str], Callable[..., Any]]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Any]]
    reductions: tuple[str, ...] = ("sum", "mean")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def indices(generator: torch.Generator, classes: int, shape: tuple[int, ...], ignored: int | None = None) -> Tensor:
    """Class indices; with `ignored`, a third of them ignored. The first target is 0, valid and of some weight."""
    y = torch.randint(0, classes, shape, generator=generator)
    if ignored is not None:
        drop = torch.rand(shape, generator=generator) < 0.35
        y = torch.where(drop, ignored, torch.where(y == ignored, (y + 1) % classes, y))
    y[(0,) * len(shape)] = 0
    return y


WEIGHT = torch.tensor([0.3, 2.0, 0.0, 1.1, 0.7], dtype=torch.float64)


def _class_cases(classes: int = 5) -> Iterator[Case]:
    def draw(n: int, g: torch.Generator, rest: tuple[int, ...], ignored: int | None) -> tuple[Tensor, Tensor]:
        return 2 * normal(g, n, classes, *rest), indices(g, classes, (n, *rest), ignored)

    for rest, weight, ignored, smoothing in itertools.product(
        ((), (4,), (2, 3)), (None, WEIGHT), (None, -100, 1), (0.0, 0.15)
    ):
        options: dict[str, Any] = {"weight": weight, "ignore_index": -100 if ignored is None else ignored}
        name = f"{list(rest)}-{'plain' if weight is None else 'weight'}-ignore{ignored}-smooth{smoothing}"
        case_draw = partial(draw, rest=rest, ignored=ignored)
        yield Case(
            "cross_entropy-" + name,
            lambda r, o=options, s=smoothing: nn.CrossEntropyLoss(reduction=r, label_smoothing=s, **o),
            case_draw,
        )
        if smoothing == 0.0:
            yield Case("nll-" + name, lambda r, o=options: partial(F.nll_loss, reduction=r, **o), case_draw)


def _soft_cases(classes: int = 5) -> Iterator[Case]:
    def draw(n: int, g: torch.Generator, rest: tuple[int, ...], normalised: bool) -> tuple[Tensor, Tensor]:
        t = uniform(g, n, classes, *rest)
        return 2 * normal(g, n, classes, *rest), t / t.sum(1, keepdim=True) if normalised else t - 0.3

    for rest, weight, smoothing, normalised in itertools.product(((), (3,)), (None, WEIGHT), (0.0, 0.2), (True, False)):
        kind = "soft" if normalised else "signed"
        yield Case(
            f"cross_entropy-{kind}-{list(rest)}-{'plain' if weight is None else 'weight'}-smooth{smoothing}",
            lambda r, w=weight, s=smoothing: partial(F.cross_entropy, weight=w, label_smoothing=s, reduction=r),
            partial(draw, rest=rest, normalised=normalised),
        )


def _elementwise_cases() -> Iterator[Case]:
    for rest in ((), (3,), (3, 2)):
        last = rest[-1] if rest else 1

        def real(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return normal(g, n, *rest), normal(g, n, *rest)

        def counts(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return normal(g, n, *rest), torch.randint(0, 6, (n, *rest), generator=g).double()

        def rates(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return uniform(g, n, *rest) + 0.2, torch.randint(0, 6, (n, *rest), generator=g).double()

        def labels(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return 2 * normal(g, n, *rest), (uniform(g, n, *rest) < 0.5).double()

        def soft_labels(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return 2 * normal(g, n, *rest), uniform(g, n, *rest)

        def probabilities(n: int, g: torch.Generator, rest: tuple[int, ...] = rest) -> tuple[Tensor, Tensor]:
            return 0.05 + 0.9 * uniform(g, n, *rest), uniform(g, n, *rest)

        g = torch.Generator().manual_seed(5)
        weight, positive = uniform(g, last), 3 * uniform(g, *rest) if rest else uniform(g, 1)
        shape = str(list(rest))
        yield Case(f"mse-{shape}", lambda r: nn.MSELoss(reduction=r), real)
        yield Case(f"l1-{shape}", lambda r: nn.L1Loss(reduction=r), real)
        yield Case(f"huber-{shape}", lambda r: nn.HuberLoss(reduction=r, delta=0.7), real)
        yield Case(f"smooth_l1-{shape}", lambda r: partial(F.smooth_l1_loss, reduction=r, beta=0.6), real)
        yield Case(f"smooth_l1-beta0-{shape}", lambda r: nn.SmoothL1Loss(reduction=r, beta=0.0), real)
        yield Case(f"bce_logits-{shape}", lambda r: nn.BCEWithLogitsLoss(reduction=r), labels)
        yield Case(
            f"bce_logits-weights-{shape}",
            lambda r, w=weight, p=positive: nn.BCEWithLogitsLoss(weight=w, pos_weight=p, reduction=r),
            soft_labels,
        )
        yield Case(f"bce-{shape}", lambda r, w=weight: nn.BCELoss(weight=w, reduction=r), probabilities)
        for full in (False, True):
            yield Case(f"poisson-full{full}-{shape}", lambda r, f=full: nn.PoissonNLLLoss(reduction=r, full=f), counts)
            yield Case(
                f"poisson-rate-full{full}-{shape}",
                lambda r, f=full: partial(F.poisson_nll_loss, log_input=False, full=f, eps=0.01, reduction=r),
                rates,
            )
        yield Case(
            f"gaussian-float-{shape}", lambda r: partial(F.gaussian_nll_loss, var=0.3, full=True, reduction=r), real
        )
        for log_target in (False, True):
            yield Case(
                f"kl_div-log{log_target}-{shape}",
                lambda r, t=log_target: partial(F.kl_div, log_target=t, reduction=r),
                probabilities,
                ("sum", "mean", "batchmean"),
            )
    var = uniform(torch.Generator().manual_seed(6), 1, 3) + 0.1
    yield Case(
        "gaussian-tensor", lambda r: partial(F.gaussian_nll_loss, var=var, reduction=r),
        lambda n, g: (normal(g, n, 3), normal(g, n, 3)),
    )  # fmt: skip
    yield Case(
        "mse-broadcast-target", lambda r: partial(F.mse_loss, reduction=r),
        lambda n, g: (normal(g, n, 3), normal(g, n, 1)),
    )  # fmt: skip


CASES = [*_class_cases(), *_soft_cases(), *_elementwise_cases()]
GRID = [(case, reduction) for case in CASES for reduction in case.reductions]
IDS = [f"{case.name}-{reduction}" for case, reduction in GRID]
