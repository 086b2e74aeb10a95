"""How large a layer's weights may be for the kernels of this package to be faster than torch's products, here."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")  # index2 is the second-level cache, index3 the third
_INFORMATION = Path("/proc/cpuinfo")


def cache_bytes(level: int) -> int:
    """Of the cache of level 2 (one core's) or 3 (which several share); 0 where it is not known."""
    try:
        return int((_SYSTEM / f"index{level}" / "size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 0


def products_half_wide() -> bool:
    """Whether torch's dense products leave half of the vector units unused.

    MKL takes the registers of AVX-512 on processors of Intel only. On AMD's since Zen 5 (family 26), whose units are as
    wide as these registers, it multiplies two matrices of 2048 x 2048 at 112 GFLOP/s a core, where convolutions
    (oneDNN) and the kernels here reach 200 to 250. On Zen 4 the units are half as wide, and nothing is lost.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        with _INFORMATION.open() as lines:
            pairs = [line.partition(":") for line in itertools.islice(lines, 8)]
    except OSError:
        return False
    first = {key.strip(): value.strip() for key, _, value in pairs}
    family = first.get("cpu family", "")
    return first.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= 26


def chain_weights() -> tuple[int, int]:
    """Entries of the weights of a chain of dense layers up to which it is taken by the helpers of the CPU: where
    several columns go through it, and where one does.

    Several: those that fill half of the second-level cache of one core in float32, or half a MiB where its size is not
    known; larger layers are worth a matrix product of their own. Where torch's products are half as fast as they could
    be, what fills a quarter of the third-level cache, for one column too.
    """
    several, single = min(max(1 << 17, cache_bytes(2) // 8), 1 << 19), 1 << 17
    if products_half_wide():
        shared = cache_bytes(3) // 16
        return max(several, shared), max(single, shared)
    return several, single
