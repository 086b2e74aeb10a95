"""Memory: what is free, what a result takes, and refusing what cannot fit before anything is computed."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..ops.pages import in_large_pages

GIB = 1 << 30


def large_matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory [rows, columns] that is not filled yet."""
    return in_large_pages(like, rows, columns)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as report:
            for line in report:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 8 * GIB


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
