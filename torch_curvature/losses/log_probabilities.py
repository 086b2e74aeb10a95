"""Losses that are linear in log probabilities: negative log likelihood and Kullback-Leibler divergence.

`value = sum_nd sum_k t[n,d,k] (c[n,d,k] - u[n,d,k])` has gradient `-t` and Hessian zero with respect to u. So the
Gauss-Newton matrix of a network that ends in a log-softmax *inside the network* is zero: all curvature is in the
residual. The Fisher matrix does not depend on where the network is cut: with `p = exp(u)` and the observed mass
`tau = sum_k t_k` it is `tau diag(p)`, the second moment of the score of a class drawn from p.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, rows_of_input
from .checks import check_class_weight, check_tensor, expand_to_input, not_finite, raise_if
from .cross_entropy import check_class_axis, read_class_indices
from .interface import BoundLoss, Columns, check_products, working_dtype
from .layout import Layout
from .slots import Slots
from .softmax import draw_classes


class LinearLoss(BoundLoss):
    """`t [N, D, K]` as above; `constant` is the part of the value that does not depend on the outputs."""

    def __init__(
        self, name: str, outputs: Tensor, layout: Layout, denominator: Tensor, t: Tensor, constant: Tensor
    ) -> None:
        self.name, self.outputs, self.layout, self.denominator = name, outputs, layout, denominator
        self._t, self._constant = t, constant

    def value(self) -> Tensor:
        u = self.layout.read(self.outputs.to(working_dtype(self.outputs)))
        return self._constant - torch.where(self._t != 0, self._t * u, 0).sum()

    def gradient(self) -> Tensor:
        return self.layout.write(-self._t)

    @property
    def num_columns(self) -> int:
        return 0

    def columns(self, max_columns: int | None = None) -> Columns:
        return iter(())

    def hessian_product(self, u: Tensor) -> Tensor:
        return torch.zeros_like(check_products(self, u))

    @cached_property
    def _distribution(self) -> tuple[Tensor, Tensor]:
        """p and tau, or an error where the outputs are no distribution."""
        p, mass = self.layout.read(self.outputs.detach().to(self._t.dtype)).exp(), self._t.sum(-1)
        if self.layout.classes == 1:
            raise ValueError(
                f"{self.name}: the Fisher matrix needs to know the axis of the classes, so it is defined for outputs "
                f"[N, C]; got {list(self.outputs.shape)}. Use cross_entropy with probability targets on the logits."
            )
        slack = math.sqrt(torch.finfo(self.outputs.dtype).eps)
        raise_if(
            [
                (((p.sum(-1) - 1).abs() > slack).any(), f"{self.name}: outputs must be log probabilities (exp of them "
                 "sums to 1 over the classes) for a Fisher matrix to exist; apply log_softmax, or use cross_entropy."),
                ((mass < 0).any(), f"{self.name}: the Fisher matrix needs non-negative weights and targets."),
            ]
        )  # fmt: skip
        return p, mass

    @cached_property
    def _slots(self) -> Slots:
        return Slots.pack(self._distribution[1] != 0)

    @property
    def num_fisher_columns(self) -> int:
        return self._slots.count * self.layout.classes

    def fisher_columns(self, max_columns: int | None = None) -> Columns:
        p, mass = self._distribution
        root = (p * mass.unsqueeze(-1)).sqrt()

        def block(first: int, last: int, low: int, high: int) -> tuple[Tensor, None]:
            of_slots = self._slots.take(root, first, last)
            s = root.new_zeros(of_slots.shape[0], high - low, *of_slots.shape[1:])
            s.diagonal(offset=low, dim1=1, dim2=3).copy_(of_slots[..., low:high])
            return s, None

        return self._slots.columns(self.layout, self.layout.classes, block, max_columns)

    def sample_columns(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        p, mass = self._distribution
        drawn = draw_classes(p, samples, generator)
        # The score -e_y has a mean; a random sign for each position keeps positions uncorrelated.
        sign = 2 * torch.randint(0, 2, drawn.shape, device=p.device, generator=generator) - 1
        score = ((mass / samples).sqrt() * sign).unsqueeze(-1)
        return self.layout.write(p.new_zeros(samples, *p.shape).scatter_(-1, drawn.unsqueeze(-1), score))


def nll_loss(call: Call) -> LinearLoss:
    """Negative log likelihood of log probabilities, with `weight` and `ignore_index`."""
    check_class_axis(call)
    weight = check_class_weight(call.name, call.arguments["weight"], call.input, call.layout.classes)
    y, valid, checks = read_class_indices(call)
    raise_if([*checks, (call.outputs.isnan().any(), f"{call.name}: outputs hold NaN.")])
    of_target = valid.to(call.input.dtype) if weight is None else weight[y] * valid
    t = of_target.new_zeros(*y.shape, call.layout.classes).scatter_(-1, y.unsqueeze(-1), of_target.unsqueeze(-1))
    total = of_target.sum() if of_target.device.type == "mps" else of_target.sum(dtype=torch.float64)
    return LinearLoss(call.name, call.outputs, call.layout, call.denominator(total), t, t.new_zeros(()))


def kl_div(call: Call) -> LinearLoss:
    """Pointwise divergence `t (log t - u)` of log probabilities u; `"batchmean"` divides by the batch size."""
    given = check_tensor(call.name, "target", call.target, call.input).detach().to(call.input.dtype)
    given = expand_to_input(call.name, "target", given, call.input.shape)
    rows = call.layout.rows(rows_of_input(given, class_axis=given.dim() == 2))
    rows = rows.reshape(call.layout.shape[0], call.layout.positions, call.layout.classes)
    t = rows.exp() if call.arguments["log_target"] else rows
    raise_if([not_finite(call.name, "target", t), (call.outputs.isnan().any(), f"{call.name}: outputs hold NaN.")])
    if call.layout.mask is not None:
        t = t * call.layout.mask.unsqueeze(-1)
    constant = F.kl_div(torch.zeros_like(t), t, reduction="sum")
    mean = call.input.shape[0] if call.reduction == "batchmean" else call.input.numel()
    return LinearLoss(call.name, call.outputs, call.layout, call.denominator(float(mean)), t, constant)
