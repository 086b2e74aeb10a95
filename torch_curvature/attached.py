"""A tracked forward pass made once more with its parameters in the graph, and the outputs of it that count samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import Capture, RandomState, every_module, observation
from .recorder import Recorder, UnsupportedModelError


def attached_pass(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    forward: Callable[[nn.Module, Any], tuple[Any, Any]],
    detached: Capture,
    random: RandomState,
) -> Capture:
    """The pass that ``detached`` holds, from the random numbers it began with; generators and buffers are put back."""
    now, kept = RandomState(random.device), [(b, b._version, b.clone()) for b in model.buffers()]
    recorder = Recorder(parameters, write_out=False)
    modules = every_module(model)
    handles = recorder.module_hooks(modules)
    random.restore()
    try:
        with observation(modules), recorder:
            outputs, _ = forward(model, detached.batch)
    finally:
        for handle in handles:
            handle.remove()
        now.restore()
        with torch.no_grad():
            for buffer, version, old in kept:
                if buffer._version != version:
                    buffer.copy_(old)
    return Capture(outputs, None, recorder.record, detached.samples, detached.batch)


def leaves_of(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else pytree.tree_leaves(value)


def batch_size(leaves: list[Any], inputs: tuple[Any, Any]) -> int:
    """Leading axis of the first input (arguments, keyword arguments) that an output shares, else the first output's."""
    lengths = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not lengths:
        raise UnsupportedModelError("the model returned no tensor with a batch axis")
    args, kwargs = inputs
    for value in (*args, *kwargs.values()):
        for leaf in leaves_of(value):
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] in lengths:
                return int(leaf.shape[0])
    return int(lengths[0])


def counts_samples(leaf: Any, samples: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.dim() > 0 and leaf.shape[0] == samples


def joined(outputs: list[Tensor]) -> Tensor:
    """Several outputs as one, [N, total]."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat([output.flatten(1) if output.dim() > 1 else output[:, None] for output in outputs], 1)
