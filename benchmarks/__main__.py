"""``python -m benchmarks [--only NAME] [--device cpu|cuda] [--threads K] [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from . import environment


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="workloads whose name contains TEXT"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--quick", action="store_true", help="small workloads, few rounds, no memory measurements")
    parser.add_argument(
        "--no-peers", action="store_true", help="only this package and plain torch; nothing is installed"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory in fresh processes")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed for each contestant (at most 25 calls)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: .benchmarks/results.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: .benchmarks/results.png")
    parser.add_argument("--growth", type=Path, metavar="FILE", help="draw how cost grows with N, O, I, S and V instead")
    parser.add_argument(
        "--rooflines", action="store_true", help="bounds of every kernel by data sheet, and times on a GPU"
    )
    parser.add_argument("--list", action="store_true", help="names of the workloads")
    parser.add_argument("--peak", nargs=2, metavar=("WORKLOAD", "CONTESTANT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def chosen(options: argparse.Namespace) -> list:
    from .workloads import WORKLOADS

    found = [w for w in WORKLOADS if not options.only or any(text in w.name for text in options.only)]
    return [w for w in found if not options.quick or w.quick or options.only]


def check(case, label: str, reference):
    """(run, error relative to the reference, seconds of the first call) or the message of what went wrong."""
    import torch

    try:
        run, canonical = case.contestants[label]()
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        found = canonical(result).detach().double().reshape(-1)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).strip().splitlines() or [""])[0]
        return None, f"fails: {type(error).__name__}: {message[:160]} ({Path(last.filename).name}:{last.lineno})", 0.0
    expected = reference.reshape(-1)
    if found.shape != expected.shape:
        return None, f"wrong shape: {found.numel()} entries for {expected.numel()}", seconds
    error = ((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    if not error < case.tolerance:
        return None, f"wrong: relative error {error:.1e}", seconds
    return run, f"{error:.0e}", seconds


def measure(workload, device, limits: dict[str, float], options: argparse.Namespace) -> dict:
    import torch

    from .kernels import bounds
    from .measure import Clock, gpu_name, interleaved

    progress(f"{workload.name}: {workload.title}")
    case = workload.build(device)
    cache = environment.HOME / "references" / f"{workload.name}-{torch.__version__}.pt"
    if cache.exists():
        reference = torch.load(cache).to(device)
    else:
        progress("  float64 reference")
        reference = case.reference().detach()
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(reference.cpu(), cache)
    compute, memory = case.flops / limits["matmul"] * 1e3, case.bytes / limits["copy"] * 1e3
    entry: dict = {
        "name": workload.name, "title": workload.title, "target": workload.target,
        "floor_ms": max(compute, memory), "compute_ms": compute, "memory_ms": memory,
        "bounds": bounds(case.flops, case.bytes, gpu_name(device)), "contestants": {},
    }  # fmt: skip
    runs = {}
    plain_only = ("torch_curvature", "plain torch")
    for label in case.contestants:
        if options.no_peers and case.contestants.keys() & {"plain torch"} and not label.startswith(plain_only):
            continue
        progress(f"  {label}")
        run, message, seconds = check(case, label, reference)
        entry["contestants"][label] = {"check": message}
        if run is not None:
            runs[label] = run
        elif seconds:
            entry["contestants"][label]["first_ms"] = seconds * 1e3
        gc.collect()
    timings = interleaved(runs, Clock(device), 1.0 if options.quick else options.seconds, 7 if options.quick else 25)
    for label, timing in timings.items():
        entry["contestants"][label].update(
            median_ms=timing.median, min_ms=timing.least, spread=timing.spread, rounds=len(timing.milliseconds)
        )
    del runs, case
    gc.collect()
    if not (options.quick or options.no_memory):
        for label in timings:
            entry["contestants"][label]["peak_MiB"] = peak(workload.name, label, options)
    return entry


def peak(name: str, label: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "--device", options.device, "--peak", name, label]
    if options.threads:
        command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    try:
        return float(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return float("nan")


def print_rooflines(device) -> None:
    """Bounds of the kernels; on a GPU beside what they take there."""
    from .kernels import measured, table
    from .measure import gpu_name

    print(table(measured(device), gpu_name(device)) if device.type == "cuda" else table())


def require(device) -> None:
    """Stop where the device is not there, before anything is built on it."""
    import torch

    if device.type not in ("cpu", "cuda"):
        sys.exit(f"--device {device}: the benchmarks run on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {device}: torch sees no CUDA device here; leave --device away to measure on the CPU")


def main() -> None:
    options = arguments()
    if not (options.no_peers or options.rooflines):
        environment.rerun_with_peers()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    require(device)
    if options.rooflines:
        print_rooflines(device)
        return
    if options.list:
        for workload in chosen(options):
            print(f"{workload.name:24} {workload.title}")
        return
    from .measure import Clock, ceilings, gpu_name, peak_memory
    from .workloads import WORKLOADS

    if options.peak:
        name, label = options.peak
        case = next(w for w in WORKLOADS if w.name == name).build(device)
        run, _ = case.contestants[label]()
        print(peak_memory(run, device))
        return
    if options.growth:
        from .growth import draw_growth

        draw_growth(device, options.growth, ceilings(device, Clock(device)), progress)
        return
    from .report import document, draw, table

    limits = ceilings(device, Clock(device))
    machine = {
        "processor": gpu_name(device) or environment.processor(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "versions": environment.versions(),
        "matmul_gflops": limits["matmul"] / 1e9, "copy_GBs": limits["copy"] / 1e9, "fill_GBs": limits["fill"] / 1e9,
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }  # fmt: skip
    results: dict = {"machine": machine, "workloads": []}
    target = options.json or environment.HOME / "results.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    speeds = f"matrix product {machine['matmul_gflops']:.0f} GFLOP/s, copy {machine['copy_GBs']:.1f} GB/s"
    speeds += f", fill {machine['fill_GBs']:.1f} GB/s"
    print(f"{machine['processor']}, {machine['threads']} threads: {speeds}\n", flush=True)
    for workload in chosen(options):
        try:
            results["workloads"].append(measure(workload, device, limits, options))
        except Exception as error:
            progress(f"  the workload itself fails: {type(error).__name__}: {error}")
            results["workloads"].append({"name": workload.name, "title": workload.title, "error": str(error)})
        print(table(results["workloads"][-1]), flush=True)
        target.write_text(json.dumps(results, indent=1))
    if options.markdown:
        options.markdown.write_text(document(results))
    picture = options.picture or environment.HOME / "results.png"
    draw(results, picture)
    print(f"figures: {target}\npicture: {picture}")


if __name__ == "__main__":
    main()
