"""Fresh memory: how much there is, and in large pages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14  # of Linux


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


@functools.cache
def _madvise() -> Callable[..., Any]:
    return ctypes.CDLL(None).madvise


def in_large_pages(like: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor that is not filled yet; on the CPU in pages of 2 MiB where Linux gives them on request.

    Fresh pages of 4 KiB cost more than what is written to them: measured three times a copy.

    Raises:
        MemoryError: on the CPU, a GiB or more that is not free.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type == "cpu" and size >= GIB and size > free_bytes(like.device):
        free = free_bytes(like.device) / GIB
        numbers = " x ".join(map(str, shape))
        raise MemoryError(f"{numbers} numbers take {size / GIB:.3g} GiB, {free:.3g} GiB are free: give smaller batches")
    fresh = like.new_empty(shape)
    if fresh.device.type == "cpu" and size >= 2 * HUGE_PAGE and sys.platform == "linux":
        start = -(-fresh.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (fresh.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE - start
        with contextlib.suppress(OSError, AttributeError):  # advice only: not taken, it changes nothing
            _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return fresh
