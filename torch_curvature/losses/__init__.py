"""Losses: gradient, Hessian and Fisher matrix of a loss with respect to the outputs of the network, exactly.

    loss = interpret(loss_fn)                # a module, a torch function, a partial of one, or any callable
    bound = loss.bind(outputs, targets)      # one batch

**Normalisation.** All quantities of a `BoundLoss` are unnormalised sums over samples. `value() / denominator` is the
batch loss as the user reduces it, and `loss.combine(denominators)` the denominator of all batches together, so a
result does not depend on how the data was split. With `reduction="mean"` the denominator is torch's own: the sum of the
class weights of valid targets (cross entropy and NLL with class indices), the number of positions (cross entropy with
probabilities), the number of elements (elementwise losses and KL divergence; the sum of `weight` for `mse_loss` and
`l1_loss` with one), the batch size (`batchmean`, and any callable of unknown form).

**Square root of the Hessian.** `columns()` gives s with `sum_v sign_v s_v s_v^T` = Hessian of each sample: in closed
form for the losses of torch, with fewer columns than outputs where the Hessian is singular (softmax: C - 1; zero
entries and ignored positions: none). L1, Huber and smooth L1 have their almost-everywhere Hessian.

**Fisher matrix.** Each position (token, element) n has a loss `tau_n * (cross entropy of a target distribution and the
model's predictive distribution p_n)` up to a constant. `tau_n >= 0` is the *observed mass*: how often, with weights,
that position was observed. It is data: `weight[y_n]`, or zero where y_n is ignored, for class indices (in general
`sum_k weight_k q_nk` for the smoothed or given target distribution q_n); `weight * (pos_weight y + 1 - y)` for binary
cross entropy; `weight` for other losses. Weights multiply the likelihood, and only the label is drawn anew from the
model, positions independently:

    F_n = tau_n E_{y ~ p_n} [ grad(-log p_n(y)) grad(-log p_n(y))^T ],

divided by the loss's own denominator. (The other reading, the second moment of the gradient of the loss of a drawn
label with *that* label's weight, is not used.) So the Fisher matrix equals the Gauss-Newton matrix for cross entropy
with all its options, binary cross entropy, squared error, Poisson loss of a log rate, and Gaussian loss of given
variance. The distributions: softmax; exp of the outputs (`nll_loss`, `kl_div`: they must be normalised); Bernoulli;
for `mse_loss` a Gaussian of variance 1/2, for which `(u - y)^2` is the negative log likelihood, and for `l1_loss` a
Laplace distribution of scale 1; Poisson with rate exp(u), or u + eps with `log_input=False`; Gaussian of the given
variance. The two matrices differ for a Poisson rate, for Bernoulli probabilities, and where the Gauss-Newton matrix is
zero: `l1_loss`, and `nll_loss` and `kl_div` (linear in the outputs). Other losses have no Fisher matrix and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .callables import CallableLoss
from .functional import as_functional
from .interface import BoundLoss, Loss

__all__ = ["BoundLoss", "Loss", "interpret"]


def interpret(loss_fn: Callable[..., Any] | Loss, *, reduction: str | None = None) -> Loss:
    """The loss that `loss_fn` is: a loss module of torch, a function of `torch.nn.functional`, a `functools.partial` of
    one with keyword arguments, or any callable `(outputs, targets) -> scalar`.

    Args:
        loss_fn: the loss with its reduction.
        reduction: `"sum"` or `"mean"`, needed only for a callable for which it cannot be found out (checked anyway).

    Raises:
        TypeError: not a callable, or arguments that the torch loss does not have.
        ValueError: `reduction="none"`, or a `reduction` that contradicts the loss.
    """
    if isinstance(loss_fn, Loss):
        loss = loss_fn
    elif not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a loss module or a callable (outputs, targets), got {type(loss_fn).__name__}."
        )
    else:
        loss = as_functional(loss_fn) or CallableLoss(loss_fn, reduction)
    if reduction is not None and not isinstance(loss, CallableLoss) and loss.normalisation != reduction:
        raise ValueError(f"reduction={reduction!r} was given, but {loss.name} is reduced by a {loss.normalisation}.")
    return loss
