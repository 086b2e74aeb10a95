"""Losses that are a sum over elements, `value = sum_e weight_e f(u_e, y_e)`: their Hessian is diagonal.

Each `Element` states f, its first and second derivatives (almost everywhere, where f has kinks), and, where the loss
is a negative log likelihood up to a constant, the Fisher information of one element and a draw of its score. Weights
multiply the likelihood of an element; only targets are drawn from the model.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import BoundLoss, Columns, check_products, working_dtype
from .layout import Layout
from .slots import Slots

Draw = Callable[[Tensor, torch.Generator | None], Tensor]


class Element(abc.ABC):
    """One element of the loss; u, y and results have one shape."""

    @abc.abstractmethod
    def value(self, u: Tensor, y: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def first(self, u: Tensor, y: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def second(self, u: Tensor, y: Tensor) -> Tensor: ...

    def fisher(self, u: Tensor, y: Tensor) -> Tensor | None:
        """The Fisher information of u (y only says how much weight was observed), or None: no distribution."""
        return None

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        """`[M, *u.shape]` draws with mean square `fisher`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SquaredError(Element):
    """(u - y)^2: a Gaussian of variance 1/2, whose Fisher information is the second derivative, 2."""

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).square()

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return 2 * (u - y)

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(u, 2.0)

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return self.second(u, y)

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        return math.sqrt(2) * _normal(u, samples, generator)


@dataclass(frozen=True)
class AbsoluteError(Element):
    """|u - y|: second derivative zero almost everywhere."""

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).abs()

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).sign()

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(u)


@dataclass(frozen=True)
class Huber(Element):
    """(u - y)^2 / (2 width) for |u - y| < delta, and its tangents beyond (almost everywhere).

    torch's Huber loss has width 1, its smooth L1 loss width = delta = beta.
    """

    delta: float
    width: float

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(u, y, reduction="none", delta=self.delta) / self.width

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).clamp(-self.delta, self.delta) / self.width

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return ((u - y).abs() < self.delta).to(u.dtype) / self.width


@dataclass(frozen=True)
class Logistic(Element):
    """Binary cross entropy of a logit, -(pos y log s + (1 - y) log(1 - s)) with s = sigmoid(u).

    The observed mass pos y + 1 - y times the Bernoulli information s (1 - s) is the second derivative and the Fisher
    information alike.
    """

    pos_weight: Tensor | None

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(u, y, reduction="none", pos_weight=self.pos_weight)

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        positive = y if self.pos_weight is None else self.pos_weight * y
        return (1 - y) * u.sigmoid() - positive * (-u).sigmoid()

    def _mass(self, y: Tensor) -> Tensor:
        return torch.ones_like(y) if self.pos_weight is None else self.pos_weight * y + (1 - y)

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return self._mass(y) * u.sigmoid() * (-u).sigmoid()

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return self.second(u, y)

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        s = u.sigmoid().expand(samples, *u.shape)
        drawn = torch.bernoulli(s, generator=generator)
        return torch.where(drawn > 0, -(-u).sigmoid(), s) * self._mass(y).sqrt()


@dataclass(frozen=True)
class PoissonLogRate(Element):
    """exp(u) - y u: Poisson with rate exp(u)."""

    full: bool

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return F.poisson_nll_loss(u, y, log_input=True, full=self.full, reduction="none")

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return u.exp() - y

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return u.exp()

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return u.exp()

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        rate = u.exp().expand(samples, *u.shape)
        return rate - torch.poisson(rate, generator=generator)


@dataclass(frozen=True)
class PoissonRate(Element):
    """u - y log(u + eps): up to a constant, Poisson with rate u + eps.

    The second derivative y / (u + eps)^2 depends on the target; the Fisher information is 1 / (u + eps).
    """

    full: bool
    eps: float

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return F.poisson_nll_loss(u, y, log_input=False, full=self.full, eps=self.eps, reduction="none")

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 - y / (u + self.eps)

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return y / (u + self.eps).square()

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 / (u + self.eps)

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        rate = (u + self.eps).expand(samples, *u.shape)
        return 1 - torch.poisson(rate, generator=generator) / rate


