"""The Gauss-Newton matrix, the Fisher matrix and the second moment of the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..recorder import Recorder
from .base import Batch, Columns
from .quadratic import QuadraticMatrix
from .reductions import norms_of


class GaussNewton(QuadraticMatrix):
    """``G = (1/D) sum_n J[n]^T h_L[n] J[n]``: J the network's Jacobian, h_L the Hessian of the loss in output space.

    Exact. Normalised as the loss reduces: D = 1 for a sum; for a mean the number of valid targets (or the sum of
    their class weights) over all the data, however it was split into batches. Positive semi-definite where the loss is
    convex in the outputs. A loss that is linear in the outputs has no curvature there: the matrix of ``nll_loss`` or
    ``kl_div`` on log-probabilities is zero. Take :class:`Fisher`, or cross entropy on the logits.

    Args:
        model: the network. BatchNorm must be in eval mode, dropout inactive.
        loss_fn: a loss module or function, or any callable (outputs, targets) -> scalar.
        data: one batch ``(inputs, targets)`` or an iterable of batches. Inputs: a tensor, a tuple (positional) or a
            dictionary (keyword).
        forward: ``(model, batch) -> (outputs, targets)`` for any other kind of batch or output.
        memory_budget: GiB that a call may take; None: what is free.
        progress: report batches on standard error.
    """

    title = "GaussNewton"

    def _columns(self, batch: Batch, limit: int) -> Columns:
        columns: Columns = batch.bound.columns(max_columns=limit)
        return columns

    def _output_product(self, batch: Batch, u: Tensor) -> Tensor:
        product: Tensor = batch.bound.hessian_product(u)
        return product


class Fisher(QuadraticMatrix):
    """The Fisher information of the model's own predictive distribution, normalised as the loss.

    ``F = (1/D) sum_n J[n]^T E[grad log p grad log p^T] J[n]``. Equal to the Gauss-Newton matrix for cross entropy and
    squared error with plain targets.

    Args:
        samples: None for the exact expectation; M for M draws of the targets per sample (unbiased).
        generator: gives the seed of the draws (a fixed one without it; torch's default generator is never touched).
            Every method of one object uses the same draws.
        model, loss_fn, data, forward, memory_budget, progress: as :class:`GaussNewton`.

    Raises:
        ValueError: the loss has no predictive distribution, or ``samples`` is not positive.
    """

    title = "Fisher"

    def __init__(
        self,
        model: Any,
        loss_fn: Any,
        data: Any,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
            raise ValueError(f"samples must be a positive integer, or None for the exact Fisher, got {samples!r}")
        super().__init__(model, loss_fn, data, **options)
        self.samples = samples
        self.seed = 0
        if generator is not None:
            self.seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        self._draws = torch.Generator(self.device)

    def _sweep(self, what: str, tangents: dict[str, Tensor] | None = None) -> Iterator[Batch]:
        self._draws.manual_seed(self.seed)
        return super()._sweep(what, tangents)

    def _columns(self, batch: Batch, limit: int) -> Columns:
        if self.samples is None:
            columns: Columns = batch.bound.fisher_columns(max_columns=limit)
            yield from columns
            return
        for start in range(0, self.samples, limit):
            # each draw is scaled for its own chunk: E[sum_m s s^T] is the Fisher for any number of draws
            M = min(limit, self.samples - start)
            yield batch.bound.sample_columns(M, self._draws) * (M / self.samples) ** 0.5, None

    def _prefers_columns(self, vectors: int) -> bool:
        return self.samples is not None or super()._prefers_columns(vectors)

    def _output_product(self, batch: Batch, u: Tensor) -> Tensor:
        total = torch.zeros_like(u)
        axes = tuple(range(3, u.dim() + 1))
        # a few columns at a time: with a large vocabulary they are never all there
        limit = max(1, (1 << 22) // max(1, u[0].numel()))
        for s, _ in self._columns(batch, limit):
            overlap = (s[:, None] * u[None]).sum(axes, keepdim=True)  # [V, K, N, 1...]
            total += (overlap * s[:, None]).sum(0)
        return total


class EmpiricalFisher(QuadraticMatrix):
    """The second moment of per-sample gradients, ``E = (1/D) sum_n (grad c_n)(grad c_n)^T``.

    The loss is ``(1/D) sum_n c_n`` with ``c_n`` the unnormalised loss of one sample (all its tokens together) and D = 1
    for a sum, the mean's denominator for a mean. This is what is often called the empirical Fisher.

    Args: as :class:`GaussNewton`.
    """

    title = "EmpiricalFisher"
    one_column = True

    def gradient_norms(self, squared: bool = False) -> Tensor:
        """[N] norms ``|grad c_n|`` of the gradients of single samples over all parameters, in the order of the data.

        Not divided by D, so that their squares are D times the diagonal of :meth:`gram`: what clipping and sampling by
        importance ask for. No gradient is formed where that is cheaper,
        and the passes are made without the gradients of the weights; :func:`track` gives them for a step of one's own.

        Args:
            squared: the squares instead.
        """
        squares = norms_of(self, "gradient_norms")
        return squares if squared else squares.sqrt_()

    def _recorder(self) -> Recorder:
        return Recorder(self.parameters, write_out=False)  # one column is a gradient: any function has that

    def _columns(self, batch: Batch, limit: int) -> Columns:
        yield batch.bound.gradient().detach().unsqueeze(0), None

    def _prefers_columns(self, vectors: int) -> bool:
        return True

    def _output_product(self, batch: Batch, u: Tensor) -> Tensor:
        gradient = batch.bound.gradient().detach()
        axes = tuple(range(2, u.dim()))
        product: Tensor = (u * gradient).sum(axes, keepdim=True) * gradient
        return product
