"""One call of a torch loss: what it was applied to, and with which arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .interface import denominator_of
from .layout import Layout


@dataclass(frozen=True)
class Call:
    """A loss of `torch.nn.functional` applied to `input`, a rearrangement (by `layout`) of the `outputs`.

    `input` is detached, in the working dtype. `arguments` are those of the function by name, defaults filled in.
    """

    name: str
    outputs: Tensor
    input: Tensor
    target: Any
    arguments: dict[str, Any]
    layout: Layout

    @property
    def reduction(self) -> str:
        return reduction_of(self.name, self.arguments)

    def denominator(self, mean: Tensor | float) -> Tensor:
        """`mean` for a mean reduction, 1 for a sum."""
        return denominator_of(1.0 if self.reduction == "sum" else mean, self.outputs)


def reduction_of(name: str, arguments: dict[str, Any]) -> str:
    """`"sum"`, `"mean"` or (KL divergence only) `"batchmean"`, torch's deprecated arguments included."""
    reduction = arguments["reduction"]
    size_average, reduce = arguments.get("size_average"), arguments.get("reduce")
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    allowed = ("sum", "mean", "batchmean") if name == "kl_div" else ("sum", "mean")
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {', '.join(allowed)} (a scalar loss), got {reduction!r}.")
    return str(reduction)


def normalisation_of(name: str, arguments: dict[str, Any]) -> str:
    """`"sum"` or `"mean"`: how batches combine."""
    return "sum" if reduction_of(name, arguments) == "sum" else "mean"


def rows_of_input(value: Tensor, class_axis: bool) -> Tensor:
    """A tensor shaped like the loss's input as rows: `[R, K]` (classes on axis 1), or `[R]`."""
    if class_axis:
        return value.movedim(1, -1).reshape(-1, value.shape[1])
    return value.reshape(-1)
