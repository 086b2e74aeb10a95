"""Derivatives of the loss with respect to the outputs of the network."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .evaluation import Data, differentiable_forward, evaluate, split_data
from .network import split_by_name
from .rows import checked_symmetric, gradient, hessian_rows

LossFunction = Callable[[Tensor, Any], Tensor]


def loss_value(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """The scalar loss, or an error with the shape that came instead."""
    with differentiable_forward():
        loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the loss must be a scalar, got {shape} for outputs {tuple(outputs.shape)}: "
            "use a reduction of 'mean' or 'sum'"
        )
    return loss.reshape(())


def loss_jacobian(
    loss_fn: LossFunction, outputs: Tensor, targets: Any, *, form: Literal["row", "column"] = "row"
) -> Tensor:
    """`d loss / d outputs` as a row `J_L [1, N*C]` or a column `j_L = J_L^T [N*C, 1]`, outputs in C order."""
    if form not in ("row", "column"):
        raise ValueError(f"form must be 'row' or 'column', got {form!r}")
    row = output_gradient(loss_fn, outputs, targets).reshape(1, -1)
    return row if form == "row" else row.mT


@torch.enable_grad()
def output_gradient(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """`d loss / d outputs`, in the shape of the outputs."""
    point = outputs.detach().clone().requires_grad_()
    return gradient(loss_value(loss_fn, point, targets), [point]).detach().reshape(outputs.shape)


@torch.enable_grad()
def loss_hessian(loss_fn: LossFunction, outputs: Tensor, targets: Any) -> Tensor:
    """`h_L = d2 loss / d outputs2` of the batch loss as reduced, `[N*C, N*C]`, outputs in C order."""
    point = outputs.detach().clone().requires_grad_()
    return checked_symmetric(hessian_rows(loss_value(loss_fn, point, targets), [point]))


@torch.enable_grad()
def per_sample_gradients(model: nn.Module, loss_fn: LossFunction, data: Data, *, only: Any = None) -> dict[str, Tensor]:
    """Each sample's share of the gradient of the batch loss: name -> `[N, *shape]`; they sum to `p.grad`.

    The share of sample n is `sum_c (d loss / d output_c(n)) (d output_c(n) / d w)`, so it carries the loss's
    own normalisation (1/N for a mean over samples).
    """
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    pull = output_gradient(loss_fn, point.outputs, targets)
    shares = []
    for output, vector in zip(point.outputs, pull, strict=True):
        shares.append(gradient((output * vector).sum(), list(point.variables.values())).detach())
    shape_of: dict[str, Any] = dict(point.variables)
    return split_by_name(torch.stack(shares), shape_of)
