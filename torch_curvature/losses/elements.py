"""The elements of losses that are sums over elements: f(u, y), its derivatives, and what distribution it belongs to.

Each `Element` states f, its first and second derivatives (almost everywhere, where f has kinks), and, where f is a
negative log likelihood up to a constant, the Fisher information of one element and a draw of its score.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """|u - y|: second derivative zero almost everywhere; a Laplace distribution of scale 1, Fisher information 1."""

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).abs()

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y).sign()

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(u)

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        return _normal(u, samples, generator).sign()


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
class Bernoulli(Element):
    """-(y log u + (1 - y) log(1 - u)) of a probability 0 < u < 1: Fisher information 1 / (u (1 - u))."""

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        return -(y * u.log() + (1 - y) * (-u).log1p())

    def first(self, u: Tensor, y: Tensor) -> Tensor:
        return (u - y) / (u * (1 - u))

    def second(self, u: Tensor, y: Tensor) -> Tensor:
        return y / u.square() + (1 - y) / (1 - u).square()

    def fisher(self, u: Tensor, y: Tensor) -> Tensor:
        return 1 / (u * (1 - u))

    def score(self, u: Tensor, y: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
        p = u.expand(samples, *u.shape)
        return self.first(p, torch.bernoulli(p, generator=generator))


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
