"""The compiler's own report of the kernels: nothing spills, as many blocks are resident as the headers claim, and the
inner loops multiply as often and read as little as their tiles say. One architecture is compiled anew where nvcc and
nvdisasm are; the table in benchmarks/ holds three."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from benchmarks import cuda_static


@dataclass(frozen=True)
class Loop:
    """What the inner loop of a tile does for a thread, by counting."""

    multiply: str  # the instruction, and how many of them
    times: int
    load: str  # from shared memory, and how many of them at most
    loads: int


def plain(edge: int, depth: int) -> Loop:
    """Side x side multiply-adds a depth; operands of a side by 128-bit loads."""
    side = edge // 16
    return Loop("FFMA", side * side * depth, "LDS", 2 * side // 4 * depth)


def float64() -> Loop:
    """64 x 64 x 16 by 8 warps of 32 x 16, in products of 8 x 8 x 4: 4 fragments of rows, 2 of columns."""
    return Loop("DMMA", 4 * 2 * 4, "LDS", (4 + 2) * 4)


def tensor(edge: int, steps: int, products: int = 1) -> Loop:
    """Of a warp's edge / 2 x edge / 4 results: blocks of 16 rows, as many of 8 columns, in `steps` of the depth; four
    fragments of rows, or two pairs of fragments of columns, a load. A split product takes three, between which one
    operand is loaded anew: columns, then both."""
    blocks = edge // 32
    loads = {1: blocks + blocks // 2, 3: 2 * blocks + 3 * (blocks // 2)}[products]
    return Loop("HMMA", products * blocks * blocks * steps, "LDSM", loads * steps)


@dataclass(frozen=True)
class Expected:
    kernels: str
    dtypes: str
    blocks: int  # resident on a multiprocessor, at least
    loop: Loop | None = None  # none: a kernel that is limited by memory
    wide: int = 0  # 128-bit global loads in the code, copies to shared memory included, at least
    share: float = 0.0  # of global loads and stores that move 128 bits, at least


HALF = "bfloat16|float16"
FORMS = r"(form_jacobian|norms_tile|squares)_kernel"  # operands contiguous along the rows of a tile
DIRECT = r"gram_(long_)?kernel"  # along the depth
EXPECTED = [
    Expected(r"tile_product_kernel<PlainTile<128>", "float32", 2, plain(128, 2)),
    Expected(r"tile_product_kernel<PlainTile<64>", "float32", 3, plain(64, 16)),
    Expected(r"tile_product_kernel<PlainTile<64>", "float64", 2, float64()),
    Expected(r"tile_product_kernel<TensorTile<Tf32Format, 128>", "tf32", 2, tensor(128, 1)),
    Expected(r"tile_product_kernel<TensorTile<SplitFormat, 128>", HALF, 2, tensor(128, 1, products=3)),
    # A load of 16 bytes an operand for 4 float32 or 2 float64: 4 values a thread, 8 in a large tile on tensor cores.
    Expected(r"tile_product_kernel<PlainTile.*GramProduct", "float32", 2, wide=2),
    Expected(r"tile_product_kernel<PlainTile.*GramProduct", "float64", 2, wide=4),
    Expected(r"tile_product_kernel<TensorTile.*GramProduct", f"tf32|{HALF}", 2, wide=4),
    Expected(r"gram_kernel", "float32", 2, plain(64, 16), wide=2),
    Expected(r"gram_long_kernel", "float32", 3, plain(64, 16), wide=2),
    Expected(r"gram_kernel", "float64", 1, float64(), wide=4),
    Expected(r"gram_long_kernel", "float64", 2, float64(), wide=4),
    Expected(r"gram_kernel", HALF, 2, tensor(64, 2), wide=2),
    Expected(r"gram_long_kernel", HALF, 3, tensor(64, 2), wide=2),
    Expected(r"gram_kernel", "tf32", 2, tensor(64, 1), wide=2),
    Expected(r"gram_long_kernel", "tf32", 3, tensor(64, 1), wide=2),
    Expected(FORMS, "float32", 3, plain(64, 16), wide=2),
    Expected(FORMS, "float64", 2, float64(), wide=4),
    Expected(FORMS, "tf32", 3, tensor(64, 1)),
    Expected(r"(form_jacobian|norms_tile)_kernel", HALF, 2, tensor(128, 2), wide=4),
    Expected(r"squares_kernel", HALF, 1, tensor(128, 2), wide=4),
    # All loads of aligned operands, at least four of each, but not the two stores of a sum; of an outer product a store
    # and the load of v, but not that of u.
    Expected(r"frobenius_kernel<\d+, [248]>", ".*", 2, share=0.8),
    Expected(r"frobenius_kernel<\d+, [01]>", ".*", 2),
    Expected(r"outer_kernel<\d, true>", ".*", 3, share=2 / 3),
    Expected(r"outer_kernel<\d, false>", ".*", 3),
    Expected(r"norms_kernel|\w+_finish_kernel|narrow_kernel", ".*", 4),
]


def complaints(kernel: cuda_static.Kernel) -> list[str]:
    found = [f"{kernel.spills} bytes of spills"] * (kernel.spills > 0)
    rules = [e for e in EXPECTED if re.match(e.kernels, kernel.name) and re.fullmatch(e.dtypes, kernel.dtype)]
    found += ["nothing is said of it"] * (not rules)
    for expected in rules:
        found += [f"{kernel.blocks} blocks resident, not {expected.blocks}"] * (kernel.blocks < expected.blocks)
        if loop := expected.loop:
            times, loads = kernel.loop[loop.multiply], kernel.loop[loop.load]
            found += [f"{times} {loop.multiply} in the inner loop, not {loop.times}"] * (times < loop.times)
            found += [f"{loads} {loop.load} in the inner loop, not {loop.loads}"] * (loads > loop.loads)
        wide = kernel.counts["LDG.128"] + kernel.counts["LDGSTS"]
        found += [f"{wide} wide loads, not {expected.wide}"] * (wide < expected.wide)
        moves = kernel.counts["LDG"] + kernel.counts["STG"]
        moved = kernel.counts["LDG.128"] + kernel.counts["STG.128"]
        found += [f"{moved} of {moves} accesses are wide"] * (moved < expected.share * moves)
    return [f"sm_{kernel.architecture} {kernel.name} {kernel.dtype}: {what}" for what in found]


@pytest.mark.full
@pytest.mark.parametrize("architecture", [90])
def test_what_the_compiler_made(architecture):
    if reason := cuda_static.unavailable():
        pytest.skip(f"no static report: {reason}")
    kernels = cuda_static.measure(architecture)
    assert [c for kernel in kernels for c in complaints(kernel)] == []


def test_the_table_has_every_kernel_and_no_spill():
    kernels = set(cuda_static.block_sizes())
    assert len(kernels) > 10
    for section in cuda_static.REPORT.read_text().split("\n## sm_")[1:]:
        rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
        assert {re.split(r"[<`]", row[0].strip().strip("`"))[0] for row in rows} == kernels
        assert {row[1].strip() for row in rows} == set(cuda_static.TYPES.values())
        assert all(row[3].strip() == "0" for row in rows), f"sm_{section[:3]}: spills"
