"""How the parameters of a model are handled, and where the samples are in a layer's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Relative error up to which two ways to compute one derivative agree, by the coarsest dtype that took part.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(slots=True)
class Layout:
    """Where the samples are among the leading axes of a layer's output.

    ``axis`` is the axis that counts samples; with ``minor``, axis 0 counts positions times samples, samples fastest.
    """

    axis: int
    minor: bool = False

    @property
    def in_order(self) -> bool:
        """Whether samples lie one after the other already."""
        return self.axis == 0 and not self.minor

    def arrange(self, rows: Tensor, batch_shape: Sequence[int], samples: int, lead: int) -> Tensor:
        """[*lead, R, s, K] -> [*lead, N, S, K], S = R s / N; ``lead`` axes before (0 or 1)."""
        *front, _, s, K = rows.shape
        if self.minor:
            grid = rows.reshape(*front, -1, samples, rows.shape[lead] // batch_shape[0], s, K)
            return grid.transpose(lead, lead + 1).reshape(*front, samples, -1, K)
        if self.axis == 0:
            return rows.reshape(*front, samples, -1, K)
        grid = rows.reshape(*front, *batch_shape, s, K).movedim(lead + self.axis, lead)
        return grid.reshape(*front, samples, -1, K)


def layouts(batch_shape: Sequence[int], samples: int) -> list[Layout]:
    """Every way in which ``samples`` samples can be laid out, the usual first."""
    found = []
    if batch_shape and batch_shape[0] % samples == 0:
        found.append(Layout(0))
    found += [Layout(axis) for axis in range(1, len(batch_shape)) if batch_shape[axis] == samples]
    if batch_shape and batch_shape[0] % samples == 0 and batch_shape[0] != samples:
        found.append(Layout(0, minor=True))
    return found


@dataclass(slots=True)
class Plan:
    """How the parameters of one model are handled; made once per signature, on evidence.

    Attributes:
        layouts: of each recorded use that is trusted (by its index).
        closed: names of parameters with trusted uses, and the indices of these.
        fallback: names of parameters without, and why.
        unused: names of parameters that the outputs do not depend on.
        biases: for weights of dense layers and convolutions, the bias that was used with it, and nowhere else (nor the
            weight).
        separate: every parameter was used once, in a dense layer with one position a sample.
    """

    layouts: dict[int, Layout] = field(default_factory=dict)
    closed: dict[str, list[int]] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    biases: dict[str, str] = field(default_factory=dict)
    separate: bool = False
    conclusive: bool = True  # nothing vanished in the check, so that it need not be made again
    batched: bool = True  # one backward pass for all columns; False where a function of the model cannot
    by_nodes: bool | None = None  # the known nodes of the graph gave what autograd gives; None: not tried
    unchained: set[bool] = field(default_factory=set)  # no chain for several columns (True), for one (False)
    second_by_nodes: dict[Any, bool] = field(default_factory=dict)  # the same of second derivatives, by graph


def coverage(model: nn.Module, plans: Iterable[Plan]) -> dict[str, str]:
    """{name: "closed rule" | "fallback: why" | "unused" | "frozen"} for every parameter of the model."""
    found = {}
    for name, p in model.named_parameters():
        why = [plan.fallback[name] for plan in plans if name in plan.fallback]
        if not p.requires_grad:
            found[name] = "frozen"
        elif why:
            found[name] = f"fallback: {why[0]}"
        else:
            found[name] = "closed rule" if any(name in plan.closed for plan in plans) else "unused"
    return found


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in float32 or better."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
