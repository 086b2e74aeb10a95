"""Functions that are no layers, and that an observed pass must not overlook."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class UnsupportedModelError(RuntimeError):
    """The model has no well-defined per-sample derivatives as it stands; the message says what to change."""


def _refuse_batch_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **options: Any,
) -> None:
    if training:
        raise UnsupportedModelError(
            "batch normalisation with batch statistics mixes the samples of a batch, so that no sample has a gradient "
            "of its own: call model.eval() (with track_running_stats=True) before asking for its curvature, or use "
            f"GroupNorm or LayerNorm. Found at an input of shape {tuple(input.shape)}"
        )


def _refuse_running_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    *rest: Any,
    **options: Any,
) -> None:
    if use_input_stats and running_mean is not None:
        raise UnsupportedModelError(
            "instance normalisation in training mode would change its running statistics: call model.eval()"
        )


REFUSALS: dict[Callable[..., Any], Callable[..., None]] = {
    F.batch_norm: _refuse_batch_statistics,
    F.instance_norm: _refuse_running_statistics,
}

# Where rows looked up once for all samples can meet the samples.
SUMS = {torch.add, torch.Tensor.add}

_REORDERING = [
    *("argsort", "sort", "topk", "index_select", "gather", "take", "take_along_dim", "nonzero"),
    *("masked_select", "masked_scatter", "masked_scatter_", "index_add", "index_add_", "index_copy", "index_copy_"),
    *("index_put", "index_put_", "scatter", "scatter_", "scatter_add", "scatter_add_"),
]
# Functions that can put samples in an order that depends on the data, so that each batch must be checked anew.
REORDERING = {getattr(owner, name) for owner in (torch, torch.Tensor) for name in _REORDERING if hasattr(owner, name)}
REORDERING |= {torch.Tensor.__getitem__, torch.Tensor.__setitem__}

# Ways to a hook in the graph, which may make something else of a gradient: only autograd itself calls it.
HOOKING: set[Any] = {torch.Tensor.register_hook, inspect.getattr_static(torch.Tensor, "grad_fn").__get__}


def indexes_by_data(func: Any, args: Any) -> bool:
    """Whether a call of one of these is more than indexing by integers and slices."""
    if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        return True
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, (Tensor, list)) for i in index)
