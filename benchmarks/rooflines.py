"""Bounds on the time of each CUDA kernel: bytes and flops that its shapes imply, over the data sheets of three GPUs.

They are **bounds, not measurements**: what a kernel that reaches the data sheet's bandwidth or arithmetic, whichever
limits it, would take; launch latency is left out. ``python -m benchmarks --rooflines`` prints them (`kernels`).

A multiply-add counts as two flops. `Work.flops` are those of the algorithm the kernel runs (packed pairs, half of a
symmetric result), without the padding of tiles. bfloat16 and half go through tensor cores; where the operands are
formed on the way, each is split in two parts and the tensor cores do three products (`Work.executed`). "tf32" is
float32 where ``torch.backends.cuda.matmul.allow_tf32`` lets a product round its operands; the kernels do so then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIZE = {"float32": 4, "tf32": 4, "float64": 8, "float64 on tensor cores": 8, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """Peak rates by the vendor's documents, without sparsity: bytes a second, and flops a second by dtype.

    Attributes:
        multiprocessors: how many.
        clocks: of the ordinary units and of the tensor cores, in Hz: the rates follow from them.
        source: the document.
    """

    name: str
    bandwidth: float
    rates: dict[str, float]
    multiprocessors: int
    clocks: tuple[float, float]
    source: str
    words: tuple[str, ...]  # of the name that CUDA gives it

    def flops(self, dtype: str) -> float:
        return self.rates["bfloat16" if dtype == "float16" else dtype]


def _rates(float32: float, tf32: float, float64: float, float64_tensor: float, bfloat16: float) -> dict[str, float]:
    """In Tflop/s; bfloat16 and half on tensor cores with sums in float32."""
    given = (float32, tf32, float64, float64_tensor, bfloat16)
    return {
        name: 1e12 * rate
        for name, rate in zip(("float32", "tf32", "float64", "float64 on tensor cores", "bfloat16"), given)
    }


DEVICES = (
    Device(
        "A100 SXM 80 GB", 2.039e12, _rates(19.5, 156, 9.7, 19.5, 312), 108, (1.41e9, 1.41e9),
        "NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM",
        ("A100", "SXM4", "80GB"),
    ),
    Device(
        "H100 SXM", 3.35e12, _rates(66.9, 494.7, 33.5, 66.9, 989.4), 132, (1.98e9, 1.83e9),
        "NVIDIA H100 Tensor Core GPU Architecture white paper, H100 SXM5; bandwidth: data sheet",
        ("H100", "80GB", "HBM3"),
    ),
    Device(
        "RTX 5090", 1.792e12, _rates(104.8, 104.8, 1.64, 1.64, 209.5), 170, (2.407e9, 2.407e9),
        "NVIDIA RTX Blackwell GPU Architecture white paper, GeForce RTX 5090; it has no float64 tensor cores",
        ("RTX", "5090"),
    ),
)  # fmt: skip


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


def curvature_block(
    N: int, O: int, I: int, O2: int | None = None, I2: int | None = None, D: int = 0, dtype: str = "float32"
) -> Work:
    """m [N, O, O2], a [N, I], a2 [N, I2], d [N, D, O2] -> both triangles of [O I, O2 I2]; one layer without O2, I2.

    Two layers: X[n, (o, i), p] = m a + g d is formed on the way (at most four flops an entry) and multiplied with a2.
    """
    if O2 is None or I2 is None:
        read = N * (O * O + I)
        return formed(2 * N * pairs(O) * pairs(I), SIZE[dtype] * (read + (O * I) ** 2), dtype)
    read = N * (O * O2 + I + I2 + (O + D * O2 if D else 0))
    product, forming = 2.0 * N * O * I * O2 * I2, 1.0 * N * O * O2 * (I + 2 * D)
    moved = float(SIZE[dtype] * (read + 2 * O * I * O2 * I2))
    return Work(product + forming, moved, dtype, split(dtype) * product + forming)


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
        curvature_block,
        gauss_newton_block,
        gauss_newton_diagonal,
        jacobian_norms,
        jacobian_gram,
    )
}


def sources() -> str:
    """Where the rates are from, as a Markdown list."""
    lines = []
    for d in DEVICES:
        rates = ", ".join(f"{rate / 1e12:.4g} {name}" for name, rate in d.rates.items())
        lines.append(f"- {d.name}: {d.bandwidth / 1e9:.0f} GB/s; Tflop/s: {rates}. {d.source}.")
    return "\n".join(lines)
