"""Bounds by data sheet: the rates, the counts, and what the harness prints beside its times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels, measure, report
from benchmarks.rooflines import DEVICES, OPERATORS, SIZE, Device, Work, pairs

ROOT = Path(__file__).parents[1]
# Multiply-adds per clock and multiprocessor, by the CUDA C++ Programming Guide's table of throughputs (ordinary units)
# and the architecture papers (tensor cores, dense, sums in float32).
PER_CLOCK = {
    "A100 SXM 80 GB": {
        "float32": 64, "float64": 32, "tf32": 512, "float64 on tensor cores": 64, "bfloat16": 1024,
    },
    "H100 SXM": {
        "float32": 128, "float64": 64, "tf32": 1024, "float64 on tensor cores": 128, "bfloat16": 2048,
    },
    "RTX 5090": {"float32": 128, "float64": 2, "tf32": 128, "float64 on tensor cores": 2, "bfloat16": 256},
}  # fmt: skip
ON_TENSOR_CORES = ("tf32", "bfloat16")


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_rates_follow_from_clocks(device: Device) -> None:
    assert set(device.rates) | {"float16"} == set(SIZE)
    for dtype, per_clock in PER_CLOCK[device.name].items():
        clock = device.clocks[1 if dtype in ON_TENSOR_CORES else 0]
        expected = 2 * per_clock * device.multiprocessors * clock
        assert device.flops(dtype) == pytest.approx(expected, rel=5e-3), dtype
    assert device.flops("float16") == device.flops("bfloat16")
    assert 1.5e12 < device.bandwidth < 4e12


def test_every_operator_of_the_library_has_bounds_and_an_example() -> None:
    schemas = (ROOT / "csrc" / "library.cpp").read_text()
    names = {n for n in re.findall(r'm\.def\("(\w+)\(', schemas) if not n.endswith(("_out", "_add"))}
    assert names <= set(OPERATORS)
    assert set(OPERATORS) == {name for name, _ in kernels.EXAMPLES}


SMALL = {
    "outer": [{"B": 3, "m": 4, "n": 5}],
    "frobenius_inner": [{"B": 3, "m": 4, "n": 5}],
    "kronecker_sum": [{"N": 6, "O": 3, "I": 4}],
    "curvature_block": [
        {"N": 6, "O": 3, "I": 4},
        {"N": 6, "O": 3, "I": 4, "O2": 2, "I2": 5},
        {"N": 6, "O": 3, "I": 4, "O2": 2, "I2": 5, "D": 3},
    ],
    **{
        name: [{"V": 2, "N": 5, "S": S, "O": 3, "I": 4} for S in (1, 7)]
        for name in ("gauss_newton_block", "gauss_newton_diagonal", "jacobian_norms", "jacobian_gram")
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_those_of_operands_and_result(name: str, dtype: torch.dtype) -> None:
    for shape in SMALL[name]:
        run = kernels.call(name, shape, dtype, torch.device("cpu"))
        cells = [c.cell_contents for c in run.__closure__]
        tensors = {id(t): t for t in (*cells, run()) if isinstance(t, torch.Tensor)}
        moved = sum(t.numel() * t.element_size() for t in tensors.values())
        if "O2" in shape:  # of a matrix of both layers, the two triangles of one block
            moved += dtype.itemsize * (2 * shape["O"] * shape["I"] * shape["O2"] * shape["I2"] - run().numel())
        counted = OPERATORS[name](**shape, dtype=str(dtype).removeprefix("torch.")).bytes
        if shape.get("S", 1) == 1:
            assert counted == moved
        else:
            assert counted >= moved  # Jacobians in a workspace are written and read once


def test_flops_of_products() -> None:
    assert OPERATORS["kronecker_sum"](N=5, O=3, I=4).flops == 2 * 5 * 6 * 10
    assert OPERATORS["kronecker_sum"](N=5, O=3, I=4, O2=2, I2=7, symmetric=False).flops == 2 * 5 * 6 * 28
    assert OPERATORS["curvature_block"](N=5, O=3, I=4).flops == 2 * 5 * 6 * 10
    two = OPERATORS["curvature_block"](N=5, O=3, I=4, O2=2, I2=7, D=4)
    assert two.flops == 2 * 5 * 3 * 4 * 2 * 7 + 5 * 3 * 2 * (4 + 2 * 4)
    assert OPERATORS["gauss_newton_block"](V=2, N=5, S=1, O=3, I=4).flops == 2 * 5 * pairs(3) * (2 + pairs(4))
    assert OPERATORS["gauss_newton_diagonal"](V=2, N=5, S=7, O=3, I=4).flops == 2 * 2 * 5 * 7 * 12
    assert OPERATORS["jacobian_gram"](V=1, N=5, S=1, O=3, I=4).flops == 25 * 7
    half = OPERATORS["kronecker_sum"](N=5, O=3, I=4, dtype="bfloat16")
    assert half.executed == 3 * half.flops  # two 16-bit parts of each operand, formed on the way


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_the_longer_of_both_limits_is_the_bound(device: Device) -> None:
    arithmetic, memory = Work(1e12, 1.0, "float32"), Work(1.0, 1e12, "float32")
    assert (arithmetic.limit(device), memory.limit(device)) == ("arithmetic", "memory")
    assert arithmetic.seconds(device) == 1e12 / device.flops("float32")
    assert memory.seconds(device) == 1e12 / device.bandwidth
    assert Work(1e12, 1.0, "tf32").seconds(device) <= arithmetic.seconds(device)


def test_bounds_are_labelled_so() -> None:
    text = kernels.table()
    assert text.startswith("Bounds, not measured")
    assert all(name in text for name in OPERATORS)
    assert all(d.source in text and d.name in text for d in DEVICES)
    line = kernels.bounds(1e12, 1e9)
    assert line.startswith("bound, not measured")
    assert "this GPU" not in line
    assert "H100 SXM (this GPU)" in kernels.bounds(1e12, 1e9, "NVIDIA H100 80GB HBM3")
    assert "this GPU" not in kernels.bounds(1e12, 1e9, "NVIDIA A100-PCIE-40GB")
    entry = {
        "title": "a workload", "target": "1", "floor_ms": 1.0, "compute_ms": 1.0, "memory_ms": 0.5, "bounds": line,
        "contestants": {"torch_curvature": {"median_ms": 2.0, "min_ms": 1.9, "spread": 0.1, "check": "1e-7"}},
    }  # fmt: skip
    assert line in report.table(entry)


def test_measured_times_stand_beside_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here: every kernel is called, and its time is printed with its share of the bound."""
    built = [(name, shape) for name, shapes in SMALL.items() for shape in shapes]
    monkeypatch.setattr(kernels, "EXAMPLES", built)
    times = kernels.measured(torch.device("cpu"))
    assert set(times) == {case for case, *_ in kernels.cases()}
    assert all(seconds > 0 for seconds in times.values())
    assert not torch.backends.cuda.matmul.allow_tf32
    text = kernels.table(times, "NVIDIA GeForce RTX 5090")
    assert "measured on NVIDIA GeForce RTX 5090" in text
    assert text.count("of its bound)") == len(times)


