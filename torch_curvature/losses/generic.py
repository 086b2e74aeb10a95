"""A loss of unknown form, separable over samples, by automatic differentiation.

The Hessian is taken by products (a double backward pass) of the whole batch. Along each further axis of the outputs on
which the loss is separable (token positions) all places share a product. Its square root is that of an
eigendecomposition of each block, signed where the loss is not convex. Computed in float64 where the callable takes it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .checks import raise_if
from .interface import BoundLoss, Columns, check_products, denominator_of, working_dtype
from .layout import Layout, permuted_layout
from .probe import LossFunction, check_scalar, is_separable, tolerance
from .slots import Slots

# The dense blocks of a loss of unknown form may take this many bytes.
DENSE_LIMIT = 2**31


class GenericLoss(BoundLoss):
    """A callable bound to a batch; see the module's text."""

    def __init__(
        self,
        name: str,
        loss_fn: LossFunction,
        outputs: Tensor,
        targets: Any,
        leaf: Tensor,
        value: Tensor,
        reduction: str,
    ) -> None:
        self.name, self.outputs = name, outputs
        self._loss_fn, self._targets, self._leaf = loss_fn, targets, leaf
        self._dtype = working_dtype(outputs)
        self._scale = outputs.shape[0] if reduction == "mean" else 1
        self.denominator = denominator_of(float(self._scale), outputs)
        self._first = self._differentiate(value)
        if not is_separable(self._product, leaf.detach(), 0):
            raise ValueError(
                f"{name}: the second derivative of the loss couples the samples of a batch, so it is no sum over "
                "samples; only such losses have per-sample curvature."
            )

    def _differentiate(self, value: Tensor) -> Tensor:
        """The gradient of the unnormalised sum, with its graph."""
        if not value.requires_grad:
            return torch.zeros_like(self._leaf)
        with torch.enable_grad():
            (first,) = torch.autograd.grad(
                value.reshape(()) * self._scale, self._leaf, create_graph=True, allow_unused=True
            )
        return torch.zeros_like(self._leaf) if first is None else first

    def value(self) -> Tensor:
        outputs = self.outputs.to(self._dtype)
        return check_scalar(self.name, self._loss_fn(outputs, self._targets)) * self._scale

    def gradient(self) -> Tensor:
        return self._first.detach().to(self._dtype)

    def _product(self, v: Tensor) -> Tensor:
        """The Hessian times one vector `[N, *out]`."""
        if not self._first.requires_grad:
            return torch.zeros_like(v)
        (result,) = torch.autograd.grad(self._first, self._leaf, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if result is None else result.detach()

    def hessian_product(self, u: Tensor) -> Tensor:
        u = check_products(self, u)
        products = [self._product(v.to(self._leaf.dtype)).to(self._dtype) for v in u]
        return torch.stack(products) if products else torch.zeros_like(u)

    @cached_property
    def _axes(self) -> tuple[list[int], list[int]]:
        """The axes of a sample's outputs along which the loss is separable, and the others."""
        like = self._leaf.detach()
        free = [a for a in range(1, like.dim()) if is_separable(self._product, like, a)]
        return free, [a for a in range(1, like.dim()) if a not in free]

    @cached_property
    def _layout(self) -> Layout:
        free, coupled = self._axes
        return permuted_layout(self._leaf.shape, free, coupled, self._leaf.device)

    @cached_property
    def _blocks(self) -> Tensor:
        """The Hessian, `[N, D, K, K]`: D separable places, K coupled ones."""
        samples, places, width = self._leaf.shape[0], self._layout.positions, self._layout.classes
        size = samples * places * width * width * self._leaf.element_size()
        if size > DENSE_LIMIT:
            raise ValueError(
                f"{self.name}: the Hessians of this loss of unknown form are [{samples}, {places}, {width}, {width}] "
                f"and take {size / 2**30:.1f} GiB. Return a loss of torch itself (cross_entropy has a closed form), "
                "give smaller batches, or use products only."
            )
        blocks = self._leaf.new_empty(samples, places, width, width)
        unit = torch.eye(width, dtype=blocks.dtype, device=blocks.device)
        for k in range(width):
            v = self._layout.write(unit[k].expand(samples, places, width))
            blocks[..., k] = self._layout.read(self._product(v))
        if blocks.numel():
            bad = ~blocks.isfinite().all()
            wrong = (blocks - blocks.mT).abs().max() > tolerance(blocks)
            derivative = f"{self.name}: the second derivative that torch gives for this loss"
            written = "is not symmetric, so it is wrong. Write the loss out in elementary operations."
            raise_if([(bad, f"{derivative} holds NaN or infinity."), (wrong, f"{derivative} {written}")])
        return (blocks + blocks.mT) / 2

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """Columns `[N, D, V, K]` and their eigenvalues `[N, D, V]`, zero ones dropped."""
        double = torch.float32 if self._blocks.device.type == "mps" else torch.float64
        values, vectors = torch.linalg.eigh(self._blocks.to(double))
        if not values.numel():
            return vectors.to(self._dtype), values.to(self._dtype)
        rounding = torch.finfo(self._blocks.dtype).eps * self._blocks.shape[-1]
        values = torch.where(values.abs() > rounding * values.abs().amax(-1, keepdim=True), values, 0)
        order = values.abs().argsort(-1, descending=True)[..., : int((values != 0).sum(-1).max())]
        values = values.gather(-1, order)
        vectors = vectors.mT.gather(-2, order.unsqueeze(-1).expand(*order.shape, vectors.shape[-1]))
        return (vectors * values.abs().sqrt().unsqueeze(-1)).to(self._dtype), values.to(self._dtype)

    @cached_property
    def _slots(self) -> Slots:
        return Slots.pack((self._roots[1] != 0).any(-1))

    @property
    def num_columns(self) -> int:
        return self._slots.count * self._roots[1].shape[-1]

    def columns(self, max_columns: int | None = None) -> Columns:
        roots, values = self._roots
        rank, width = roots.shape[-2:]
        signs = values.sign() if bool((values < 0).any()) else None

        def block(first: int, last: int, low: int, high: int) -> tuple[Tensor, Tensor | None]:
            s = self._slots.take(roots.flatten(-2), first, last)
            s = s.reshape(*s.shape[:2], rank, width)[:, :, low:high].transpose(1, 2)
            sign = None if signs is None else self._slots.take(signs, first, last)[..., low:high].transpose(1, 2)
            return s, sign

        return self._slots.columns(self._layout, rank, block, max_columns)

    def _no_distribution(self) -> ValueError:
        return ValueError(
            f"{self.name}: no predictive distribution is known for this loss, so it has no Fisher matrix. Use a loss "
            "of torch.nn.functional that is a likelihood, or the Gauss-Newton matrix or the empirical Fisher."
        )

    @property
    def num_fisher_columns(self) -> int:
        raise self._no_distribution()

    def fisher_columns(self, max_columns: int | None = None) -> Columns:
        raise self._no_distribution()

    def sample_columns(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        raise self._no_distribution()
