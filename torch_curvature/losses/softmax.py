"""Softmax cross entropy: `value = -sum_nd sum_k t[n,d,k] log softmax(u[n,d])[k]`, t >= 0 in all usual cases.

Every option of `torch.nn.functional.cross_entropy` is a choice of t: with class weights w and the target distribution
q (one-hot, smoothed, or given as probabilities) `t = w * q`, zero at ignored positions. With the mass
`tau = sum_k t_k` and `p = softmax(u)`:

    gradient  tau p - t
    Hessian   tau (diag p - p p^T)

Its square root has K - 1 columns in closed form, the Cholesky factor of the covariance of the multinomial
distribution (Tanabe and Sagae, J. R. Statist. Soc. B 54, 1992). With the tails `r_k = p_k + ... + p_K`, column k is

    sqrt(p_k r_{k+1} / r_k) at k,    -p_j sqrt(p_k / (r_k r_{k+1})) at j > k,    0 at j < k.

Against the K columns `diag(sqrt p) - p sqrt(p)^T` it saves a column, and `1 - p_k` is never a difference of nearly
equal numbers: a confident prediction keeps its relative accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .interface import BoundLoss, Columns, check_products, working_dtype
from .layout import Layout
from .slots import Slots
from .small_batches import softmax_columns, softmax_product


class SoftmaxLoss(BoundLoss):
    """Softmax cross entropy of one batch. `mass [N, D]` is tau, `target_mass(g)` subtracts t from `g [N, D, K]`."""

    def __init__(
        self,
        name: str,
        outputs: Tensor,
        layout: Layout,
        denominator: Tensor,
        *,
        probabilities: Tensor,
        mass: Tensor,
        subtract_target: Callable[[Tensor], Tensor],
        sum_of: Callable[[Tensor], Tensor],
        unweighted: bool = False,
    ) -> None:
        self.name, self.outputs, self.layout, self.denominator = name, outputs, layout, denominator
        self._p, self._mass = probabilities, mass
        self._subtract_target, self._sum_of = subtract_target, sum_of
        self._unweighted = unweighted  # every mass is known to be one

    @cached_property
    def _slots(self) -> Slots:
        return Slots.every(self._mass) if self._unweighted else Slots.pack(self._mass != 0)

    @cached_property
    def _signed(self) -> bool:
        return not self._unweighted and bool((self._mass < 0).any())

    def value(self) -> Tensor:
        return self._sum_of(self.layout.read(self.outputs.to(working_dtype(self.outputs))))

    def gradient(self) -> Tensor:
        scaled = self._p.clone() if self._unweighted else self._mass.unsqueeze(-1) * self._p
        return self.layout.write(self._subtract_target(scaled))

    @property
    def num_columns(self) -> int:
        return self._slots.count * (self.layout.classes - 1)

    def columns(self, max_columns: int | None = None) -> Columns:
        return self._slots.columns(self.layout, self.layout.classes - 1, self._block, max_columns)

    def _block(self, first: int, last: int, low: int, high: int) -> tuple[Tensor, Tensor | None]:
        """Columns low to high of the closed-form factor, `[s, c, N, K]`."""
        p, mass = self._slots.take(self._p, first, last), self._slots.take(self._mass, first, last)
        s = softmax_columns(p, mass, low, high)
        if s is None:
            s = _columns(p, mass, low, high)
        sign = mass.sign().unsqueeze(1).expand(s.shape[:3]) if self._signed else None
        return s, sign

    def hessian_product(self, u: Tensor) -> Tensor:
        x = self.layout.read(check_products(self, u))
        product = softmax_product(self._p, self._mass, x)
        if product is None:
            mean = (self._p * x).sum(-1, keepdim=True)
            product = (x - mean).mul_(self._p).mul_(self._mass.unsqueeze(-1))
        return self.layout.write(product)

    def _require_distribution(self) -> None:
        if self._signed:
            raise ValueError(
                f"{self.name}: the Fisher matrix needs weights and target probabilities whose products sum to a "
                "non-negative mass at every position; at least one mass here is negative."
            )

    @property
    def num_fisher_columns(self) -> int:
        self._require_distribution()
        return self.num_columns

    def fisher_columns(self, max_columns: int | None = None) -> Columns:
        self._require_distribution()
        return self.columns(max_columns)

    def sample_columns(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        self._require_distribution()
        drawn = draw_classes(self._p, samples, generator)
        s = self._p.expand(samples, *self._p.shape).clone()
        s.scatter_add_(-1, drawn.unsqueeze(-1), s.new_full((), -1.0).expand(*drawn.shape, 1))
        return self.layout.write(s.mul_((self._mass / samples).sqrt().unsqueeze(-1)))


def draw_classes(probabilities: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """`[M, N, D]` classes drawn from `probabilities [N, D, K]`."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    if flat.shape[0] == 0:
        return flat.new_zeros((samples, *probabilities.shape[:-1]), dtype=torch.long)
    drawn = torch.multinomial(flat, samples, replacement=True, generator=generator)
    return drawn.T.reshape(samples, *probabilities.shape[:-1])


def _columns(p: Tensor, mass: Tensor, low: int, high: int) -> Tensor:
    """Columns low to high of a square root of `|mass| (diag p - p p^T)`: `[s, N, K], [s, N]` to `[s, c, N, K]`."""
    by_class = p.mT.contiguous()
    tail = by_class.flip(1).cumsum(1).flip(1)
    here, after = tail[:, low:high], tail[:, low + 1 : high + 1].sqrt()
    # nothing is left of a tail that has vanished: 0 / 0 and x / 0 are zero
    ratio = (by_class[:, low:high] / here).nan_to_num_(0.0).sqrt_().mul_(mass.abs().sqrt_().unsqueeze(1))
    below = (ratio / after).nan_to_num_(0.0, posinf=0.0).neg_()
    k = torch.arange(p.shape[-1], device=p.device)
    s = p.unsqueeze(1) * below.unsqueeze(-1)
    s *= (k > k[low:high, None]).unsqueeze(1)
    s.diagonal(offset=low, dim1=1, dim2=3).copy_(ratio.mul_(after).mT)
    return s
