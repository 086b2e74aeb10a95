"""How cost grows with N, O, I, S and V: measured against counted, operator by operator, as a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import torch_curvature as tc

from .measure import Clock, interleaved

FACTORS = (0.25, 0.5, 1, 2, 4)


@dataclass
class Growing:
    """An operator at a base size, and its multiply-adds as a function of the sizes."""

    title: str
    base: dict[str, int]
    axes: str
    call: Callable[[Tensor, Tensor], Tensor]
    multiply_adds: Callable[..., float]


def _pairs(n: int) -> float:
    return n * (n + 1) / 2


def _norms(V: int, N: int, S: int, O: int, I: int) -> float:
    return N * min((V * O + I) * _pairs(S), V * S * O * I)


def _gram(V: int, N: int, S: int, O: int, I: int) -> float:
    rows = V * N
    return min(_pairs(N) * S * S * (I + V * V * O), rows * S * O * I + _pairs(rows) * O * I)


OPERATORS = [
    Growing(
        "gauss_newton_block, one position",
        {"V": 10, "N": 512, "S": 1, "O": 32, "I": 32},
        "VNOI",
        tc.ops.gauss_newton_block,
        lambda V, N, S, O, I: N * _pairs(O) * _pairs(I) + V * N * _pairs(O),
    ),
    Growing(
        "gauss_newton_block, 16 positions",
        {"V": 10, "N": 64, "S": 16, "O": 16, "I": 36},
        "VNSOI",
        tc.ops.gauss_newton_block,
        lambda V, N, S, O, I: N * min(S * S * _pairs(O) * _pairs(I), V * (S * O * I + _pairs(O * I))),
    ),
    Growing(
        "gauss_newton_diagonal",
        {"V": 4, "N": 32, "S": 64, "O": 64, "I": 128},
        "VNSOI",
        tc.ops.gauss_newton_diagonal,
        lambda V, N, S, O, I: V * N * (S + 1) * O * I,
    ),
    Growing("jacobian_norms", {"V": 1, "N": 64, "S": 64, "O": 128, "I": 128}, "VNSOI", tc.ops.jacobian_norms, _norms),
    Growing("jacobian_gram", {"V": 2, "N": 64, "S": 32, "O": 64, "I": 64}, "VNSOI", tc.ops.jacobian_gram, _gram),
]


def draw_growth(
    device: torch.device, path: Path, limits: dict[str, float], progress: Callable[[str], None]
) -> list[dict]:
    """Measures every operator along each of its axes and draws the times over the counted ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    clock, found = Clock(device), []
    figure, axes = plt.subplots(1, len(OPERATORS), figsize=(4 * len(OPERATORS), 3.8), squeeze=False)
    for axis, operator in zip(axes[0], OPERATORS):
        progress(operator.title)
        for letter in operator.axes:
            measured, counted, sizes = [], [], []
            for factor in FACTORS:
                size = {**operator.base, letter: max(1, int(operator.base[letter] * factor))}
                V, N, S, O, I = size.values()
                g, a = torch.randn(V, N, S, O, device=device), torch.randn(N, S, I, device=device)
                timing = interleaved({"": lambda g=g, a=a, op=operator: op.call(g, a)}, clock, 0.5, 15)[""]
                sizes.append(size[letter])
                measured.append(timing.least)
                counted.append(2e3 * operator.multiply_adds(**size) / limits["matmul"])
            found.append({"operator": operator.title, "axis": letter, "sizes": sizes, "ms": measured, "floor": counted})
            (line,) = axis.loglog(FACTORS, measured, "o-", label=f"{letter} (1: {operator.base[letter]})")
            axis.loglog(FACTORS, counted, ":", color=line.get_color())
        axis.set_title(operator.title, fontsize=9)
        axis.set_xticks(FACTORS, ["1/4", "1/2", "1", "2", "4"])
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("size, relative")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("ms; dotted: counted")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return found
