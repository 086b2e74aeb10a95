"""Monotone functions, and their integrals from zero in closed form, free of cancellation where that matters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(u: Tensor) -> Tensor:
    return u.clamp(min=0) + torch.log1p((-u.abs()).exp())


def log_cosh(u: Tensor) -> Tensor:
    """Without cancellation for small u: `log(1 + 2 sinh^2(u / 2))`."""
    small = u.clamp(-1, 1)
    return torch.where(
        u.abs() < 1,
        torch.log1p(2 * (small / 2).sinh() ** 2),
        u.abs() + torch.log1p((-2 * u.abs()).exp()) - math.log(2),
    )


def softplus_from_zero(u: Tensor) -> Tensor:
    """`softplus(u) - softplus(0) = u / 2 + log cosh(u / 2)`; for u < -1 the terms cancel."""
    return torch.where(u > -1, u / 2 + log_cosh(u / 2), softplus(u) - math.log(2))


def step(t: Tensor) -> Tensor:
    return (t > 0.7).to(t)


# name: (h, its integral from 0)
TRANSFERS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sigmoid": (torch.sigmoid, softplus_from_zero),
    "tanh": (torch.tanh, log_cosh),
    "arctan": (torch.atan, lambda u: u * u.atan() - torch.log1p(u * u) / 2),
    "cubic": (lambda t: t**3 + t, lambda u: u**4 / 4 + u**2 / 2),
    "cube root": (lambda t: t.sign() * t.abs() ** (1 / 3), lambda u: 0.75 * u.abs() ** (4 / 3)),
    "arsinh": (torch.asinh, lambda u: u * u.asinh() - u * u / (torch.sqrt(u * u + 1) + 1)),
    "relu": (torch.relu, lambda u: u.clamp(min=0) ** 2 / 2),
    "kink off zero": (lambda t: (t - 0.3).relu() + t, lambda u: (u - 0.3).clamp(min=0) ** 2 / 2 + u * u / 2),
    "hard tanh": (F.hardtanh, lambda u: torch.where(u.abs() < 1, u * u / 2, u.abs() - 0.5)),
    "sign": (torch.sign, torch.abs),
    "jump": (step, lambda u: (u - 0.7).clamp(min=0)),
    "steep, far": (lambda t: torch.sigmoid(50 * (t - 170)), lambda u: softplus(50 * (u - 170)) / 50),
}
