"""Columns at a node of autograd's graph, sample by sample, and how a linear node passes them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .nodes import KINDS, _fits

VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
PRODUCTS = ("AddmmBackward0", "MmBackward0")


class Diagonal:
    """Columns that are zero but for each one's own entry, values [1, N, Y]."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


Columns = Tensor | Diagonal  # [W, N, Y]


def dense(value: Columns) -> Tensor:
    """[W, N, Y]."""
    if isinstance(value, Diagonal):
        _, N, Y = value.values.shape
        full = value.values.new_zeros(Y, N, Y)
        full.diagonal(dim1=0, dim2=2).copy_(value.values[0])
        return full
    return value


class Back:
    """Columns at the output of a linear node pulled back to one of its inputs."""

    def __init__(self, node: Any, input: int, child: Any, samples: int) -> None:
        self.node, self.input, self.child, self.samples = node, input, child, samples
        self.shape = shape_and_dtype(node)[0]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Diagonal):
            if self.node.name() in PRODUCTS:
                return self._rows(value)
            return Diagonal(self(value.values))
        part = KINDS[self.node.name()].back(self.node, value.reshape(value.shape[0], *self.shape), self.input)
        if part is None or not _fits(part, self.child, 1):
            raise RuntimeError("left to autograd: broadcast, converted, or through the other factor")
        return part.reshape(part.shape[0], self.samples, -1)

    def _rows(self, value: Diagonal) -> Any:
        """Rows of the weight, each times its entry: no product of matrices."""
        if self.shape[0] != self.samples:
            return self(dense(value))
        unit = torch.eye(self.shape[1], dtype=value.values.dtype, device=value.values.device)
        rows = KINDS[self.node.name()].back(self.node, unit.unsqueeze(1), self.input)  # [Y, 1, X]
        return self(dense(value)) if rows is None else value.values[0].T.unsqueeze(-1) * rows


def turned(value: Tensor) -> Tensor:
    """[W, N, Y] -> [Y, N, W]."""
    return value.permute(2, 1, 0).contiguous()


def shape_and_dtype(node: Any) -> tuple[torch.Size, torch.dtype]:
    """Of the node's output."""
    meta = node._input_metadata[0]
    return torch.Size(meta.shape), meta.dtype
