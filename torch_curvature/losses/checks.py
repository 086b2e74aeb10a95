"""Checks of what a loss is bound to. All value checks of one batch cost one host sync together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def check_outputs(name: str, outputs: Any) -> Tensor:
    """The outputs as a floating tensor with a batch axis."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{name}: the model's outputs must be one tensor, got {type(outputs).__name__}. "
            "Adapt the forward pass so that it returns the tensor that the loss is applied to."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"{name}: outputs must be of a real floating dtype, got {outputs.dtype}.")
    if outputs.dim() == 0:
        raise ValueError(f"{name}: outputs must have a batch axis, [N, ...]; got a 0-dim tensor.")
    return outputs


def check_tensor(name: str, what: str, value: Any, outputs: Tensor) -> Tensor:
    """A tensor on the device of the outputs."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {what} must be a tensor, got {type(value).__name__}.")
    if value.device != outputs.device:
        raise ValueError(
            f"{name}: {what} is on {value.device}, the outputs are on {outputs.device}. Move one to the other."
        )
    return value


def check_devices(name: str, targets: Any, outputs: Tensor, error: Exception) -> None:
    """Raise where a user's loss failed and its targets are on another device than the outputs."""
    elsewhere = {str(t.device) for t in tree_leaves(targets) if isinstance(t, Tensor) and t.device != outputs.device}
    if elsewhere and "device" in str(error):
        raise ValueError(
            f"{name}: the loss fails ({str(error).splitlines()[0]}): targets are on {', '.join(sorted(elsewhere))}, "
            f"the outputs are on {outputs.device}. Move one to the other."
        ) from error


def check_class_weight(name: str, weight: Any, outputs: Tensor, classes: int) -> Tensor | None:
    """`weight [K]` in the dtype of the outputs, or None."""
    if weight is None:
        return None
    weight = check_tensor(name, "weight", weight, outputs)
    if weight.shape != (classes,):
        raise ValueError(
            f"{name}: weight must hold one weight for each of the {classes} classes (axis 1 of the loss's input), "
            f"got shape {list(weight.shape)}."
        )
    return weight.detach().to(outputs.dtype)


def expand_to_input(name: str, what: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value` broadcast to the shape of the loss's input; never past it, and never across unaligned axes."""
    aligned = value.dim() == len(shape) or value.numel() == 1
    if aligned and all(v in (1, s) for v, s in zip(value.shape, shape)) and value.dim() <= len(shape):
        return value.expand(shape)
    raise ValueError(
        f"{name}: {what} of shape {list(value.shape)} does not match the loss's input of shape {list(shape)}. "
        "torch may broadcast it so that samples are mixed; give both the same shape (squeeze or unsqueeze one)."
    )


def require_shape(name: str, what: str, value: Any, shape: torch.Size) -> None:
    """torch broadcasts many arguments; where it does not, neither does this package."""
    if isinstance(value, Tensor) and value.shape != shape:
        raise ValueError(
            f"{name}: {what} must have the shape of the loss's input, {list(shape)}, got {list(value.shape)}."
        )


def raise_if(checks: Sequence[tuple[Tensor, str]]) -> None:
    """Raise the message of the first check whose 0-dim flag is true (one host sync for all of them)."""
    if not checks:
        return
    for failed, (_, message) in zip(torch.stack([flag for flag, _ in checks]).tolist(), checks):
        if failed:
            raise ValueError(message)


def not_finite(name: str, what: str, value: Tensor) -> tuple[Tensor, str]:
    """A check that `value` holds neither NaN nor infinity."""
    return ~value.isfinite().all(), f"{name}: {what} holds NaN or infinity."
