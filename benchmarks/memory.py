"""Peak memory of a contestant in a process of its own, and pages that are there when a timing begins."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import multiprocessing
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .environment import MODULES

Run = Callable[[], object]
PATIENCE = 120.0  # seconds for one process


def peak_memory(run: Run, device: torch.device, warm: bool) -> float:
    """MiB that one call adds at its peak, what it returns included; ``warm`` calls once before, so that libraries and
    buffers that stay are not counted. Not a number where the system does not tell (Linux tells)."""
    if warm:
        run()
        gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what the first call freed goes back, or it would hide the second's
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
        except OSError:
            return float("nan")
        before = _status("VmRSS")
        result = run()
        peak = (_status("VmHWM") - before) / 1024
    del result
    return peak


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1])
    return float("nan")


@cache
def _server():
    """Processes fork from one that has imported everything and computed nothing: fresh, and there at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.workloads", *MODULES])
    return context


def _child(pipe, workload: str, label: str, device: str, threads: int, warm: bool) -> None:
    from .workloads import WORKLOADS

    torch.set_num_threads(threads)
    try:
        case = next(w for w in WORKLOADS if w.name == workload).build(torch.device(device))
        run, _ = case.contestants[label]()
        pipe.send(peak_memory(run, torch.device(device), warm))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def peak_in_fresh_process(workload: str, label: str, device: str, threads: int, warm: bool) -> float | str:
    """MiB, or what went wrong."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _server().Process(target=_child, args=(theirs, workload, label, device, threads, warm), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(PATIENCE) else f"no answer after {PATIENCE:.0f} s"
    except EOFError:
        process.join(5)
        found = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    return found


def back_pages(MiB: float) -> None:
    """Touches that much memory and gives it back.

    A virtual machine may hand free memory to its host after seconds; the next one to touch it then pays for the host's
    page faults too, ten times the guest's own. Before a timing that comes after a pause this pays in advance.
    """
    size = int(min(max(MiB, 1), 4096)) << 20
    try:
        memory = mmap.mmap(-1, size)
    except OSError:
        return
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
    pages.fill_(1)
    del pages
    gc.collect(0)
    with contextlib.suppress(BufferError):
        memory.close()
