"""Layers called without the gradients of their own parameters.

A layer whose parameters take no part in autograd's graph costs two matrix products a step instead of three, and the
first one no backward pass at all.  What arrives at the layers' outputs is the same: parameters are leaves, no path
from one output to the next leads through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import get_gradient_edge


class _Start(torch.autograd.Function):
    """Makes a fresh tensor the start of a graph: it has a gradient edge, from which nothing is passed on.

    Not a leaf with ``requires_grad``, which what follows could not change in place, and which would keep ``.grad``.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        return None, None


def start_of_graph(output: Tensor) -> Tensor:
    """The same values, requiring a gradient; ``output`` must have been made just now, for nobody else."""
    fresh = output.data if output._is_view() else output
    started: Tensor = _Start.apply(fresh, torch.empty(0, requires_grad=True))
    return started


def must_stay_attached() -> bool:
    """Whether a function must be called as it is: what it saves goes through hooks (activation checkpointing, which
    calls it again), or it is called under a transform of ``torch.func``.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None or peek_interpreter_stack() is not None


class WithheldGradient:
    """Keeps ``.grad`` of a parameter as it is in backward passes, until removed."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.node = get_gradient_edge(parameter).node  # accumulates the gradient; held, for torch makes it anew if not
        self.hook = self.node.register_prehook(lambda gradients: (None,) * len(gradients))

    def remove(self) -> None:
        self.hook.remove()
