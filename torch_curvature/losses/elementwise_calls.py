"""The elementwise losses of `torch.nn.functional`, with their options, as an `ElementwiseLoss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import Call
from .checks import check_tensor, expand_to_input, not_finite, raise_if
from .elementwise import (
    AbsoluteError,
    Element,
    ElementwiseLoss,
    Gaussian,
    Huber,
    Logistic,
    PoissonLogRate,
    PoissonRate,
    SquaredError,
)


def mse_loss(call: Call) -> ElementwiseLoss:
    """Squared error; with `weight` (of the input's shape) the mean divides by the sum of the weights, as torch does."""
    return _bind(call, SquaredError(), weight_is_the_mean=True)


def l1_loss(call: Call) -> ElementwiseLoss:
    """Absolute error; Hessian zero almost everywhere."""
    return _bind(call, AbsoluteError(), weight_is_the_mean=True)


def huber_loss(call: Call) -> ElementwiseLoss:
    """Huber loss; the almost-everywhere Hessian: 1 where |u - y| < delta, else 0."""
    delta = float(call.arguments["delta"])
    if delta <= 0:
        raise ValueError(f"{call.name}: delta must be positive, got {delta}.")
    return _bind(call, Huber(delta, 1.0))


def smooth_l1_loss(call: Call) -> ElementwiseLoss:
    """Smooth L1 loss; the almost-everywhere Hessian: 1/beta where |u - y| < beta, else 0 (beta = 0 is L1)."""
    beta = float(call.arguments["beta"])
    if beta < 0:
        raise ValueError(f"{call.name}: beta must not be negative, got {beta}.")
    return _bind(call, Huber(beta, beta) if beta > 0 else AbsoluteError())


def binary_cross_entropy_with_logits(call: Call) -> ElementwiseLoss:
    """Binary cross entropy; `weight` and `pos_weight` broadcast to the input from the right, as torch does."""
    pos_weight = call.arguments["pos_weight"]
    rows = None if pos_weight is None else _rows(call, "pos_weight", pos_weight, from_the_right=True)
    return _bind(call, Logistic(rows), weight_from_the_right=True)


def poisson_nll_loss(call: Call) -> ElementwiseLoss:
    """Poisson negative log likelihood of a log rate or (`log_input=False`) of a rate."""
    full = bool(call.arguments["full"])
    if call.arguments["log_input"]:
        return _bind(call, PoissonLogRate(full))
    eps = float(call.arguments["eps"])
    lowest = call.layout.read(call.outputs.detach()) + eps
    raise_if([((lowest <= 0).any(), f"{call.name} with log_input=False: outputs are rates and must be positive.")])
    return _bind(call, PoissonRate(full, eps))


def gaussian_nll_loss(call: Call) -> ElementwiseLoss:
    """Gaussian negative log likelihood with a given variance (a float or a tensor, clamped at `eps`)."""
    var = call.arguments["var"]
    if not isinstance(var, Tensor):
        var = call.input.new_tensor(float(var))
    var = check_tensor(call.name, "var", var, call.input).detach().to(call.input.dtype)
    raise_if([((var < 0).any(), f"{call.name}: var has negative entries.")])
    if var.dim() == call.input.dim() - 1 and var.shape == call.input.shape[:-1]:
        var = var.unsqueeze(-1)
    rows = _rows(call, "var", var.clamp(min=call.arguments["eps"]))
    return _bind(call, Gaussian(rows, bool(call.arguments["full"])))


def _rows(call: Call, what: str, value: Any, from_the_right: bool = False) -> Tensor:
    """A target, weight or variance as `[N, D]`, in the working dtype."""
    value = check_tensor(call.name, what, value, call.input).detach().to(call.input.dtype)
    if from_the_right and value.dim() < call.input.dim():
        value = value.reshape((1,) * (call.input.dim() - value.dim()) + value.shape)
    return call.layout.rows(expand_to_input(call.name, what, value, call.input.shape).reshape(-1))


def _bind(
    call: Call, element: Element, weight_is_the_mean: bool = False, weight_from_the_right: bool = False
) -> ElementwiseLoss:
    y = _rows(call, "target", call.target)
    given = call.arguments.get("weight")
    weight = None if given is None else _rows(call, "weight", given, weight_from_the_right)
    checks = [not_finite(call.name, "target", y), not_finite(call.name, "outputs", call.outputs)]
    raise_if(checks if weight is None else [*checks, not_finite(call.name, "weight", weight)])
    if call.layout.mask is not None:
        padding = call.layout.mask.to(y.dtype)
        weight = padding if weight is None else weight * padding
    mean: Tensor | float = float(call.input.numel())
    if given is not None and weight_is_the_mean and weight is not None:
        mean = weight.double().sum() if weight.device.type != "mps" else weight.sum()
    return ElementwiseLoss(call.name, call.outputs, call.layout, call.denominator(mean), element, y, weight)
