"""What torch itself takes for the passes through the model that a quantity is made of. No contestant: nothing results.

Whatever contracts what the passes leave costs more. Where torch has two ways to make them, both are timed, and the
faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from . import problems
from .problems import LOSS, Problem

Run = Callable[[], object]
COLUMNS = ("diagonal", "kronecker", "blocks", "dense", "kernel")  # quantities of columns pulled back to the layers


def columns_of(classes: int, quantity: str) -> int:
    """Columns that a quantity pulls back: the Hessian of cross entropy has rank C - 1, a Jacobian has C rows."""
    return classes if quantity == "kernel" else classes - 1


@dataclass
class Forward:
    """Outputs of the model, and of its layers with parameters."""

    model: nn.Module

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda m, inputs, output: found.append(output))
            for module in self.model.modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        try:
            return self.model(x), found
        finally:
            for hook in hooks:
                hook.remove()


def step(p: Problem) -> Run:
    """The user's step, without the gradients of the weights: forward, loss, back to the layers' outputs."""
    forward = Forward(p.model)

    def run() -> object:
        outputs, layers = forward(p.x)
        return torch.autograd.grad(LOSS(outputs, p.y), layers)

    return run


def batched(p: Problem, columns: int) -> Run:
    """Forward, and all columns pulled back to the layers' outputs at once."""
    forward = Forward(p.model)
    start = torch.randn(columns, len(p.x), p.classes, dtype=p.x.dtype, device=p.x.device)

    def run() -> object:
        outputs, layers = forward(p.x)
        return torch.autograd.grad(outputs, layers, start, is_grads_batched=True)

    return run


def in_turn(p: Problem, columns: int) -> Run:
    """Forward, and one column after the other pulled back to the layers' outputs."""
    forward = Forward(p.model)
    start = torch.randn(columns, len(p.x), p.classes, dtype=p.x.dtype, device=p.x.device)

    def run() -> object:
        outputs, layers = forward(p.x)
        return [torch.autograd.grad(outputs, layers, column, retain_graph=True) for column in start]

    return run


def tangent(p: Problem, recorded: bool) -> Run:
    """One tangent, and one column pulled back to the parameters: through one recorded forward pass, or through two of
    which the one with the tangent is not recorded."""
    direction = problems.split(p, p.probes(p.size)[:, 0].to(p.x.dtype).clone())
    start = torch.randn(len(p.x), p.classes, dtype=p.x.dtype, device=p.x.device)
    parameters = dict(p.model.named_parameters())

    def push() -> Tensor:
        duals = {name: forward_ad.make_dual(q, direction[name]) for name, q in parameters.items()}
        return forward_ad.unpack_dual(functional_call(p.model, duals, (p.x,))).primal

    def run() -> object:
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            outputs = push()
        if not recorded:
            outputs = p.model(p.x)
        return torch.autograd.grad(outputs, list(parameters.values()), start)

    return run


def of(p: Problem, quantity: str) -> dict[str, Run]:
    """The ways of torch to make the passes of a quantity, by name; none where it is not said (Hessians)."""
    if quantity in ("norms", "gram"):
        return {"step": step(p)}
    if quantity in COLUMNS:
        columns = columns_of(p.classes, quantity)
        return {"batched": batched(p, columns), "in turn": in_turn(p, columns)}
    if quantity == "product":
        return {"one forward": tangent(p, True), "two forwards": tangent(p, False)}
    return {}
