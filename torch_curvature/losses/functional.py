"""Which losses of torch have a closed form, and how a module or a partial function names one with its options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .call import Call, normalisation_of
from .checks import check_outputs
from .cross_entropy import cross_entropy
from .elementwise import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
)
from .interface import BoundLoss, Loss, working_dtype
from .layout import Layout, direct_layout
from .log_probabilities import kl_div, nll_loss


@dataclass(frozen=True)
class ClosedForm:
    """A function of `torch.nn.functional`, its module, and how it is bound. `class_axis(dim)`: are there classes on
    axis 1 of an input of that many axes?"""

    function: Callable[..., Tensor]
    module: type[nn.Module]
    bind: Callable[[Call], BoundLoss]
    class_axis: Callable[[int], bool] = lambda dim: False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> list[str]:
        return list(_parameter_names(self.function))

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """All arguments but input and target by name, defaults filled in."""
        defaults = _defaults(self.function)
        if defaults is not None and given.keys() <= defaults.keys():
            return defaults | given
        try:
            bound = _signature(self.function).bind(None, None, **given)
        except TypeError as error:
            raise TypeError(
                f"{self.name}: {error}. Give further arguments by keyword: "
                f"functools.partial(torch.nn.functional.{self.name}, ...)."
            ) from None
        bound.apply_defaults()
        return {k: v for k, v in bound.arguments.items() if k not in self.parameters[:2]}


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    """Asked for with every loss, and slow to find out."""
    return inspect.signature(function)


@functools.cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(_signature(function).parameters)


@functools.cache
def _defaults(function: Callable[..., Any]) -> dict[str, Any] | None:
    """Of all arguments after the first two, None where one of them has none; to be copied."""
    rest = list(_signature(function).parameters.values())[2:]
    if any(parameter.default is parameter.empty for parameter in rest):
        return None
    return {parameter.name: parameter.default for parameter in rest}


CLOSED_FORMS = [
    ClosedForm(F.cross_entropy, nn.CrossEntropyLoss, cross_entropy, lambda dim: dim >= 2),
    ClosedForm(F.nll_loss, nn.NLLLoss, nll_loss, lambda dim: dim >= 2),
    ClosedForm(F.kl_div, nn.KLDivLoss, kl_div, lambda dim: dim == 2),
    ClosedForm(F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss, binary_cross_entropy_with_logits),
    ClosedForm(F.binary_cross_entropy, nn.BCELoss, binary_cross_entropy),
    ClosedForm(F.mse_loss, nn.MSELoss, mse_loss),
    ClosedForm(F.l1_loss, nn.L1Loss, l1_loss),
    ClosedForm(F.huber_loss, nn.HuberLoss, huber_loss),
    ClosedForm(F.smooth_l1_loss, nn.SmoothL1Loss, smooth_l1_loss),
    ClosedForm(F.poisson_nll_loss, nn.PoissonNLLLoss, poisson_nll_loss),
    ClosedForm(F.gaussian_nll_loss, nn.GaussianNLLLoss, gaussian_nll_loss),
]
BY_FUNCTION = {form.function: form for form in CLOSED_FORMS}
BY_MODULE = {form.module: form for form in CLOSED_FORMS}


class FunctionalLoss(Loss):
    """A loss of torch that is applied to the outputs themselves."""

    def __init__(self, form: ClosedForm, given: dict[str, Any]) -> None:
        self.name, self._form, self._arguments = form.name, form, form.arguments(given)
        self._normalisation = normalisation_of(self.name, self._arguments)

    @property
    def normalisation(self) -> str:
        return self._normalisation

    def bind(self, outputs: Tensor, targets: Any) -> BoundLoss:
        outputs = check_outputs(self.name, outputs)
        layout = direct_layout(outputs.shape, self._form.class_axis(outputs.dim()))
        return bind_call(self._form, outputs, outputs.detach(), targets, self._arguments, layout)


def bind_call(
    form: ClosedForm, outputs: Tensor, given: Tensor, target: Any, arguments: dict[str, Any], layout: Layout
) -> BoundLoss:
    """Bind one call of a torch loss, `given` a rearrangement of `outputs`."""
    given = given.detach().to(working_dtype(outputs))
    return form.bind(Call(form.name, outputs, given, target, arguments, layout))


def as_functional(loss_fn: Callable[..., Any]) -> FunctionalLoss | None:
    """The closed form that a module, a function or a partial function is, or None."""
    given: dict[str, Any] = {}
    if isinstance(loss_fn, nn.Module):
        form = BY_MODULE.get(type(loss_fn))
        if form is None or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
            return None
        if form.module is nn.GaussianNLLLoss:
            raise TypeError(
                "GaussianNLLLoss takes a third argument, the variance: give functools.partial(torch.nn.functional."
                "gaussian_nll_loss, var=...) for a fixed variance, or lambda outputs, targets: torch.nn.functional."
                "gaussian_nll_loss(mean of outputs, targets, var of outputs) for a predicted one."
            )
        for name in _parameter_names(form.function)[2:]:
            for place in (vars(loss_fn), loss_fn._buffers, loss_fn._parameters):
                if name in place:
                    given[name] = place[name]
                    break
        return FunctionalLoss(form, given)
    if isinstance(loss_fn, functools.partial):
        form = BY_FUNCTION.get(loss_fn.func)
        if form is None or loss_fn.args or set(loss_fn.keywords) & set(form.parameters[:2]):
            return None
        given = loss_fn.keywords
    else:
        try:
            form = BY_FUNCTION.get(loss_fn)
        except TypeError:  # a callable without a hash
            return None
    return None if form is None else FunctionalLoss(form, given)
