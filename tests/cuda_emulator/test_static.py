"""The compiler's own report of the kernels: nothing spills, and registers, shared memory and inner loops stay as meant.
One architecture is compiled anew where nvcc and nvdisasm are; the table in benchmarks/ holds three."""

import re

import pytest

from benchmarks import cuda_static

# Kernel and dtype size -> most registers a thread, most bytes of shared memory, and in the inner loop the instruction
# that multiplies and the least share of it. None: a kernel that is limited by memory.
CEILINGS: list[tuple[str, tuple[int, ...], int, int, str | None, float]] = [
    (r"tile_product_kernel<SimtTile<128>", (4,), 184, 20000, "FFMA", 0.30),
    (r"tile_product_kernel<SimtTile<64>", (4,), 80, 19000, "FFMA", 0.25),
    (r"tile_product_kernel<SimtTile<64>", (8,), 160, 36000, "DFMA", 0.12),
    (r"tile_product_kernel<SplitTile", (2,), 184, 27000, "HMMA", 0.03),
    (r"gram_(long_)?kernel", (2,), 184, 21000, "HMMA", 0.04),
    (r"gram_(long_)?kernel", (4,), 184, 18000, "FFMA", 0.50),
    (r"gram_(long_)?kernel", (8,), 255, 35000, "DFMA", 0.15),
    (r"(squares|norms_tile|form_jacobian)_kernel", (2,), 232, 35000, "HMMA", 0.05),
    (r"(squares|norms_tile|form_jacobian)_kernel", (4,), 110, 18000, "FFMA", 0.40),
    (r"(squares|norms_tile|form_jacobian)_kernel", (8,), 144, 35000, "DFMA", 0.15),
    (r"frobenius_kernel|outer_kernel|norms_kernel", (2, 4, 8), 128, 128, None, 0),
    (r"\w+_finish_kernel|narrow_kernel", (2, 4, 8), 72, 0, None, 0),
]
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def complaints(kernel: cuda_static.Kernel) -> list[str]:
    for pattern, sizes, registers, shared, operation, least in CEILINGS:
        if re.match(pattern, kernel.name) and BYTES[kernel.dtype] in sizes:
            found = [f"{kernel.spills} bytes of spills"] * (kernel.spills > 0)
            found += [f"{kernel.registers} registers"] * (kernel.registers > registers)
            found += [f"{kernel.shared} bytes of shared memory"] * (kernel.shared > shared)
            if operation:
                share = kernel.loop[operation] / max(1, kernel.loop["all"])
                found += [f"{share:.1%} {operation} in the inner loop"] * (share < least)
            return [f"sm_{kernel.architecture} {kernel.name} {kernel.dtype}: {what}" for what in found]
    return [f"{kernel.name} {kernel.dtype} has no ceiling"]


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
