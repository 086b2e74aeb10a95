"""Ceilings of the machine, and interleaved timings."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .memory import back_pages

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


LONG = 1.0  # seconds of a call that is not repeated for its own warming up
PAUSE = 0.5  # seconds after which free memory may have gone back to the host of a virtual machine


def interleaved(
    runs: dict[str, Run],
    clock: Clock,
    seconds: float,
    rounds: int,
    first: dict[str, float] | None = None,
    pages: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Times all of them in turn, so that what else the machine does meets all alike.

    A contestant drops out of later rounds when it has had ``seconds`` and three timings; ``rounds`` at most. ``first``
    holds the seconds of calls made before: those that take long are warm, and take their timings one after the other
    before the others, which they would keep waiting. ``pages`` holds the MiB that a call touches: they are there when
    its timing begins. Garbage is collected between timings, never during one.
    """
    first, pages = first or {}, pages or {}
    timings = {name: Timing([]) for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    last = 0.0  # when any call ended

    def once(name: str) -> float:
        nonlocal last
        if clock.device.type == "cpu" and time.perf_counter() - last > PAUSE:
            back_pages(pages.get(name, 0))
        milliseconds = clock(runs[name])
        last = time.perf_counter()
        return milliseconds

    def time_it(name: str) -> bool:
        done = timings[name].milliseconds
        if (len(done) >= 3 and spent[name] > seconds) or (len(done) >= 1 and spent[name] > 4 * seconds):
            return False
        done.append(once(name))
        spent[name] += done[-1] / 1e3
        return True

    long = [name for name in runs if first.get(name, 0.0) > LONG]
    short = [name for name in runs if name not in long]
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    gc.disable()
    try:
        for name in long:
            for _ in range(rounds):
                if not time_it(name):
                    break
                gc.collect()
        for name in short:
            warm = once(name)  # not counted
            spent[name] = warm / 1e3 if warm > 1e3 * seconds else 0.0
        for round_ in range(rounds):
            for name in short if round_ % 2 == 0 else short[::-1]:
                time_it(name)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return timings


def ceilings(device: torch.device, clock: Clock, seconds: float = 2.0) -> dict[str, float]:
    """What this machine does now: flop/s of a float32 matrix product, bytes/s of a copy and of filling memory.

    On a CPU the product is made by ``torch.mm`` and as a convolution of 1 x 1, and the faster counts: they are of two
    libraries, of which MKL uses half of the vector registers of a processor that is not Intel's.
    """
    n = 2048 if device.type == "cpu" else 8192
    a, b, c = (torch.rand(n, n, device=device) for _ in range(3))
    x, y = (torch.rand(1 << (25 if device.type == "cpu" else 28), device=device) for _ in range(2))
    runs: dict[str, Run] = {
        "matmul": lambda: torch.mm(a, b, out=c),
        "copy": lambda: y.copy_(x),
        "fill": lambda: y.fill_(1.0),
    }
    if device.type == "cpu":
        images, weight = a.view(1, n // 64, 64, n).permute(0, 3, 1, 2), b.view(n, n, 1, 1)
        runs["convolution"] = lambda: torch.conv2d(images, weight)
    timings = interleaved(runs, clock, seconds, 15)
    size = x.numel() * x.element_size()
    product = 2.0 * n**3
    work = {"matmul": product, "convolution": product, "copy": 2.0 * size, "fill": float(size)}
    found = {name: work[name] / (t.least * 1e-3) for name, t in timings.items()}
    found["matmul"] = max(found["matmul"], found.pop("convolution", 0.0))
    return found
