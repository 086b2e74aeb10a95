"""What a loss divides by: `loss = (1/D) sum_n c_n`, found by asking the loss for its sum."""

import copy
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .loss import LossFunction, loss_value, output_gradient


def function_of(loss_fn: LossFunction) -> LossFunction:
    """The function below any `functools.partial`."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return loss_fn


def option(loss_fn: LossFunction, name: str) -> Any:
    """An option of a loss: an attribute of a module, a keyword of a partial, or a default in a signature."""
    if isinstance(loss_fn, nn.Module):
        return getattr(loss_fn, name, None)
    try:
        parameter = inspect.signature(loss_fn).parameters.get(name)
    except (TypeError, ValueError):
        return None
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def summed(loss_fn: LossFunction) -> LossFunction:
    """The same loss with `reduction='sum'`."""
    if isinstance(loss_fn, nn.Module):
        other = copy.copy(loss_fn)
        other.reduction = "sum"  # type: ignore[assignment]
        return other
    return functools.partial(loss_fn, reduction="sum")  # type: ignore[call-arg]


def denominator(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """`D`, a scalar: 1 for a sum, else what the mean divides by (elements, tokens, class weights).

    It is the ratio of the gradients of the summed and of the mean loss.

    Raises:
        ValueError: no option `reduction`, no valid target, or a mean that is not the sum over one number.
    """
    reduction = option(loss_fn, "reduction")
    if reduction == "sum":
        return outputs.new_ones(())
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn {loss_fn!r} does not tell its normalisation (reduction: {reduction!r}): "
            "pass denominator=D, where loss = (1/D) * (sum over the samples)"
        )
    # Where the fit is perfect both gradients vanish: compare them beside it, inside (0, 1) for a probability.
    for point in (outputs.detach(), 0.9 * outputs.detach() + 0.05):
        mean = output_gradient(loss_fn, point, targets)
        total = output_gradient(summed(loss_fn), point, targets)
        if mean.isnan().any() or loss_value(loss_fn, point, targets).isnan():
            raise ValueError("the mean loss is not a number: no valid target in the batch, or outputs out of range")
        if mean.any():
            ratio = (mean * total).sum() / mean.square().sum()
            tolerance = 1e-9 if mean.dtype == torch.float64 else 1e-3
            if not torch.allclose(total, ratio * mean, rtol=tolerance, atol=tolerance * float(total.abs().max())):
                raise ValueError(f"the mean of {loss_fn!r} is not its sum over one number D: pass denominator=D")
            return ratio
    raise ValueError(f"the gradient of {loss_fn!r} vanishes, so its denominator cannot be found: pass denominator=D")
