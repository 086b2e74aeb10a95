"""One workload: every contestant checked against the reference, its memory measured, then all timed in turn."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor

from . import environment
from .kernels import bounds
from .measure import LONG, Clock, Run, gpu_name, interleaved
from .memory import peak_in_fresh_process
from .operations import operations
from .workloads import Case, Workload

OURS, PLAIN = "torch_curvature", "plain torch"


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def failure(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = (str(error).strip().splitlines() or [""])[0]
    return f"fails: {type(error).__name__}: {message[:160]} ({Path(last.filename).name}:{last.lineno})"


def tried(run: Run) -> tuple[str, float]:
    """A first call of what has no result to check: what went wrong (nothing, if all is well), and its seconds."""
    start = time.perf_counter()
    try:
        run()
    except Exception as error:
        return failure(error), 0.0
    return "", time.perf_counter() - start


def settled(run: Run, seconds: float) -> float:
    """Seconds of a second call where the first took a few: it may hold what is done once (checks, compilation)."""
    return tried(run)[1] if LONG < seconds <= 4 * LONG else seconds


def check(case: Case, label: str, reference: Tensor):
    """(run, error relative to the reference, seconds of the first call) or the message of what went wrong."""
    try:
        run, canonical = case.contestants[label]()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        found = canonical(result).detach().double().reshape(-1)
    except Exception as error:
        return None, failure(error), 0.0
    expected = reference.reshape(-1)
    if found.shape != expected.shape:
        return None, f"wrong shape: {found.numel()} entries for {expected.numel()}", seconds
    error = ((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    if not error < case.tolerance:
        return None, f"wrong: relative error {error:.1e}", seconds
    return run, f"{error:.0e}", seconds


def reference_of(workload: Workload, case: Case, device: torch.device) -> Tensor:
    """Computed once and kept: it takes longer than all contestants."""
    cache = environment.HOME / "references" / f"{workload.name}-{torch.__version__}.pt"
    if cache.exists():
        return torch.load(cache).to(device)
    progress("  float64 reference")
    reference = case.reference().detach()
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(reference.cpu(), cache)
    return reference


def set_floors(entry: dict, limits: dict[str, float]) -> None:
    """Counted flops and bytes over the speeds that the machine has reached so far in this run."""
    compute, memory = entry["flops"] / limits["matmul"] * 1e3, entry["bytes"] / limits["copy"] * 1e3
    products = (entry["flops"] - entry["flops_of_passes"]) / limits["matmul"] * 1e3
    entry.update(floor_ms=max(compute, memory), compute_ms=compute, memory_ms=memory, products_ms=products)


def measure(workload: Workload, device: torch.device, limits: dict[str, float], options: argparse.Namespace) -> dict:
    progress(f"{workload.name}: {workload.title}")
    case = workload.build(device)
    reference = reference_of(workload, case, device)
    entry: dict = {
        "name": workload.name, "title": workload.title, "target": workload.target,
        "flops": case.flops, "flops_of_passes": case.flops_of_passes, "bytes": case.bytes,
        "bounds": bounds(case.flops, case.bytes, gpu_name(device)), "contestants": {},
    }  # fmt: skip
    set_floors(entry, limits)
    found, runs, first, pages = entry["contestants"], {}, {}, {}
    unknown = max(64.0, 3 * case.bytes / 2**20)  # MiB that a call is taken to touch where that is not measured
    for label in case.contestants:
        if options.no_peers and PLAIN in case.contestants and not label.startswith((OURS, PLAIN)):
            continue
        progress(f"  {label}")
        run, message, seconds = check(case, label, reference)
        found[label] = {"check": message}
        if run is not None:
            runs[label], first[label], pages[label] = run, settled(run, seconds), unknown
        elif seconds:
            found[label]["first_ms"] = seconds * 1e3
        gc.collect()
    if OURS in runs:
        entry["operations"] = operations(runs[OURS])
    if not (options.quick or options.no_memory):
        progress("  peak memory of each in a fresh process")
        for label in runs:
            threads, warm = torch.get_num_threads(), first[label] <= LONG
            peak = peak_in_fresh_process(workload.name, label, str(device), threads, warm)
            if isinstance(peak, str):
                found[label]["peak_fails"] = peak
                progress(f"  {label}: {peak}")
            elif peak == peak:
                found[label]["peak_MiB"] = pages[label] = peak
    ways = entry["passes"] = {}
    for way, run in case.passes.items():
        message, seconds = tried(run)
        ways[way] = {"check": message}
        if not message:
            label = f"torch's passes, {way}"
            runs[label], first[label], pages[label] = run, settled(run, seconds), unknown
    seconds, rounds = (min(options.seconds, 0.3), 7) if options.quick else (options.seconds, 25)
    for label, timing in interleaved(runs, Clock(device), seconds, rounds, first, pages).items():
        timed = found[label] if label in found else ways[label.removeprefix("torch's passes, ")]
        timed.update(
            median_ms=timing.median, min_ms=timing.least, spread=timing.spread, rounds=len(timing.milliseconds)
        )
    return entry
