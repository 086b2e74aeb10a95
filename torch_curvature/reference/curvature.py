"""Gauss-Newton, residual and Hessian of a module and loss with respect to the parameters, `H = G + R`."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .evaluation import Data, Evaluation, evaluate, split_data
from .loss import LossFunction, loss_hessian, loss_value, output_gradient
from .rows import checked_symmetric, hessian_rows, jacobian_rows


@torch.enable_grad()
def gauss_newton(model: nn.Module, loss_fn: LossFunction, data: Data, *, only: Iterable[str] | None = None) -> Tensor:
    """`G = J_N^T h_L J_N`, `[P, P]`, with `J_N [N*C, P]` and `h_L [N*C, N*C]` of the batch loss as reduced.

    Positive semi-definite when the loss is convex in the outputs. Schraudolph, 2002.
    """
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    rows = jacobian_rows(point.outputs.flatten(), list(point.variables.values()))
    matrix = rows.mT @ loss_hessian(loss_fn, point.outputs, targets) @ rows
    return (matrix + matrix.mT) / 2


@torch.enable_grad()
def residual(model: nn.Module, loss_fn: LossFunction, data: Data, *, only: Iterable[str] | None = None) -> Tensor:
    """`R = sum_k (J_L)_k H_{N_k}`, `[P, P]`, over all outputs k of all samples.

    It is the Hessian of `j_L . N(w)`, with `j_L` held fixed.
    """
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    fixed = output_gradient(loss_fn, point.outputs, targets)
    return _hessian_of((point.outputs * fixed).sum(), point)


@torch.enable_grad()
def hessian(model: nn.Module, loss_fn: LossFunction, data: Data, *, only: Iterable[str] | None = None) -> Tensor:
    """`H = d2 loss / d w2`, `[P, P]`, of the batch loss as reduced, by differentiating its gradient."""
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    return _hessian_of(loss_value(loss_fn, point.outputs, targets), point)


def _hessian_of(value: Tensor, point: Evaluation) -> Tensor:
    variables = list(point.variables.values())
    sizes = [v.numel() for v in variables]
    return checked_symmetric(hessian_rows(value, variables), list(point.variables), sizes).detach()
