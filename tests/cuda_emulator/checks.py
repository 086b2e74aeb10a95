"""A case of an operator together with what it must give: the formula in float64 and a bound on the rounding error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .emulation import Case, EmulationError, Emulator

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Check:
    case: Case
    output: int  # which buffer
    want: torch.Tensor  # float64
    bound: torch.Tensor  # of the absolute error, element by element
    scale: torch.Tensor  # what an error of the factors is relative to, element by element
    exact: torch.Tensor | None = None  # a permutation of the flat output that must not change a bit of it (a symmetry)

    def verify(self, buffers: list[torch.Tensor]) -> None:
        got = buffers[self.output]
        wide = got.to(torch.float64).reshape(self.want.shape)
        error = (wide - self.want).abs()
        # NaN is bad; past the range of the format, infinity is right.
        bad = ~((error <= self.bound) | (got.reshape(self.want.shape) == self.want.to(got.dtype)))
        if bad.any():
            at = tuple(int(i) for i in bad.nonzero()[0])
            raise AssertionError(
                f"{self}: {int(bad.sum())} of {bad.numel()} elements wrong, first at {at}: "
                f"got {wide[at].item()}, want {self.want[at].item()} +- {self.bound[at].item()}"
            )
        if self.exact is not None:
            flat = got.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()])
            assert torch.equal(flat, flat[self.exact]), f"{self}: not symmetric to the bit"

    def __str__(self) -> str:
        return f"{self.case.operator} {self.case.format} {self.case.integers}"


def verify_all(emulator: Emulator, checks: list[Check], **options: object) -> None:
    for check, buffers in zip(checks, emulator.run([check.case for check in checks], **options)):
        check.verify(buffers)


def fails(emulator: Emulator, checks: list[Check], **options: object) -> str:
    """How the emulator, a sanitizer or a value rejects the kernels; empty where nothing does."""
    try:
        verify_all(emulator, checks, **options)
    except (EmulationError, AssertionError) as e:
        return str(e)
    return ""


def bounded(
    case: Case,
    output: int,
    want: torch.Tensor,
    rms: torch.Tensor,
    terms: int,
    split: bool = False,
    exact: torch.Tensor | None = None,
) -> Check:
    """The check of a case whose results are sums of `terms` products. `rms`: root of the sum of the products' squares,
    which partial sums of terms of random sign grow to; they are rounded in float32 (float64), in an order that we do
    not know. `split`: each factor of a bfloat16 or half product is rounded to 16 bits. At the end the result is rounded
    to its format, where half may underflow."""
    dtype = case.buffers[output].dtype
    split = split and dtype in (torch.bfloat16, torch.float16)
    unit = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    scale = rms + want.abs()
    tiny = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}.get(dtype, 0.0)
    bound = scale * (unit * (4 * terms**0.5 + 8) + (2.0**-15 if split else 0)) + want.abs() * UNIT[dtype] + tiny
    return Check(case, output, want, bound, scale, exact)


def in_tf32(check: Check) -> Check:
    """The same case in TF32: each factor of a product is rounded to 11 bits."""
    return replace(check, case=replace(check.case, format="tf32"), bound=check.bound + check.scale * 2.0**-9)


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a strided tensor from its first to its last, as they lie in memory."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((span,), (1,)).clone()


def poisoned(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((count,), float("nan"), dtype=dtype)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
