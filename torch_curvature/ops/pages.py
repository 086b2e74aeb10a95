"""Fresh memory in large pages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14  # of Linux


@functools.cache
def _madvise() -> Callable[..., Any]:
    return ctypes.CDLL(None).madvise


def in_large_pages(like: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor that is not filled yet; on the CPU in pages of 2 MiB where Linux gives them on request.

    Fresh pages of 4 KiB cost more than what is written to them: measured three times a copy.
    """
    fresh = like.new_empty(shape)
    size = fresh.numel() * fresh.element_size()
    if fresh.device.type == "cpu" and size >= 2 * HUGE_PAGE and sys.platform == "linux":
        start = -(-fresh.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (fresh.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE - start
        with contextlib.suppress(OSError, AttributeError):  # advice only: not taken, it changes nothing
            _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return fresh
