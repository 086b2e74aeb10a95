"""Memory: what is free, what a result takes, and refusing what cannot fit before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.pages import GIB, free_bytes, in_large_pages


def large_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory [rows, columns] that is not filled yet."""
    return in_large_pages(like, rows, columns)


class Budget:
    """The memory a call may take, in bytes.

    Args:
        gibibytes: the user's limit; None takes the memory that is free when a result is about to be allocated.
        device: where.
    """

    def __init__(self, gibibytes: float | None, device: torch.device) -> None:
        if gibibytes is not None and not gibibytes > 0:
            raise ValueError(f"memory_budget must be a positive number of GiB or None, got {gibibytes!r}")
        self.limit = None if gibibytes is None else int(gibibytes * GIB)
        self.device = device

    def require(self, entries: int, element_size: int, what: str, instead: str) -> None:
        """Raise unless ``entries`` numbers fit.

        Raises:
            MemoryError: with the size of the result in GiB.
        """
        size = entries * element_size
        if size < 1 << 26 and self.limit is None:
            return
        limit = free_bytes(self.device) if self.limit is None else self.limit
        if size > limit:
            kind = "are free" if self.limit is None else "are allowed by memory_budget"
            raise MemoryError(f"{what} takes {size / GIB:.3g} GiB and {limit / GIB:.3g} GiB {kind}: {instead}")

    def working_bytes(self) -> int:
        """For columns in flight: a quarter of the user's limit, 1 GiB without."""
        return GIB if self.limit is None else max(1 << 10, self.limit // 4)
