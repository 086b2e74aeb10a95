"""Any callable `(outputs, targets) -> scalar`: recognised as a loss of torch, or proved separable, or refused.

A callable that is one call of a torch loss on rearranged outputs takes that closed form (`trace`). Of any other, the
loss of a batch must be the sum over samples of a function of that sample, or its mean (denominator N). Nothing is
assumed: value and gradient of the batch are compared with those of every sample alone, the Hessian is probed for terms
between samples, and one sample of each batch is joined with one of the first batch, to see that the mean's denominator
is the number of samples there too.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from .batch import join_samples, take_samples
from .checks import check_devices, check_outputs, raise_if
from .generic import GenericLoss
from .interface import BoundLoss, Loss, working_dtype
from .probe import LossFunction, check_scalar, find_reduction, in_double, tolerance
from .trace import trace


class CallableLoss(Loss):
    """A callable: in closed form where it is one call of a torch loss on rearranged outputs, else generic."""

    def __init__(self, loss_fn: LossFunction, reduction: str | None) -> None:
        if reduction not in (None, "sum", "mean"):
            raise ValueError(f"reduction must be 'sum', 'mean' or None, got {reduction!r}.")
        self.name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        self._loss_fn, self._reduction, self._given = loss_fn, reduction, reduction
        self._witness: tuple[Tensor, Any] | None = None
        self._lock = threading.Lock()

    @property
    def normalisation(self) -> str:
        if self._reduction is None:
            raise ValueError(
                f"{self.name}: whether this loss is a sum or a mean over samples is known once a batch was bound; "
                "or say it: interpret(loss_fn, reduction='mean')."
            )
        return self._reduction

    def bind(self, outputs: Tensor, targets: Any) -> BoundLoss:
        outputs = check_outputs(self.name, outputs)
        raise_if([(outputs.isnan().any(), f"{self.name}: outputs hold NaN.")])
        if outputs.shape[0] == 0:
            raise ValueError(f"{self.name}: a loss of unknown form cannot be bound to a batch of no samples.")
        leaf = outputs.detach().to(working_dtype(outputs)).contiguous().requires_grad_()
        try:
            value, traced = trace(self._loss_fn, outputs, leaf, targets)
        except RuntimeError as error:
            check_devices(self.name, targets, outputs, error)
            raise
        if traced is not None:
            self._check_targets_by_sample(traced.bound, leaf, targets)
            with self._lock:
                self._settle(traced.normalisation)
            return traced.bound
        check_scalar(self.name, value)
        leaf, exact_targets, value = in_double(self._loss_fn, leaf, targets, value)
        with self._lock:
            self._settle(self._reduction_of(leaf.detach(), exact_targets))
            reduction = self.normalisation
        return GenericLoss(self.name, self._loss_fn, outputs, targets, leaf, value, reduction)

    def _check_targets_by_sample(self, bound: BoundLoss, leaf: Tensor, targets: Any) -> None:
        """Weights or targets made of the whole batch (class frequencies, say) show when half of it is bound alone."""
        half = leaf.shape[0] // 2
        if half == 0 or targets is None:
            return
        try:
            part = leaf.detach()[:half].requires_grad_()
            _, alone = trace(self._loss_fn, part, part, take_samples(targets, leaf.shape[0], range(half)))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return  # written for this batch size alone: its own structure was proved, and no other batch can be bound
        if alone is None:
            return
        part_gradient, gradient = alone.bound.gradient(), bound.gradient()[:half]
        if bool(((part_gradient - gradient).abs() > tolerance(gradient)).any()):
            raise ValueError(
                f"{self.name}: the loss of a sample depends on which others are in the batch (weights or targets "
                "computed from the whole batch?), so no result would be independent of the split into batches. Compute "
                "them once, from all the data."
            )

    def _settle(self, found: str | None) -> None:
        """Keep the reduction found; all batches must agree."""
        if found is not None and self._reduction is not None and found != self._reduction:
            raise ValueError(
                f"{self.name}: this batch's loss is a {found} over samples, but it should be a {self._reduction}."
            )
        self._reduction = self._reduction or found

    def _reduction_of(self, outputs: Tensor, targets: Any) -> str:
        found = find_reduction(self.name, self._loss_fn, outputs, targets, self._reduction)
        if found is None:
            generator = torch.Generator(device=outputs.device).manual_seed(0)
            noise = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
            moved = outputs + noise * (outputs.abs().max() + 1)
            found = find_reduction(self.name, self._loss_fn, moved, targets, None)
        if found is None:
            raise ValueError(
                f"{self.name}: the loss is zero, with zero gradient, so sum and mean cannot be told apart. Say which: "
                "interpret(loss_fn, reduction='mean')."
            )
        if found == "mean":
            self._check_witness(outputs, targets)
        return found

    def _check_witness(self, outputs: Tensor, targets: Any) -> None:
        """A mean over something else than samples shows when a sample of another batch joins one of this batch."""
        sample = outputs[:1].clone(), take_samples(targets, outputs.shape[0], [0])
        if self._witness is None:
            self._witness = sample
            return
        try:
            outputs = torch.cat([self._witness[0].to(outputs.dtype), sample[0]])
            targets = join_samples(self._witness[1], sample[1])
        except RuntimeError as error:
            if self._given is not None:
                return
            raise ValueError(
                f"{self.name}: this batch and the first one have samples of unequal shapes ({error}): it cannot be "
                "told whether the mean is over samples or over something else (tokens). Say that it is over samples, "
                "interpret(loss_fn, reduction='mean'), write the loss as a sum, or return a loss of torch itself."
            ) from error
        find_reduction(self.name, self._loss_fn, outputs, targets, "mean")
