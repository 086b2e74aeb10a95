"""Every kernel at some shapes: its bounds on three GPUs and, on a GPU, the time it takes there.

``python -m benchmarks --rooflines`` prints the bounds; with ``--device cuda`` the measured times stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import torch_curvature as tc

from .measure import Clock
from .rooflines import DEVICES, OPERATORS, Device, Work, sources

EXAMPLES: list[tuple[str, dict[str, int]]] = [
    ("outer", {"B": 4096, "m": 128, "n": 128}),
    ("frobenius_inner", {"B": 4096, "m": 128, "n": 128}),
    ("kronecker_sum", {"N": 512, "O": 64, "I": 65}),
    ("curvature_block", {"N": 512, "O": 64, "I": 65}),
    ("curvature_block", {"N": 512, "O": 64, "I": 65, "O2": 32, "I2": 65, "D": 64}),
    ("gauss_newton_block", {"V": 10, "N": 512, "S": 1, "O": 64, "I": 65}),
    ("gauss_newton_block", {"V": 10, "N": 128, "S": 256, "O": 64, "I": 64}),
    ("gauss_newton_diagonal", {"V": 10, "N": 512, "S": 1, "O": 64, "I": 65}),
    ("gauss_newton_diagonal", {"V": 10, "N": 128, "S": 1024, "O": 32, "I": 28}),
    ("jacobian_norms", {"V": 1, "N": 512, "S": 1, "O": 512, "I": 785}),
    ("jacobian_norms", {"V": 1, "N": 32, "S": 128, "O": 512, "I": 129}),
    ("jacobian_gram", {"V": 10, "N": 128, "S": 1, "O": 64, "I": 65}),
    ("jacobian_gram", {"V": 1, "N": 128, "S": 256, "O": 64, "I": 289}),
]
DTYPES = ("float32", "tf32", "bfloat16")
Case = tuple[str, str, str]  # operator, shape as written in the table, dtype


def cases() -> list[tuple[Case, dict[str, int], Work]]:
    """The examples in every dtype; tf32 only where it can matter."""
    found = []
    for name, shape in EXAMPLES:
        written = " ".join(f"{k}={v}" for k, v in shape.items())
        for dtype in DTYPES:
            work = OPERATORS[name](**shape, dtype=dtype)
            full = OPERATORS[name](**shape, dtype="float32")
            if dtype != "tf32" or any(work.seconds(d) < full.seconds(d) for d in DEVICES):
                found.append(((name, written, dtype), shape, work))
    return found


def call(name: str, shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The operator on random inputs of that shape."""

    def draw(*axes: int) -> Tensor:
        return torch.randn(axes, device=device).to(dtype)

    if name in ("outer", "frobenius_inner"):
        B, m, n = (shape[k] for k in ("B", "m", "n"))
        u, v = (draw(B, m), draw(B, n)) if name == "outer" else (draw(B, m, n), draw(B, m, n))
        operator = getattr(tc.ops, name)
        return lambda: operator(u, v)
    if name == "kronecker_sum":
        N, O, I = (shape[k] for k in ("N", "O", "I"))
        half, a = draw(N, O, O), draw(N, I)
        b = half + half.mT
        return lambda: tc.ops.kronecker_sum(b, a, symmetric=True)
    if name == "curvature_block":
        return _curvature_block(draw, **shape)
    V, N, S, O, I = (shape[k] for k in ("V", "N", "S", "O", "I"))
    g, a = draw(V, N, S, O), draw(N, S, I)
    operator = getattr(tc.ops, name)
    return lambda: operator(g, a)


def _curvature_block(
    draw: Callable[..., Tensor], N: int, O: int, I: int, O2: int | None = None, I2: int | None = None, D: int = 0
) -> Callable[[], Tensor]:
    """Of one layer with itself, or the off-diagonal block of two layers' matrix."""
    a, rows = draw(N, I), tc.ops.Places(0, I, 1)
    if O2 is None or I2 is None:
        half = draw(N, O, O)
        m, out = half + half.mT, draw(O * I, O * I)
        return lambda: tc.ops.curvature_block(out, m, a, rows=rows)
    columns, m, a2, P = tc.ops.Places(O * I, I2, 1), draw(N, O, O2), draw(N, I2), O * I + O2 * I2
    g, d, out = (draw(N, O), draw(N, D, O2), draw(P, P)) if D else (None, None, draw(P, P))
    return lambda: tc.ops.curvature_block(out, m, a, a2, g=g, d=d, rows=rows, columns=columns)


def measured(device: torch.device) -> dict[Case, float]:
    """Seconds of every case on the device: the median of ten calls."""
    clock, allowed = Clock(device), torch.backends.cuda.matmul.allow_tf32
    seconds = {}
    try:
        for case, shape, _ in cases():
            torch.backends.cuda.matmul.allow_tf32 = case[2] == "tf32"
            run = call(case[0], shape, getattr(torch, case[2].replace("tf32", "float32")), device)
            run()
            seconds[case] = sorted(clock(run) for _ in range(10))[5] * 1e-3
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return seconds


def table(times: dict[Case, float] | None = None, gpu: str = "") -> str:
    """Bounds in microseconds, and what limits, as a Markdown table; with ``times`` what was measured on ``gpu``."""
    head = ["operator", "shape", "dtype", "Gflop", "MB", *(d.name for d in DEVICES)]
    title = "Bounds, not measured: microseconds at the data sheet's rates, and what limits."
    if times is not None:
        head.append(f"measured on {gpu}")
        title = f"Microseconds: bounds (data sheet, not measured) and, in the last column, measured on {gpu}."
    lines = [title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case, _, work in cases():
        cells = [*case, f"{work.flops / 1e9:.3g}", f"{work.bytes / 1e6:.3g}"]
        cells += [f"{work.seconds(d) * 1e6:.3g} ({work.limit(d)})" for d in DEVICES]
        if times is not None:
            cells.append(f"{times[case] * 1e6:.3g}{_share(work, times[case], gpu)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Rates:", "", sources()])


def same_gpu(device: Device, name: str) -> bool:
    """Whether a GPU of that name, as CUDA gives it, is the one of the data sheet."""
    return all(word in name.upper().replace("-", " ").split() for word in device.words)


def _share(work: Work, seconds: float, gpu: str) -> str:
    return "".join(f" ({work.seconds(d) / seconds:.0%} of its bound)" for d in DEVICES if same_gpu(d, gpu))


def bounds(flops: float, moved: float, gpu: str = "") -> str:
    """One line for a workload of so many flops and bytes in float32, for the harness to print beside its times."""
    work = Work(flops, moved, "float32")
    parts = [f"{d.name}{' (this GPU)' if same_gpu(d, gpu) else ''} {work.seconds(d) * 1e3:.3g} ms" for d in DEVICES]
    return f"bound, not measured (data sheets, float32): {', '.join(parts)}"
