"""Products of two matrices by the faster of the two libraries that torch has for them on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .processor import products_half_wide

ENOUGH = 1 << 22  # multiply-adds from which a call of oneDNN takes less time, its preparation included


def _one_dnn() -> object:
    """``x [R, K], w [M, K] -> x w^T`` by oneDNN; None where MKL is as fast, or this torch does not have it."""
    if not products_half_wide() or not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise.default._op
    except AttributeError:
        return None


_times_transposed = _one_dnn()


def is_wide(x: Tensor) -> bool:
    """Whether large products of such matrices go another way than autograd's engine takes them, and faster; not where
    the user has switched oneDNN off."""
    if _times_transposed is None or x.dtype != torch.float32 or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return bool(torch.backends.mkldnn.enabled)


def product(x: Tensor, y: Tensor, add_to: Tensor | None = None) -> Tensor:
    """``x [R, K]  y [K, M]``, [R, M], added to what is given; not differentiable."""
    if is_wide(x) and is_wide(y) and x.shape[0] * y.numel() >= ENOUGH:
        found: Tensor = _times_transposed(x, y.mT, None, "none", [], "")  # type: ignore[operator]
        return found if add_to is None else add_to.add_(found)
    return torch.mm(x, y) if add_to is None else add_to.addmm_(x, y)
