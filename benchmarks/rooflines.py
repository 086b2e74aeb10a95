"""Bounds on the time of each CUDA kernel: bytes and flops that its shapes imply, over the data sheets of three GPUs.

``python -m benchmarks.rooflines`` prints a table of bounds. They are **bounds, not measurements**: what a kernel that
reaches the data sheet's bandwidth or arithmetic, whichever limits it, would take; launch latency is left out.

A multiply-add counts as two flops. `Work.flops` are those of the algorithm the kernel runs (packed pairs, half of a
symmetric result), without the padding of tiles. bfloat16 and half go through tensor cores; where the operands are
formed on the way, each is split in two parts and the tensor cores do three products (`Work.executed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIZE = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """Peak rates by the vendor's data sheet: bytes and flops a second; tensor: dense, 16-bit inputs, float32 sums."""

    name: str
    bandwidth: float
    float32: float
    float64: float
    tensor: float

    def flops(self, dtype: str) -> float:
        return {"float32": self.float32, "float64": self.float64}.get(dtype, self.tensor)


DEVICES = (
    Device("A100 SXM 80 GB", 2.039e12, 19.5e12, 9.7e12, 312e12),
    Device("H100 SXM", 3.35e12, 66.9e12, 33.5e12, 989.4e12),
    Device("RTX 5090", 1.792e12, 104.8e12, 1.64e12, 209.5e12),
)


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float
    dtype: str
    executed: float | None = None  # flops of the units, where a product takes several tensor-core products

    @property
    def arithmetic(self) -> float:
        return self.flops if self.executed is None else self.executed

    def seconds(self, device: Device) -> float:
        """A lower bound: no kernel that does this work is faster than both limits."""
        return max(self.bytes / device.bandwidth, self.arithmetic / device.flops(self.dtype))

    def limit(self, device: Device) -> str:
        moved = self.bytes / device.bandwidth
        return "memory" if moved >= self.arithmetic / device.flops(self.dtype) else "arithmetic"


def pairs(n: int) -> float:
    return n * (n + 1) / 2


def split(dtype: str) -> int:
    """Tensor-core products where operands are formed on the way: 3 of their two 16-bit parts."""
    return 3 if SIZE[dtype] == 2 else 1


def formed(flops: float, moved: float, dtype: str) -> Work:
    """A product whose operands are formed on the way."""
    return Work(flops, moved, dtype, split(dtype) * flops)


def outer(B: int, m: int, n: int, dtype: str = "float32") -> Work:
    """u [B, m], v [B, n] -> [B, m, n]: written once. Its products are not tensor-core work; they never limit it."""
    return Work(0.0, SIZE[dtype] * B * (m + n + m * n), dtype)


def frobenius_inner(B: int, m: int, n: int, dtype: str = "float32") -> Work:
    """a, b [B, m, n] -> [B]: both read once; sums in float32 (float64) on the ordinary units, which never limit it."""
    return Work(0.0, SIZE[dtype] * B * (2 * m * n + 1), dtype)


def kronecker_sum(
    N: int, O: int, I: int, O2: int | None = None, I2: int | None = None, symmetric: bool = True, dtype: str = "float32"
) -> Work:
    """b [N, O, O2], a [N, I], a2 [N, I2] -> [O I, O2 I2]. I2 given: with an a2 of its own."""
    left = pairs(O) if symmetric else O * (O2 or O)
    right = pairs(I) if I2 is None else I * I2
    read = N * (O * (O2 or O) + I + (I2 or 0))
    return formed(2 * N * left * right, SIZE[dtype] * (read + O * (O2 or O) * I * (I2 or I)), dtype)


def _operands(V: int, N: int, S: int, O: int, I: int) -> float:
    return float(V * N * S * O + N * S * I)


def gauss_newton_block(V: int, N: int, S: int, O: int, I: int, dtype: str = "float32") -> Work:
    """g [V, N, S, O], a [N, S, I] -> [O I, O I]. S > 1: J is formed in a workspace, written and read once at least."""
    result, accumulate = (O * I) ** 2, 8 if dtype == "float64" else 4
    moved = SIZE[dtype] * (_operands(V, N, S, O, I) + result)
    if S == 1:
        return formed(2 * N * pairs(O) * (V + pairs(I)), moved, dtype)
    jacobian, square = 2.0 * V * N * S * O * I, V * N * O * I * (O * I + 1.0)
    moved += 2 * accumulate * V * N * O * I
    return Work(jacobian + square, moved, dtype, jacobian + split(dtype) * square)


