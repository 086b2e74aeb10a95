"""What the rest of the package knows of a loss: `Loss`, and `BoundLoss`, a loss bound to one batch."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Columns = Iterator[tuple[Tensor, "Tensor | None"]]


class Loss(abc.ABC):
    """A loss function with its reduction, not yet bound to data."""

    name: str

    @property
    @abc.abstractmethod
    def normalisation(self) -> str:
        """`"sum"` or `"mean"`. For a callable of unknown form it is known once a batch has been bound.

        Raises:
            ValueError: the callable has not been bound yet, and no reduction was given to `interpret`.
        """

    @abc.abstractmethod
    def bind(self, outputs: Tensor, targets: Any) -> BoundLoss:
        """The loss of one batch: `outputs [N, *out]` of the network and whatever targets the loss takes.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or values that the loss cannot take.
        """

    def combine(self, denominators: Sequence[Tensor]) -> Tensor:
        """The denominator of all batches together, a 0-dim float64 tensor: 1 for a sum, the total for a mean.

        The quantity of all the data is the sum over batches of the unnormalised quantity, divided by this.

        Raises:
            ValueError: no batch, or a mean over nothing (every target ignored, or all weights zero).
        """
        if not denominators:
            raise ValueError(f"{self.name}: the data holds no batch.")
        if self.normalisation == "sum":
            return torch.ones_like(denominators[0])
        total = denominators[0]
        if len(denominators) > 1:
            total = torch.stack([d.to(total.device) for d in denominators]).sum()
        value = total.item()
        if value == 0 or value != value:
            raise ValueError(
                f"{self.name} with reduction='mean': the mean is over nothing (its denominator over all batches "
                f"is {value}): every target is ignored, or all weights are zero. Give at least one valid target, "
                "or use reduction='sum'."
            )
        return total


class BoundLoss(abc.ABC):
    """A loss bound to one batch. Everything is an *unnormalised sum* over samples.

    The batch loss as the user reduces it is `value() / denominator`. Gradients, columns and products are those
    of `value()`, with respect to the outputs `[N, *out]`, in the dtype of the outputs, or float32 where they are
    half precision. `N` samples, `C` outputs a sample.
    """

    name: str
    outputs: Tensor
    denominator: Tensor

    @abc.abstractmethod
    def value(self) -> Tensor:
        """The sum, a 0-dim tensor, differentiable (twice) with respect to the outputs it was bound to."""

    @abc.abstractmethod
    def gradient(self) -> Tensor:
        """`[N, *out]`: gradient of `value()` with respect to the outputs."""

    @property
    @abc.abstractmethod
    def num_columns(self) -> int:
        """How many columns `columns()` yields in total."""

    @abc.abstractmethod
    def columns(self, max_columns: int | None = None) -> Columns:
        """Chunks `(s [V, N, *out], sign [V, N] or None)` of at most `max_columns` columns.

        For every sample n, the sum over all v of `sign[v, n] s[v, n] s[v, n]^T` is the Hessian of `value()` with
        respect to the outputs of sample n (no sign: all are +1).
        """

    @abc.abstractmethod
    def hessian_product(self, u: Tensor) -> Tensor:
        """`u [K, N, *out]` times the Hessian of `value()`: `[K, N, *out]`, with no C x C array."""

    @property
    @abc.abstractmethod
    def num_fisher_columns(self) -> int:
        """How many columns `fisher_columns()` yields in total.

        Raises:
            ValueError: no predictive distribution belongs to the loss.
        """

    @abc.abstractmethod
    def fisher_columns(self, max_columns: int | None = None) -> Columns:
        """As `columns()`, for the exact Fisher of the model's own predictive distribution; never signed.

        Raises:
            ValueError: no predictive distribution belongs to the loss.
        """

    @abc.abstractmethod
    def sample_columns(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """`s [M, N, *out]` from M = `samples` draws of the targets, with `E[sum_m s s^T]` = Fisher of each sample.

        Raises:
            ValueError: no predictive distribution belongs to the loss, or `samples` < 1.
        """


def check_products(bound: BoundLoss, u: Tensor) -> Tensor:
    """`u` in the working dtype, or an error that names the shape wanted."""
    if u.dim() != bound.outputs.dim() + 1 or u.shape[1:] != bound.outputs.shape:
        raise ValueError(
            f"hessian_product: u must have shape [K, {', '.join(map(str, bound.outputs.shape))}], got {list(u.shape)}."
        )
    return u.detach().to(working_dtype(bound.outputs))


def working_dtype(outputs: Tensor) -> torch.dtype:
    """float32 for half precision, else the dtype of the outputs."""
    return torch.float32 if outputs.dtype in (torch.float16, torch.bfloat16) else outputs.dtype


def denominator_of(value: Tensor | float, like: Tensor) -> Tensor:
    """A 0-dim float64 tensor on the device of `like` (on the CPU where the device has no float64)."""
    device = torch.device("cpu") if like.device.type == "mps" else like.device
    if isinstance(value, Tensor):
        if value.dtype == torch.float64 and value.device == device and not value.requires_grad:
            return value
        return value.detach().to(device).to(torch.float64)
    return torch.tensor(float(value), dtype=torch.float64, device=device)
