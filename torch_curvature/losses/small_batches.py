"""Softmax cross entropy on the CPU in one pass over the logits and one over the columns.

For a batch of a few thousand numbers the forty operators of torch that this takes cost ten times the arithmetic. Where
these helpers do not apply (another device, a transform of `torch.func`, tensors of a subclass), the caller writes the
same in operators of torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.routing import takes_helpers

_targets = torch.ops.torch_curvature.softmax_targets.default._op
_subtract = torch.ops.torch_curvature.subtract_targets_.default._op
_columns = torch.ops.torch_curvature.softmax_columns.default._op
_product = torch.ops.torch_curvature.softmax_product.default._op

# Logits beyond which vector code and threads of torch's softmax are worth more than its calls.
FEW = 1 << 15


class Targets(NamedTuple):
    """Attributes:
    p: `[N, D, K]`, softmax of the logits.
    valid: `[N, D]`, 1 where the target counts and 0 where it is ignored, in the dtype of p.
    total: 0-dim float64, the number of those that count.
    outside: among these, targets that are no class.
    nan: values of p that are NaN.
    every: none is ignored.
    """

    p: Tensor
    valid: Tensor
    total: Tensor
    outside: bool
    nan: bool
    every: bool


def softmax_targets(logits: Tensor, y: Tensor, ignored: int) -> Targets | None:
    """Of logits `[N, D, K]` and classes `y [N, D]` of int64; None where operators of torch must do it."""
    if not 0 < logits.numel() <= FEW or type(y) is not Tensor or not takes_helpers(logits):
        return None
    p, valid, found = _targets(logits, y, ignored)
    total, outside, nan = found.tolist()
    return Targets(p, valid, found[0], outside > 0, nan > 0, total == y.numel())


def subtract_targets(g: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """`valid [N, D]` subtracted from `g [N, D, K]` at the classes `y [N, D]`, in place; rows of zero are left alone."""
    if takes_helpers(g) and takes_helpers(valid) and g.dtype == valid.dtype and type(y) is Tensor:
        _subtract(g, y, valid)
        return g
    return g.scatter_add_(-1, torch.where(valid != 0, y, 0).unsqueeze(-1), -valid.unsqueeze(-1))


def softmax_columns(p: Tensor, mass: Tensor, low: int, high: int) -> Tensor | None:
    """Columns low to high of the square root of `|mass| (diag p - p p^T)`, of `p [s, N, K]` and `mass [s, N]`:
    `[s, high - low, N, K]`; None where operators of torch must do it."""
    return _columns(p, mass, low, high) if takes_helpers(p) and takes_helpers(mass) else None


def softmax_product(p: Tensor, mass: Tensor, u: Tensor) -> Tensor | None:
    """`mass (diag p - p p^T) u` of `p [N, D, K]`, `mass [N, D]` and `u [V, N, D, K]`; None as above."""
    return (
        _product(p, mass, u)
        if takes_helpers(p) and takes_helpers(mass) and takes_helpers(u) and u.dtype == p.dtype
        else None
    )
