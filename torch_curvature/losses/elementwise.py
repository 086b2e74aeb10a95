"""Losses that are a sum over elements, `value = sum_e weight_e f(u_e, y_e)`: their Hessian is diagonal.

Weights multiply the likelihood of an element; only targets are drawn from the model.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .checks import check_tensor, expand_to_input, not_finite, raise_if, require_shape
from .elements import (
    AbsoluteError,
    Bernoulli,
    Element,
    Gaussian,
    Huber,
    Logistic,
    PoissonLogRate,
    PoissonRate,
    SquaredError,
)
from .interface import BoundLoss, Columns, check_products, working_dtype
from .layout import Layout
from .slots import Slots


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
    require_shape(call.name, "target", call.target, call.input.shape)
    pos_weight = call.arguments["pos_weight"]
    rows = None if pos_weight is None else _rows(call, "pos_weight", pos_weight, from_the_right=True)
    return _bind(call, Logistic(rows), weight_from_the_right=True)


def binary_cross_entropy(call: Call) -> ElementwiseLoss:
    """Binary cross entropy of probabilities strictly between 0 and 1; `weight` as with logits."""
    require_shape(call.name, "target", call.target, call.input.shape)
    u = call.layout.read(call.outputs.detach())
    advice = "apply binary_cross_entropy_with_logits to the logits instead, whose derivatives stay finite."
    inside = f"{call.name}: outputs must lie strictly between 0 and 1, where its derivatives exist; {advice}"
    raise_if([(((u <= 0) | (u >= 1)).any(), inside)])
    return _bind(call, Bernoulli(), weight_from_the_right=True)


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
    if given is not None and not weight_from_the_right:
        require_shape(call.name, "weight", given, call.input.shape)
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
