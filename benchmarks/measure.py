"""Ceilings of the machine, interleaved timings, and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]


class Clock:
    """Milliseconds of one call: wall time on a CPU, CUDA events behind a flush of the second-level cache on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(128 << 20, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, run: Run) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after)


def gpu_name(device: torch.device) -> str:
    """The name that CUDA gives the device; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@dataclass
class Timing:
    milliseconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def least(self) -> float:
        return min(self.milliseconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.milliseconds) < 4:
            return (max(self.milliseconds) - self.least) / self.median
        low, _, high = statistics.quantiles(self.milliseconds, n=4)
        return (high - low) / self.median


def interleaved(runs: dict[str, Run], clock: Clock, seconds: float, rounds: int) -> dict[str, Timing]:
    """Times all of them in turn, so that what else the machine does meets all alike.

    A contestant drops out of later rounds when it has had ``seconds`` and three timings; ``rounds`` at most.
    """
    timings = {name: Timing([]) for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for name in runs:
        first = clock(runs[name])  # warm-up, not counted
        spent[name] = first / 1e3 if first > 1e3 * seconds else 0.0
    for round_ in range(rounds):
        for name in list(runs) if round_ % 2 == 0 else list(runs)[::-1]:
            done = timings[name].milliseconds
            if len(done) >= 3 and spent[name] > seconds:
                continue
            if len(done) >= 1 and spent[name] > 4 * seconds:
                continue
            done.append(clock(runs[name]))
            spent[name] += done[-1] / 1e3
    return timings


def ceilings(device: torch.device, clock: Clock) -> dict[str, float]:
    """What this machine does now: flop/s of a float32 matrix product, bytes/s of a copy and of filling memory."""
    n = 2048 if device.type == "cpu" else 8192
    a, b, c = (torch.rand(n, n, device=device) for _ in range(3))
    x, y = (torch.rand(1 << (25 if device.type == "cpu" else 28), device=device) for _ in range(2))
    runs: dict[str, Run] = {
        "matmul": lambda: torch.mm(a, b, out=c),
        "copy": lambda: y.copy_(x),
        "fill": lambda: y.fill_(1.0),
    }
    timings = interleaved(runs, clock, 2.0, 15)
    size = x.numel() * x.element_size()
    work = {"matmul": 2.0 * n**3, "copy": 2.0 * size, "fill": float(size)}
    return {name: work[name] / (t.least * 1e-3) for name, t in timings.items()}


def peak_memory(run: Run, device: torch.device) -> float:
    """MiB that one call adds at its peak; call it in a fresh process (Linux: the high-water mark is reset first)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    before_kib = _status("VmRSS")
    result = run()
    peak = (_status("VmHWM") - before_kib) / 1024
    del result
    return peak


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1])
    return float("nan")
