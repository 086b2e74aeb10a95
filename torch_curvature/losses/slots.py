"""Columns of a Hessian that is block diagonal over positions: one block of columns for each position.

Positions with a zero block (ignored targets) take no column: the columns of a sample are packed into slots, slot k
holding the k-th position of that sample that counts, so the number of slots is the largest count of any sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

Block = Callable[[int, int, int, int], tuple[Tensor, "Tensor | None"]]


@dataclass(frozen=True)
class Slots:
    """`order [N, S]`: the positions that count, for each sample, then (on unused slots) some that do not, whose blocks
    are zero."""

    order: Tensor
    in_order: bool = False  # every position counts, slot k is position k

    @classmethod
    def pack(cls, active: Tensor) -> Slots:
        """Slots of the positions where `active [N, D]` (one host sync, two where some do not count)."""
        if active.shape[0] > 0 and bool(active.all()):
            return cls.every(active)
        most = int(active.sum(dim=1).max()) if active.numel() else 0
        return cls((~active).to(torch.uint8).argsort(dim=1, stable=True)[:, :most])

    @classmethod
    def every(cls, positions: Tensor) -> Slots:
        """A slot for each of the positions `[N, D]`."""
        return cls(torch.arange(positions.shape[1], device=positions.device).expand(positions.shape), True)

    @property
    def count(self) -> int:
        return self.order.shape[1]

    def take(self, per_position: Tensor, first: int, last: int) -> Tensor:
        """`[N, D]` or `[N, D, K]` at slots first to last: `[s, N]` or `[s, N, K]`."""
        if self.in_order:
            return (per_position if last - first == self.count else per_position[:, first:last]).transpose(0, 1)
        order = self.order[:, first:last]
        if per_position.dim() == 3:
            order = order.unsqueeze(-1).expand(-1, -1, per_position.shape[-1])
        return per_position.gather(1, order).transpose(0, 1)

    def columns(
        self, layout: Layout, per_slot: int, block: Block, max_columns: int | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All columns, in chunks. `block(first, last, low, high)` gives columns low to high of slots first to last:
        `[s, c, N, K]` and their signs `[s, c, N]` or None."""
        limit = max(self.count * per_slot, 1) if max_columns is None else max_columns
        if limit < 1:
            raise ValueError(f"max_columns must be at least 1, got {max_columns}.")
        if per_slot == 0:
            return
        slots, width = max(limit // per_slot, 1), min(limit, per_slot)
        for first in range(0, self.count, slots):
            last = min(first + slots, self.count)
            for low in range(0, per_slot, width):
                values, sign = block(first, last, low, min(low + width, per_slot))
                s = layout.write(self._place(values, layout, first, last))
                yield s, None if sign is None else sign.flatten(0, 1)

    def _place(self, values: Tensor, layout: Layout, first: int, last: int) -> Tensor:
        """`[s, c, N, K]` into zeros `[s * c, N, D, K]`, each slot at its position."""
        s, c, samples, classes = values.shape
        if layout.positions == 1:
            return values.reshape(s * c, samples, 1, classes)
        x = values.new_zeros(s, c, samples, layout.positions, classes)
        where = self.order[:, first:last].T.reshape(s, 1, samples, 1, 1).expand(s, c, samples, 1, classes)
        x.scatter_(3, where, values.unsqueeze(3))
        return x.flatten(0, 1)
