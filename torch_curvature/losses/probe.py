"""Numerical proofs that a loss of unknown form is a sum, or a mean, over samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batch import join_samples, map_targets, take_samples
from .checks import raise_if

LossFunction = Callable[[Tensor, Any], Tensor]


def evaluate(name: str, loss_fn: LossFunction, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Value, and gradient with respect to the outputs, of `loss_fn`."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = check_scalar(name, loss_fn(leaf, targets))
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach(), torch.zeros_like(leaf) if gradient is None else gradient


def in_double(loss_fn: LossFunction, leaf: Tensor, targets: Any, value: Tensor) -> tuple[Tensor, Any, Tensor]:
    """`leaf`, `targets` and `loss_fn(leaf, targets)` in float64, or as given where the callable does not take that."""
    if leaf.dtype == torch.float64 or leaf.device.type == "mps":
        return leaf, targets, value
    try:
        exact = leaf.detach().double().requires_grad_()
        exact_targets = map_targets(lambda t: t.double() if t.is_floating_point() else t, targets)
        with torch.enable_grad():
            exact_value = loss_fn(exact, exact_targets)
    except (RuntimeError, TypeError):
        return leaf, targets, value
    if not isinstance(exact_value, Tensor) or exact_value.dtype != torch.float64:
        return leaf, targets, value
    return exact, exact_targets, exact_value


def check_scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name}: the loss must return one number (a scalar tensor), got {got}. Reduce it with .sum() or .mean()."
        )
    return value.reshape(())


def tolerance(reference: Tensor) -> Tensor:
    """What rounding may account for, given values of the size of `reference`: 4096 units in the last place."""
    return 4096 * torch.finfo(reference.dtype).eps * reference.abs().max()


def single_samples(name: str, loss_fn: LossFunction, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """The loss of every sample on its own `[N]` and its gradient `[N, *out]`."""
    samples = outputs.shape[0]

    def alone(output: Tensor, target: Any) -> Tensor:
        return check_scalar(name, loss_fn(output[None], map_targets(lambda t: t[None], target)))

    take_samples(targets, samples, range(samples))
    try:
        gradients, values = torch.func.vmap(torch.func.grad_and_value(alone))(outputs, targets)
        return values, gradients
    except Exception:  # not every callable can be vectorised: one sample after the other
        pass
    pairs = []
    for n in range(samples):
        try:
            pairs.append(evaluate(name, loss_fn, outputs[n : n + 1], take_samples(targets, samples, [n])))
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{name}: the loss could not be evaluated on sample {n} alone ({error}), so it cannot be shown to be a "
                "sum or mean over samples. Write it for any batch size (no batch size fixed in a view)."
            ) from error
    return torch.stack([value for value, _ in pairs]), torch.cat([gradient for _, gradient in pairs])


def find_reduction(name: str, loss_fn: LossFunction, outputs: Tensor, targets: Any, given: str | None) -> str | None:
    """`"sum"` or `"mean"`, whichever the loss of this batch is; None where both fit (the loss is zero everywhere).

    One sample is compared with itself twice. Every sample's gradient is compared with that of the sample alone.

    Raises:
        ValueError: the loss is neither, or not the one `given`.
    """
    if outputs.shape[0] == 1:
        outputs, targets = torch.cat([outputs, outputs]), join_samples(targets, targets)
    value, gradient = evaluate(name, loss_fn, outputs, targets)
    values, gradients = single_samples(name, loss_fn, outputs, targets)
    samples = outputs.shape[0]
    alone = (
        f"on the samples alone (values {values.min().item():.3g} to {values.max().item():.3g}; a mean over no target?)"
    )
    raise_if(
        [
            (~(value.isfinite() & gradient.isfinite().all()), f"{name}: the loss or its gradient is NaN or infinite."),
            (
                ~(values.isfinite() & gradients.isfinite().flatten(1).all(1)).all(),
                f"{name}: the loss or its gradient is NaN or infinite {alone}.",
            ),
        ]
    )
    fits = [r for r, d in (("sum", 1), ("mean", samples)) if _agrees(value * d, values, gradient * d, gradients)]
    if not fits:
        raise ValueError(
            f"{name}: the loss of the batch ({value.item():.6g}) is neither the sum ({values.sum().item():.6g}) nor "
            f"the mean ({values.mean().item():.6g}) of the losses of its {samples} samples and their gradients. Either "
            "samples interact, or the mean is over something else (valid tokens, weights). For a mean over valid "
            "targets return torch.nn.functional.cross_entropy (or another loss of torch) itself, applied to the "
            "outputs rearranged, so that its denominator is known; otherwise write the loss as a sum over samples."
        )
    if given is not None and given not in fits:
        raise ValueError(f"{name}: reduction={given!r} was given, but this loss is a {fits[0]} over samples.")
    return given or (fits[0] if len(fits) == 1 else None)


def _agrees(value: Tensor, values: Tensor, gradient: Tensor, gradients: Tensor) -> bool:
    """Do value and gradient match the sums over single samples, up to rounding? (NaN never does.)"""
    close = (value - values.sum()).abs() <= tolerance(values) * math.sqrt(len(values))
    return bool(close & ((gradient - gradients).abs() <= tolerance(gradients)).all())


def is_separable(product: Callable[[Tensor], Tensor], like: Tensor, axis: int) -> bool:
    """Is the Hessian block diagonal over the places along `axis`?

    `product` multiplies by the Hessian. Any two places differ in a bit of their number, so vectors that live on the
    places where a bit is set, one for each bit, reach every off-diagonal block.
    """
    size = like.shape[axis]
    generator = torch.Generator(device=like.device).manual_seed(size + axis)
    place = torch.arange(size, device=like.device).reshape([-1 if a == axis else 1 for a in range(like.dim())])
    for bit in range(max(size - 1, 0).bit_length()):
        inside = (place >> bit) % 2 == 1
        v = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        result = product(v * inside)
        if bool(((result * ~inside).abs() > 4 * torch.finfo(v.dtype).eps * result.abs().max()).any()):
            return False
    return True