@dataclass(frozen=True)
class Gaussian(Element):
    """(log var + (u - y)^2 / var) / 2 with a given variance (already clamped at eps)."""

    var: Tensor
    full: bool

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.var.log() + (u - y).square() / self.var + (math.log(2 * math.pi) if self.full else 0))

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y) / self.var

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 / self.var

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 / self.var

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        return _normal(u, samples, generator) / self.var.sqrt()


def _normal(u: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn((samples, *u.shape), dtype=u.dtype, device=u.device, generator=generator)


class ElementwiseLoss(BoundLoss):
    """A weighted sum over elements: `targets` and `weight` (None: ones) are `[N, D]`, as the layout reads outputs."""

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        layout: Layout,
        denominator: Tensor,
        element: Element,
        targets: Tensor,
        weight: Tensor | None,
    ) -> None:
        self.name, self.outputs, self.layout, self.denominator = name, outputs, layout, denominator
        self._element, self._y, self._weight = element, targets, weight
        self._u = self._read(outputs.detach())

    def _read(self, outputs: Tensor) -> Tensor:
        return self.layout.read(outputs.to(working_dtype(outputs))).squeeze(-1)

    def _weighted(self, x: Tensor) -> Tensor:
        return x if self._weight is None else x * self._weight

    def value(self) -> Tensor:
        return self._weighted(self._element.value(self._read(self.outputs), self._y)).sum()

    def gradient(self) -> Tensor:
        return self.layout.write(self._weighted(self._element.first(self._u, self._y)).unsqueeze(-1))

    @cached_property
    def _second(self) -> Tensor:
        return self._weighted(self._element.second(self._u, self._y))

    @cached_property
    def _fisher(self) -> Tensor:
        information = self._element.fisher(self._u, self._y)
        if information is None:
            raise ValueError(
                f"{self.name} has no predictive distribution whose Fisher information is defined here. Use the "
                "Gauss-Newton matrix or the empirical Fisher, or a loss that is a likelihood (cross_entropy, "
                "nll_loss, binary_cross_entropy_with_logits, mse_loss, poisson_nll_loss, gaussian_nll_loss)."
            )
        information = self._weighted(information)
        if bool((information < 0).any()):
            raise ValueError(
                f"{self.name}: the Fisher matrix needs non-negative weights; an element has a negative one."
            )
        return information

    @cached_property
    def _slots(self) -> Slots:
        return Slots.pack(self._second != 0)

    @cached_property
    def _fisher_slots(self) -> Slots:
        return Slots.pack(self._fisher != 0)

    def _columns(self, slots: Slots, diagonal: Tensor, signed: bool, max_columns: int | None) -> Columns:
        def block(first: int, last: int, low: int, high: int) -> tuple[Tensor, Tensor | None]:
            d = slots.take(diagonal, first, last).unsqueeze(1)
            return d.abs().sqrt().unsqueeze(-1), d.sign() if signed else None

        return slots.columns(self.layout, 1, block, max_columns)

    @property
    def num_columns(self) -> int:
        return self._slots.count

    def columns(self, max_columns: int | None = None) -> Columns:
        return self._columns(self._slots, self._second, bool((self._second < 0).any()), max_columns)

    def hessian_product(self, u: Tensor) -> Tensor:
        return self.layout.write(self.layout.read(check_products(self, u)) * self._second.unsqueeze(-1))

    @property
    def num_fisher_columns(self) -> int:
        return self._fisher_slots.count

    def fisher_columns(self, max_columns: int | None = None) -> Columns:
        return self._columns(self._fisher_slots, self._fisher, False, max_columns)

    def sample_columns(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}.")
        self._fisher  # noqa: B018 -- refuses by name, and checks the weights
        score = self._element.score(self._u, self._y, samples, generator) / math.sqrt(samples)
        if self._weight is not None:
            score = score * self._weight.sqrt()
        return self.layout.write(score.unsqueeze(-1))
