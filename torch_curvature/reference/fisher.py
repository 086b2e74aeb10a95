"""The exact Fisher information matrix, and the second moment of per-sample gradients ("empirical Fisher")."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evaluation import Data, evaluate, split_data
from .loss import LossFunction, per_sample_gradients
from .normalisation import denominator as denominator_of
from .normalisation import function_of, option
from .rows import jacobian_rows


@torch.enable_grad()
def fisher(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    only: Iterable[str] | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`F = (1/D) sum_n sum_t w_t E_y [s s^T]`, `[P, P]`, `s = J_N^T d(-log p(y | output_t)) / d output`.

    `y` is drawn from the model. `t` runs over the predictions of a sample (its tokens, or its elements), `D`
    is what the loss divides by, and `w_t` the weight with which the loss counts the prediction (class weight
    of the target, `pos_weight`, 0 where it is ignored): weights belong to the data, the expectation is over
    the model's own predictive distribution. Amari, 1998.
    """
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    rows = jacobian_rows(point.outputs.flatten(), list(point.variables.values()))
    matrix = rows.mT @ output_fisher(loss_fn, point.outputs.detach(), targets, denominator=denominator) @ rows
    return (matrix + matrix.mT) / 2


def empirical_fisher(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    only: Iterable[str] | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`E = (1/D) sum_n (grad c_n)(grad c_n)^T`, `[P, P]`, where `loss = (1/D) sum_n c_n`.

    n is one sample of the batch: all tokens of a sample belong to it. `D` is found from the reduction of the
    loss unless given.
    """
    inputs, targets = split_data(data)
    point = evaluate(model, inputs, only)
    divisor = denominator_of(loss_fn, point.outputs, targets) if denominator is None else denominator
    shares = per_sample_gradients(model, loss_fn, (inputs, targets), only=only)
    rows = torch.cat([g.reshape(len(g), -1) for g in shares.values()], dim=1)
    matrix = divisor * (rows.mT @ rows)  # grad c_n is D times the share of sample n
    return (matrix + matrix.mT) / 2


def output_fisher(
    loss_fn: LossFunction, outputs: Tensor, targets: Any, *, denominator: float | Tensor | None = None
) -> Tensor:
    """The Fisher matrix with respect to the outputs, `[N*C, N*C]`, of the loss as reduced.

    Raises:
        NotImplementedError: a loss that is not the negative log likelihood of a distribution known here.
    """
    kind = type(loss_fn) if isinstance(loss_fn, nn.Module) else function_of(loss_fn)
    if kind not in FISHER_OF:
        known = sorted({getattr(k, "__name__", str(k)) for k in FISHER_OF})
        raise NotImplementedError(f"loss_fn {loss_fn!r} names no predictive distribution known here; known are {known}")
    divisor = denominator_of(loss_fn, outputs, targets) if denominator is None else denominator
    return FISHER_OF[kind](loss_fn, outputs, targets) / divisor


def _categorical(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """`-log softmax(u)[y]`, classes on axis 1: score `p - e_y`, so `w (diag p - p p^T)`."""
    p = outputs.softmax(1).movedim(1, -1)
    weights = _class_weights(loss_fn, outputs, targets)
    return _blocks(outputs, weights[..., None, None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]))


def _categorical_log(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """`-u[y]` of log probabilities: score `-e_y`, so `w diag(exp u)`."""
    return _of_log_probabilities(outputs, _class_weights(loss_fn, outputs, targets))


def _divergence(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """`sum_c t_c (log t_c - u_c)` counts each prediction with `w = sum_c t_c`."""
    if outputs.ndim != 2:
        raise NotImplementedError(f"kl_div has a Fisher matrix for outputs [N, C], got {tuple(outputs.shape)}")
    return _of_log_probabilities(outputs, (targets.exp() if option(loss_fn, "log_target") else targets).sum(1))


def _of_log_probabilities(outputs: Tensor, weights: Tensor) -> Tensor:
    p = outputs.exp().movedim(1, -1)
    total = p.sum(-1)
    if not torch.allclose(total, torch.ones_like(total), rtol=1e-4):
        raise ValueError("the outputs must be log probabilities for this loss, theirs do not sum to one")
    return _blocks(outputs, weights[..., None, None] * torch.diag_embed(p))


def _class_weights(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """`sum_c w_c y_c` of each prediction, `[N, *]`: y one-hot, smoothed or soft; 0 where ignored."""
    classes = outputs.shape[1]
    weight = option(loss_fn, "weight")
    weight = outputs.new_ones(classes) if weight is None else weight.to(outputs)
    smoothing = option(loss_fn, "label_smoothing") or 0.0
    if targets.is_floating_point():
        y, valid = targets.movedim(1, -1), torch.ones_like(targets.select(1, 0))
    else:
        valid = (targets != option(loss_fn, "ignore_index")).to(outputs)
        y = F.one_hot(torch.where(valid.bool(), targets, 0), classes).to(outputs)
    return valid * (((1 - smoothing) * y + smoothing / classes) @ weight)


def _blocks(outputs: Tensor, blocks: Tensor) -> Tensor:
    """`[N, *, K, K]`, one matrix over axis 1 of the outputs for each prediction -> `[N*C, N*C]`."""
    index = torch.arange(outputs.numel(), device=outputs.device).reshape(outputs.shape).movedim(1, -1)
    matrix = outputs.new_zeros(outputs.numel(), outputs.numel())
    matrix[index[..., :, None], index[..., None, :]] = blocks
    return matrix


def _elementwise(
    information: Callable[[LossFunction, Tensor, Tensor], Tensor],
) -> Callable[[LossFunction, Tensor, Tensor], Tensor]:
    """A distribution of its own for each element of the outputs, weighted by the loss's `weight` option."""

    def matrix(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = option(loss_fn, "weight")
        values = information(loss_fn, outputs, targets) * (1.0 if weight is None else weight.to(outputs))
        return torch.diag(values.expand_as(outputs).flatten())

    return matrix


def _bernoulli_logit(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    pos_weight = option(loss_fn, "pos_weight")
    counted = 1.0 if pos_weight is None else 1 + (pos_weight.to(u) - 1) * y
    return counted * u.sigmoid() * (-u).sigmoid()


def _bernoulli(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    return 1 / (u * (1 - u))


def _normal(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    """`(u - y)^2` is the negative log likelihood of a normal distribution of variance 1/2."""
    return torch.full_like(u, 2.0)


def _laplace(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    return torch.ones_like(u)


def _poisson(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    """Of mean and variance m: score `m - y` in `u = log m`; `1 - y / m` in u where `m = u + eps`."""
    return u.exp() if option(loss_fn, "log_input") else 1 / (u + option(loss_fn, "eps"))


def _normal_of_variance(loss_fn: LossFunction, u: Tensor, y: Tensor) -> Tensor:
    return 1 / torch.as_tensor(option(loss_fn, "var"), dtype=u.dtype).clamp(min=option(loss_fn, "eps"))


FISHER_OF: dict[Any, Callable[[LossFunction, Tensor, Tensor], Tensor]] = {
    kind: rule
    for kinds, rule in (
        ((nn.CrossEntropyLoss, F.cross_entropy), _categorical),
        ((nn.NLLLoss, F.nll_loss), _categorical_log),
        ((nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits), _elementwise(_bernoulli_logit)),
        ((nn.BCELoss, F.binary_cross_entropy), _elementwise(_bernoulli)),
        ((nn.MSELoss, F.mse_loss), _elementwise(_normal)),
        ((nn.L1Loss, F.l1_loss), _elementwise(_laplace)),
        ((nn.PoissonNLLLoss, F.poisson_nll_loss), _elementwise(_poisson)),
        ((nn.KLDivLoss, F.kl_div), _divergence),
        ((F.gaussian_nll_loss,), _elementwise(_normal_of_variance)),
    )
    for kind in kinds
}