class Event:
    """A CUDA event as the clock uses it; the device's time is a counter."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, later: Event) -> float:
        assert 0 <= self.at <= later.at
        return later.at - self.at


def test_the_clock_of_a_gpu_times_between_events_behind_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.devices.stand_in import DEVICE, DeviceTensor, stand_in

    def run() -> None:
        done.append("run")
        Event.now += 3.0

    done: list[str] = []
    with stand_in():
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"wait for {device}"))
        clock = measure.Clock(DEVICE)
        assert isinstance(clock.flush, DeviceTensor)
        monkeypatch.setattr(DeviceTensor, "zero_", lambda self: done.append("flush"))
        assert clock(run) == 3.0
        assert done == ["flush", "run", "wait for cuda:0"]
        timing = measure.interleaved({"a": run, "b": run}, clock, 1.0, 7)
        assert timing["a"].median == timing["b"].median == 3.0


def test_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    shown = run("--rooflines")
    assert shown.returncode == 0
    assert shown.stdout.strip() == kernels.table()
    refused = run("--device", "mps", "--no-peers")
    assert refused.returncode == 1
    assert "cpu and cuda" in refused.stderr
    if not torch.cuda.is_available():
        refused = run("--device", "cuda", "--no-peers")
        assert refused.returncode == 1
        assert "torch sees no CUDA device here" in refused.stderr


def test_the_table_in_the_repository_is_the_one_that_is_printed() -> None:
    """Regenerate benchmarks/rooflines.md from ``python -m benchmarks --rooflines`` when this fails."""
    assert (ROOT / "benchmarks" / "rooflines.md").read_text().endswith(kernels.table() + "\n")
