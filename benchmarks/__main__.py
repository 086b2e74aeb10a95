"""``python -m benchmarks [--only NAME] [--device cpu|cuda] [--threads K] [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
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
    parser.add_argument("--seconds", type=float, default=1.0, help="timed for each contestant (at most 25 calls)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: .benchmarks/results.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: .benchmarks/results.png")
    parser.add_argument("--growth", type=Path, metavar="FILE", help="draw how cost grows with N, O, I, S and V instead")
    parser.add_argument(
        "--rooflines", action="store_true", help="bounds of every kernel by data sheet, and times on a GPU"
    )
    parser.add_argument("--list", action="store_true", help="names of the workloads")
    parser.add_argument(
        "--page", action="store_true", help="rewrite the figures in benchmarks/README.md, results.md and results.png"
    )
    options = parser.parse_args()
    if options.page and (options.only or options.quick or options.no_peers or options.no_memory or options.growth):
        parser.error("--page holds every workload, contestant and peak: it takes none of --only, --quick, --no-...")
    return options


def chosen(options: argparse.Namespace) -> list:
    from .workloads import WORKLOADS

    for text in options.only:
        if not any(text in w.name for w in WORKLOADS):
            sys.exit(f"--only {text}: no workload has this in its name; --list shows them all")
    found = [w for w in WORKLOADS if not options.only or any(text in w.name for text in options.only)]
    return [w for w in found if not options.quick or w.quick or options.only]


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
    if options.growth:
        from .contest import progress
        from .growth import draw_growth
        from .measure import Clock, ceilings

        draw_growth(device, options.growth, ceilings(device, Clock(device)), progress)
        return
    report(run(device, options), options)


def speeds(limits: dict[str, float]) -> dict[str, float]:
    return {
        "matmul_gflops": limits["matmul"] / 1e9, "copy_GBs": limits["copy"] / 1e9, "fill_GBs": limits["fill"] / 1e9,
    }  # fmt: skip


def run(device, options: argparse.Namespace) -> dict:
    """Everything that was asked for; the figures are in the file after every workload."""
    import torch

    from .contest import measure, progress, set_floors
    from .measure import Clock, ceilings, gpu_name
    from .report import machine_line, table

    workloads, began, load = chosen(options), time.time(), os.getloadavg()
    limits = ceilings(device, Clock(device))
    machine = {
        "processor": gpu_name(device) or environment.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "versions": environment.versions(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]), "load_at_start": load, **speeds(limits),
    }  # fmt: skip
    results: dict = {"machine": machine, "workloads": []}
    target = options.json or environment.HOME / "results.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    print(machine_line(machine) + "\n", flush=True)
    for workload in workloads:
        try:
            results["workloads"].append(measure(workload, device, limits, options))
        except Exception as error:
            progress(f"  the workload itself fails: {type(error).__name__}: {error}")
            results["workloads"].append({"name": workload.name, "title": workload.title, "error": str(error)})
        for name, speed in ceilings(device, Clock(device), 0.3).items():  # a shared machine has better minutes
            limits[name] = max(limits[name], speed)
        for entry in results["workloads"]:
            if "flops" in entry:
                set_floors(entry, limits)
        print(table(results["workloads"][-1]), flush=True)
        machine.update(load_at_end=os.getloadavg(), minutes=(time.time() - began) / 60, **speeds(limits))
        target.write_text(json.dumps(results, indent=1))
    print(f"figures: {target}")
    return results


def report(results: dict, options: argparse.Namespace) -> None:
    from .report import document, draw

    if options.markdown:
        options.markdown.write_text(document(results))
    picture = options.picture or environment.HOME / "results.png"
    draw(results, picture)
    print(f"picture: {picture}")
    if options.page:
        from .page import write

        print("pages: " + ", ".join(map(str, write(results, environment.ROOT / "benchmarks"))))


if __name__ == "__main__":
    main()
