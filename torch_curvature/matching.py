"""Matching losses: the loss of a transfer function under which the gradient is the error of the network's output.

For a monotone transfer function h, `L(u, y) = int_0^u (h(t) - y) dt` up to a constant in u has the gradient
`h(u) - y` and the Hessian `h'(u) >= 0`: squared error matches a linear output, binary cross entropy the
sigmoid, the negative log likelihood the softmax (Auer, Herbster and Warmuth, 1996; Helmbold, Kivinen and
Warmuth, 1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .integration import integral
from .ops.routing import check_one_device
from .products import outer

__all__ = ["Matching", "MatchingLoss", "is_matching", "softmax_jacobian"]

Transfer = Callable[[Tensor], Tensor]

TRANSFERS: dict[str, Transfer] = {
    "identity": lambda u: u,
    "sigmoid": torch.sigmoid,
    "softmax": lambda u: u.softmax(-1),
    "exp": torch.exp,
    "tanh": torch.tanh,
}


def softmax_jacobian(u: Tensor) -> Tensor:
    """`d N_i / d u_j = N_i (1[i = j] - N_j)` of `N = softmax(u)` over the last axis, `[*, C] -> [*, C, C]`.

    Symmetric, positive semi-definite, of rank C - 1; it is the Hessian of the softmax cross entropy, too.
    """
    if u.ndim < 1:
        raise ValueError("u needs an axis of classes, got a scalar")
    p = u.softmax(-1)
    return torch.diag_embed(p) - outer(p, p)


def _squared_error(u: Tensor, y: Tensor) -> Tensor:
    return (u - y).square() / 2


def _logistic(u: Tensor, y: Tensor) -> Tensor:
    """`softplus(u) - y u` as a sum of terms that do not cancel for y in [0, 1]."""
    return -y * F.logsigmoid(u) - (1 - y) * F.logsigmoid(-u)


def _exponential(u: Tensor, y: Tensor) -> Tensor:
    return u.exp() - y * u


def _log_cosh(u: Tensor, y: Tensor) -> Tensor:
    """`log cosh u - y u`: the logistic loss of 2u and (1 + y) / 2, so nothing cancels for y in [-1, 1]."""
    return _logistic(2 * u, (1 + y) / 2) - math.log(2)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": _squared_error,
    "sigmoid": _logistic,
    "exp": _exponential,
    "tanh": _log_cosh,
}


class MatchingLoss(nn.Module):
    """The loss that matches a transfer function: gradient `h(u) - y`, Hessian `h'(u)`, of each element.

    | transfer | L(u, y) | known as |
    |---|---|---|
    | `"identity"` | `(u - y)^2 / 2` | squared error |
    | `"sigmoid"` | `log(1 + e^u) - y u` | binary cross entropy with logits |
    | `"softmax"` | `log sum_i e^(u_i) - y . u` over axis `dim` | cross entropy |
    | `"exp"` | `e^u - y u` | Poisson negative log likelihood |
    | `"tanh"` | `log cosh u - y u` | |
    | any h | `int_0^u h(t) dt - y u` | |

    A transfer of your own is an elementwise, non-decreasing function of a tensor, made of torch functions that can be
    differentiated. Its integral is computed in float64 by adaptive quadrature, to a few units of the last place of the
    integral of |h|; its derivatives of orders 1 to 8 are those of h, exact, in every mode of torch, wherever h has a
    finite slope. Kinks and jumps of h are found by bisection. `torch.compile` breaks its graph at the quadrature,
    which decides by values; the named losses compile whole.

    The named losses are stable for |u| up to 1e4 in float32 and targets in the range of the transfer; only
    e^u overflows, as it must.

    Args:
        transfer: a name of the table, or a function.
        reduction: "mean" (over elements; over predictions for softmax), "sum" or "none".
        dim: the axis of the classes, for softmax.

    Raises:
        ValueError: an unknown name or reduction; a function that decreases, mixes elements, changes the shape
        or has
            trainable parameters.
    """

    def __init__(self, transfer: str | Transfer, *, reduction: str = "mean", dim: int = 1) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if isinstance(transfer, str):
            if transfer not in TRANSFERS:
                raise ValueError(f"transfer must be one of {list(TRANSFERS)} or a function, got {transfer!r}")
        else:
            _check_transfer(transfer)
        self.transfer = transfer
        self.reduction = reduction
        self.dim = dim

    def output(self, u: Tensor) -> Tensor:
        """What the network gives for u: `h(u)`."""
        if self.transfer == "softmax":
            return u.softmax(self.dim)
        return TRANSFERS[self.transfer](u) if isinstance(self.transfer, str) else self.transfer(u)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """The loss of inputs u of the transfer function and targets y of the same shape.

        For softmax y may also hold class indices, `u.shape` without axis `dim`.

        Raises:
            ValueError: shapes that differ, with both; two devices.
        """
        if not u.is_floating_point():
            raise TypeError(f"u must be a floating point tensor, got {u.dtype}")
        check_one_device("MatchingLoss", u=u, y=y)
        return self._reduce(self._softmax(u, y) if self.transfer == "softmax" else self._elementwise(u, y))

    def extra_repr(self) -> str:
        return f"{self.transfer!r}, reduction={self.reduction!r}" + (
            f", dim={self.dim}" if self.transfer == "softmax" else ""
        )

    def _elementwise(self, u: Tensor, y: Tensor) -> Tensor:
        if u.shape != y.shape:
            raise ValueError(f"u and y must have the same shape, got {tuple(u.shape)} and {tuple(y.shape)}")
        y = y.to(u.dtype)
        if isinstance(self.transfer, str):
            return ELEMENTWISE[self.transfer](u, y)
        return integral(self.transfer, u) - y * u

    def _softmax(self, u: Tensor, y: Tensor) -> Tensor:
        if not -u.ndim <= self.dim < u.ndim:
            raise ValueError(f"dim={self.dim} is not an axis of u, whose shape is {tuple(u.shape)}")
        log_p = u.log_softmax(self.dim)
        if not y.is_floating_point() and y.ndim == u.ndim - 1:
            if y.shape != u.select(self.dim, 0).shape:
                raise ValueError(
                    f"class indices must have the shape of u without axis {self.dim}, got u {tuple(u.shape)} and "
                    f"y {tuple(y.shape)}"
                )
            return -log_p.gather(self.dim, y.unsqueeze(self.dim)).squeeze(self.dim)
        if u.shape != y.shape:
            raise ValueError(f"u and y must have the same shape, got {tuple(u.shape)} and {tuple(y.shape)}")
        y = y.to(u.dtype)
        # -y . u + lse(u) is -y . log_p + (1 - sum y) lse(u), where nothing large cancels when y sums to one.
        rest = 1 - y.sum(self.dim)
        return (rest * u.logsumexp(self.dim)) - (y * log_p.masked_fill(y == 0, 0)).sum(self.dim)

    def _reduce(self, loss: Tensor) -> Tensor:
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()


def _check_transfer(transfer: Transfer) -> None:
    """On a grid: elementwise, of the same shape, non-decreasing, and nothing to train."""
    grid = torch.linspace(-12, 12, 385, dtype=torch.float64)
    if isinstance(transfer, nn.Module) and any(p.requires_grad for p in transfer.parameters()):
        raise ValueError("transfer has trainable parameters, with respect to which its integral has no gradient here")
    values = transfer(grid)
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"transfer must be elementwise, but gives {found} for a tensor of shape {tuple(grid.shape)}")
    if values.requires_grad:
        raise ValueError(
            "transfer depends on a tensor that requires grad, with respect to which its integral has no gradient"
        )
    if not torch.allclose(transfer(grid[100:103].reshape(3, 1)), values[100:103].reshape(3, 1), equal_nan=True):
        raise ValueError("transfer must be elementwise, but its value at a point changes with the other elements")
    steps = values.diff()
    if (steps < -1e-12 * values.abs().max().clamp(min=1)).any() or values.isnan().any():
        worst = int(steps.nan_to_num(-math.inf).argmin())
        raise ValueError(
            f"transfer must not decrease: it gives {float(values[worst]):.6g} at {float(grid[worst]):.6g} and "
            f"{float(values[worst + 1]):.6g} at {float(grid[worst + 1]):.6g}, so no convex loss matches it"
        )


@dataclass(frozen=True)
class Matching:
    """Whether `d L(h(u), y) / du = slope N + offset` with `N = h(u)` for each target y, and the coefficients."""

    matches: bool
    error: float
    """The largest deviation from an affine function, relative to the largest derivative."""
    slope: Tensor | None
    """`[M]`, a number for each target, or `[M, d, d]`, a matrix, where no number does; None if not matching."""
    offset: Tensor | None
    """`[M, d]`, for each target; `-y` for the classical pairs."""
    targets: Tensor
    """`[M, *]`, those that were tried."""

    def __bool__(self) -> bool:
        return self.matches


def is_matching(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    transfer: str | Transfer,
    targets: Tensor | None = None,
    *,
    size: int = 4,
    tolerance: float = 1e-6,
) -> Matching:
    """Decides whether a loss of the network's output matches the non-linearity that gives this output.

    It does when, for every target y, the derivative of `L(h(u), y)` with respect to u is affine in the output
    `N = h(u)`, and not constant. The derivative is taken at random points u (always the same ones) and fitted
    by least squares.

    Args:
        loss_fn: `(N [1, d], y [1, *]) -> scalar`, a loss of the *outputs* of the transfer function:
        `nn.BCELoss()`
            for sigmoid, `lambda N, y: -(y * N.log()).sum()` for softmax.
        transfer: a name (see `MatchingLoss`; softmax over the last axis) or a function of `[1, d]`.
        targets: `[M, *]`; if left out: one-hot vectors for softmax, else random ones in the range of the
        transfer. size: d, the number of outputs. tolerance: the largest relative deviation that still counts
        as affine.

    Returns:
        A `Matching`, true or false, with the coefficients where true.

    Raises:
        ValueError: an unknown name, or a loss that is not a scalar.
    """
    if isinstance(transfer, str):
        if transfer not in TRANSFERS:
            raise ValueError(f"transfer must be one of {list(TRANSFERS)} or a function, got {transfer!r}")
        h = TRANSFERS[transfer]
    else:
        h = transfer
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        points = torch.randn(rows, size, dtype=torch.float64, generator=generator, device="cpu")
        return points.to(torch.get_default_device())

    points = 1.5 * draw(8 * size + 16)
    if targets is None:
        chosen = h(draw(3)).detach()
        targets = torch.eye(size, dtype=torch.float64) if transfer == "softmax" else chosen
    outputs = torch.cat([h(u.unsqueeze(0)) for u in points]).detach()
    gradients = torch.stack([_pair_gradients(loss_fn, h, points, y.unsqueeze(0)) for y in targets])
    scale = float(gradients.abs().max()) or 1.0
    for fit in (_fit_number, _fit_matrix):
        slope, offset, fitted = fit(outputs, gradients)
        error = float((gradients - fitted).abs().max()) / scale
        if error <= tolerance and float(slope.abs().max()) > tolerance * scale:
            return Matching(True, error, slope, offset, targets)
    return Matching(False, error, None, None, targets)


def _pair_gradients(loss_fn: Callable[[Tensor, Tensor], Tensor], h: Transfer, points: Tensor, target: Tensor) -> Tensor:
    """`d L(h(u), y) / du` at each point, `[K, d]`."""
    rows = []
    for point in points:
        u = point.unsqueeze(0).clone().requires_grad_()
        loss = loss_fn(h(u), target)
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must give a scalar for one sample, got shape {tuple(loss.shape)}")
        rows.append(torch.autograd.grad(loss.reshape(()), u)[0][0])
    return torch.stack(rows)


def _fit_number(outputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of `g = slope N + offset`, one number for each target: outputs `[K, d]`, gradients `[M, K, d]`."""
    centred = outputs - outputs.mean(0)
    slope = (gradients * centred).sum((1, 2)) / centred.square().sum()
    offset = gradients.mean(1) - slope[:, None] * outputs.mean(0)
    return slope, offset, slope[:, None, None] * outputs + offset[:, None]


def _fit_matrix(outputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of `g = A N + offset`, the smallest A where the outputs do not determine it (softmax)."""
    centred = outputs - outputs.mean(0)
    slope = (torch.linalg.pinv(centred, rtol=1e-10) @ gradients).mT
    offset = gradients.mean(1) - slope @ outputs.mean(0)
    return slope, offset, outputs @ slope.mT + offset[:, None]
