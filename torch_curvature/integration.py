"""`int_0^u h(t) dt` of a monotone h, element by element: adaptive quadrature whose derivatives are those of h, exact.

The rule is Gauss-Lobatto's: it sees both ends of an interval, and a monotone h with a feature inside has
different values there, so nothing hides between the nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

NODES = 13
"""Of the Gauss-Lobatto rule, exact for polynomials of degree 2 NODES - 3."""
DEPTH = 60
"""Bisections of an interval after which a kink or jump is located to the last bit."""
CHUNK = 1 << 13
"""Elements integrated together: a few megabytes of nodes."""


@functools.cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss's rule on [0, 1]."""
    x, w = numpy.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


@functools.cache
def _lobatto(nodes: int) -> tuple[Tensor, Tensor]:
    """The same on [0, 1] with both ends: roots of `P'_(n-1)`, weights `2 / (n (n - 1) P_(n-1)(x)^2)`."""
    polynomial = numpy.polynomial.legendre.Legendre.basis(nodes - 1)
    first, second = polynomial.deriv(), polynomial.deriv(2)
    x = numpy.sort(numpy.real(first.roots()))
    for _ in range(3):
        x = x - first(x) / second(x)
    x = numpy.concatenate([[-1.0], (x - x[::-1]) / 2, [1.0]])
    w = 2 / (nodes * (nodes - 1) * polynomial(x) ** 2)
    return torch.from_numpy((x + 1) / 2), torch.from_numpy(w / 2)


def integral(h: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`int_0^u h(t) dt` for each element of u, computed in float64; its n-th derivative is `h^(n-1)(u)` for n <= 8.

    The value comes from quadrature without a graph, the derivatives from `int_(u0)^u h` with u0 the value of
    u: it is zero, and by the four-point Gauss rule, exact for polynomials of degree 7, it has the derivatives
    of the integral. These are plain torch operations, so every mode of differentiation has them.
    """
    fixed = u.detach()
    value = _Value.apply(fixed, h)
    step = u - fixed
    nodes, weights = (t.to(u.device, u.dtype) for t in _legendre(4))
    slope = sum(w * h(fixed + x * step) for x, w in zip(nodes, weights, strict=True))
    return value + step * slope


class _Value(torch.autograd.Function):
    """The number alone: the quadrature decides by values, which under vmap only a Function gets to see."""

    @staticmethod
    def forward(u: Tensor, h: Callable[[Tensor], Tensor]) -> Tensor:
        flat = u.reshape(-1).double()
        with torch.no_grad():
            parts = [quadrature(h, part) for part in flat.split(CHUNK)]
            return torch.cat(parts).reshape(u.shape).to(u.dtype) if parts else u.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None

    @staticmethod
    def vmap(info: Any, axes: Any, u: Tensor, h: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
        return _Value.apply(u, h), axes[0]


def quadrature(h: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """`int_0^u h`, `[K] -> [K]` in float64: panels at 0, 1, 2, 4, .. |u|, each bisected until two halves add up to it.

    An interval is settled when the change is below a few units of the last place of its own integral of |h|,
    or of a 64th of that of its element, or after `DEPTH` bisections. At an infinite u the integral is `u
    h(u)`.
    """
    finite = u.isfinite()
    ends = torch.where(finite, u, 0)
    left, right, owner = _panels(ends)
    total, size = torch.zeros_like(u), torch.zeros_like(u)
    whole, magnitude = _rule(h, left, right)
    size.index_add_(0, owner, magnitude)
    for depth in range(DEPTH + 1):
        middle = (left + right) / 2
        halves = [_rule(h, left, middle), _rule(h, middle, right)]
        refined = halves[0][0] + halves[1][0]
        bound = 4 * torch.finfo(u.dtype).eps * torch.maximum(halves[0][1] + halves[1][1], size[owner] / 64)
        unsettled = ((refined - whole).abs() > bound) & (depth < DEPTH)
        total.index_add_(0, owner[~unsettled], refined[~unsettled])
        if not unsettled.any():
            break
        left, middle, right = left[unsettled], middle[unsettled], right[unsettled]
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
        owner = owner[unsettled].repeat(2)
        whole = torch.cat([half[0][unsettled] for half in halves])
    return torch.where(finite, total, u * h(u))


def _panels(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Intervals from 0 towards each u that double in length, and the element that each belongs to."""
    longest = float(u.abs().max()) if u.numel() else 0.0
    count = 1 if longest <= 1 else int(torch.tensor(longest).log2().ceil()) + 1
    edges = torch.cat([u.new_zeros(1), 2.0 ** torch.arange(count, dtype=u.dtype, device=u.device)])
    ends = torch.minimum(edges, u.abs()[:, None]) * u.sign()[:, None]
    keep = ends[:, :-1] != ends[:, 1:]
    owner = torch.arange(u.numel(), device=u.device)[:, None].expand_as(keep)[keep]
    return ends[:, :-1][keep], ends[:, 1:][keep], owner


def _rule(h: Callable[[Tensor], Tensor], left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of `NODES` points for h and for |h| on each interval; the second is not signed."""
    nodes, weights = (t.to(left.device) for t in _lobatto(NODES))
    length = right - left
    values = h(left[:, None] + length[:, None] * nodes)
    return (values @ weights) * length, (values.abs() @ weights) * length.abs()
