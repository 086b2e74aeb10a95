"""Products of two matrices by the faster of the two libraries that torch has for them on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .node_kinds import input_shape, output_shape
from .processor import products_half_wide

ENOUGH = 1 << 22  # multiply-adds from which a call of oneDNN takes less time, its preparation included


def _one_dnn() -> Callable[..., Tensor] | None:
    """``x [R, K], w [M, K], bias, activation, its numbers and name -> activation(x w^T + bias)`` by oneDNN; None where
    MKL is as fast, or this torch does not have it."""
    if not products_half_wide() or not torch.backends.mkldnn.is_available():
        return None
    try:
        found: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default._op
    except AttributeError:
        return None
    return found


_linear = _one_dnn()


def takes_one_dnn(x: Tensor) -> bool:
    """Whether large products with such a matrix go through oneDNN; not where the user has switched that off."""
    if _linear is None or x.dtype != torch.float32 or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return bool(torch.backends.mkldnn.enabled)


def _is_plain(x: Tensor) -> bool:
    """Whether oneDNN can say where its entries are: not so for all strides."""
    return x.is_contiguous() or x.mT.is_contiguous()


def product(x: Tensor, y: Tensor, add_to: Tensor | None = None) -> Tensor:
    """``x [R, K]  y [K, M]``, [R, M], added in place to what is given; not differentiable.

    In float32 through oneDNN where :func:`takes_one_dnn`, in the precision that torch's settings ask of it; else by
    ``torch.mm``.
    """
    linear = _linear if x.shape[0] * y.numel() >= ENOUGH and takes_one_dnn(x) and takes_one_dnn(y) else None
    if linear is None or not (_is_plain(x) and _is_plain(y)):
        return torch.mm(x, y) if add_to is None else add_to.addmm_(x, y)
    found = linear(x, y.mT, None, "none", [], "")
    return found if add_to is None else add_to.add_(found)


_LEFT = {"AddmmBackward0": 1, "MmBackward0": 0}  # which input of the node is the left factor [R, K]


def mostly_large(nodes: Iterable[Any]) -> bool:
    """Whether half of the products of matrices that are differentiated on the way through these nodes of autograd's
    graph, or more, are large: ``R K M >= ENOUGH``."""
    sizes = []
    for node in nodes:
        left = _LEFT.get(node.name())
        if left is not None and node.next_functions[left][0] is not None:
            sizes.append(output_shape(node).numel() * input_shape(node, left)[-1])
    return 0 < len(sizes) <= 2 * sum(size >= ENOUGH for size in sizes)