def gauss_newton_diagonal(V: int, N: int, S: int, O: int, I: int, dtype: str = "float32") -> Work:
    """-> [O, I]. S > 1: a product over s for every (v, n), squared in registers."""
    moved = SIZE[dtype] * (_operands(V, N, S, O, I) + O * I)
    if S == 1:
        return formed(2.0 * N * O * I, moved, dtype)
    return Work(2.0 * V * N * S * O * I, moved, dtype)


def jacobian_norms(V: int, N: int, S: int, O: int, I: int, dtype: str = "float32") -> Work:
    """-> [V, N]. S > 1: the cheaper of positions by positions (half, by symmetry) and of tiles of J."""
    moved = SIZE[dtype] * (_operands(V, N, S, O, I) + V * N)
    if S == 1:
        return Work(0.0, moved, dtype)
    return Work(2.0 * V * N * min(S * (S + 1) / 2 * (O + I), S * O * I), moved, dtype)


def jacobian_gram(V: int, N: int, S: int, O: int, I: int, dtype: str = "float32") -> Work:
    """g, a with themselves -> [V, N, V, N], half by symmetry. S > 1: the cheaper of positions and of Jacobians."""
    rows, accumulate = V * N, 8 if dtype == "float64" else 4
    moved = SIZE[dtype] * (_operands(V, N, S, O, I) + rows * rows)
    positions = Work(N * N * S * S * (V * V * O + I), moved, dtype)
    if S == 1:
        return positions
    jacobian, product = 2.0 * rows * S * O * I, 1.0 * rows * rows * O * I
    moved += 2 * accumulate * rows * O * I
    jacobians = Work(jacobian + product, moved, dtype, jacobian + split(dtype) * product)
    return min(positions, jacobians, key=lambda work: work.arithmetic)


OPERATORS: dict[str, Callable[..., Work]] = {
    f.__name__: f
    for f in (
        outer,
        frobenius_inner,
        kronecker_sum,
        gauss_newton_block,
        gauss_newton_diagonal,
        jacobian_norms,
        jacobian_gram,
    )
}
EXAMPLES: list[tuple[str, dict[str, int]]] = [
    ("outer", {"B": 4096, "m": 128, "n": 128}),
    ("frobenius_inner", {"B": 4096, "m": 128, "n": 128}),
    ("kronecker_sum", {"N": 512, "O": 64, "I": 65}),
    ("gauss_newton_block", {"V": 10, "N": 512, "S": 1, "O": 64, "I": 65}),
    ("gauss_newton_block", {"V": 10, "N": 128, "S": 256, "O": 64, "I": 64}),
    ("gauss_newton_diagonal", {"V": 10, "N": 512, "S": 1, "O": 64, "I": 65}),
    ("gauss_newton_diagonal", {"V": 10, "N": 128, "S": 1024, "O": 32, "I": 28}),
    ("jacobian_norms", {"V": 1, "N": 512, "S": 1, "O": 512, "I": 785}),
    ("jacobian_norms", {"V": 1, "N": 32, "S": 128, "O": 512, "I": 129}),
    ("jacobian_gram", {"V": 10, "N": 128, "S": 1, "O": 64, "I": 65}),
    ("jacobian_gram", {"V": 1, "N": 128, "S": 256, "O": 64, "I": 289}),
]


def table(dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> str:
    """The examples' bounds as a Markdown table."""
    head = ["operator", "shape", "dtype", "Gflop", "MB", *(d.name for d in DEVICES)]
    lines = ["Bounds, not measured: microseconds at the data sheet's rates, and what limits.", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, shape in EXAMPLES:
        for dtype in dtypes:
            work = OPERATORS[name](**shape, dtype=dtype)
            cells = [name, " ".join(f"{k}={v}" for k, v in shape.items()), dtype]
            cells += [f"{work.flops / 1e9:.3g}", f"{work.bytes / 1e6:.3g}"]
            cells += [f"{work.seconds(d) * 1e6:.3g} ({work.limit(d)})" for d in DEVICES]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
