"""Targets of any form (a tensor, or tuples, lists and dictionaries of them) by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def map_targets(function: Callable[[Tensor], Tensor], targets: Any) -> Any:
    """`function` applied to every tensor of `targets`; None stays None."""
    if isinstance(targets, Tensor):
        return function(targets)
    if isinstance(targets, dict):
        return {key: map_targets(function, value) for key, value in targets.items()}
    if isinstance(targets, tuple | list):
        parts = [map_targets(function, value) for value in targets]
        return type(targets)(*parts) if hasattr(targets, "_fields") else type(targets)(parts)
    if targets is None:
        return None
    raise TypeError(f"targets hold a {type(targets).__name__}; tensors with the samples on axis 0 are needed.")


def take_samples(targets: Any, samples: int, index: Sequence[int] | Tensor) -> Any:
    """The targets of some of the `samples` samples."""

    def take(x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[0] != samples:
            raise ValueError(
                f"targets must have the {samples} samples of the outputs on axis 0, got shape {list(x.shape)}."
            )
        return x[torch.as_tensor(index, device=x.device)]

    return map_targets(take, targets)


def join_samples(first: Any, second: Any) -> Any:
    """Two targets of the same form, one after the other along axis 0."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return {key: join_samples(first[key], second[key]) for key in first}
    if isinstance(first, tuple | list):
        parts = [join_samples(a, b) for a, b in zip(first, second)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return None
