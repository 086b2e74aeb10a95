"""What the emulator makes of tensor-core instructions and 16-bit formats, against descriptions that it has no part in.

The fragments of mma.m16n8k16 are checked against the figures of the PTX ISA manual, written out below, and against
Triton's compiler, which describes the same instruction, where it is installed. Conversions are checked against torch's.
"""

import pytest
import torch

from .emulation import Case

# PTX ISA, "Matrix fragments for mma.m16n8k16": which lane holds each element; elements 2k, 2k+1 of a row (of a column,
# for b) share a register.
LANES_A = """
 0  0  1  1  2  2  3  3  0  0  1  1  2  2  3  3
 4  4  5  5  6  6  7  7  4  4  5  5  6  6  7  7
 8  8  9  9 10 10 11 11  8  8  9  9 10 10 11 11
12 12 13 13 14 14 15 15 12 12 13 13 14 14 15 15
16 16 17 17 18 18 19 19 16 16 17 17 18 18 19 19
20 20 21 21 22 22 23 23 20 20 21 21 22 22 23 23
24 24 25 25 26 26 27 27 24 24 25 25 26 26 27 27
28 28 29 29 30 30 31 31 28 28 29 29 30 30 31 31
 0  0  1  1  2  2  3  3  0  0  1  1  2  2  3  3
 4  4  5  5  6  6  7  7  4  4  5  5  6  6  7  7
 8  8  9  9 10 10 11 11  8  8  9  9 10 10 11 11
12 12 13 13 14 14 15 15 12 12 13 13 14 14 15 15
16 16 17 17 18 18 19 19 16 16 17 17 18 18 19 19
20 20 21 21 22 22 23 23 20 20 21 21 22 22 23 23
24 24 25 25 26 26 27 27 24 24 25 25 26 26 27 27
28 28 29 29 30 30 31 31 28 28 29 29 30 30 31 31
"""
LANES_B = """
 0  4  8 12 16 20 24 28
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
 3  7 11 15 19 23 27 31
 0  4  8 12 16 20 24 28
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
 3  7 11 15 19 23 27 31
"""
Layout = dict[tuple[int, int], tuple[int, int]]  # (row, column) -> (lane, element of the lane's fragment)


def lanes(text: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in text.split("\n") if line]


def manual_layouts() -> dict[str, Layout]:
    """Elements of a: a0..a7 in the quadrants (upper left, lower left, upper right, lower right) of two; b: b0, b1 above
    b2, b3; the accumulators c0, c1 above c2, c3, where the manual's figure for c has the lanes of a's left half."""
    a, b = lanes(LANES_A), lanes(LANES_B)
    return {
        "a": {
            (i, k): (a[i][k], [[0, 4], [2, 6]][i >= 8][k >= 8] + (1 if k in (1, 3, 5, 7, 9, 11, 13, 15) else 0))
            for i in range(16)
            for k in range(16)
        },
        "b": {
            (k, j): (b[k][j], [0, 2][k >= 8] + (1 if k in (1, 3, 5, 7, 9, 11, 13, 15) else 0))
            for k in range(16)
            for j in range(8)
        },
        "c": {(i, j): (a[i][j], [0, 2][i >= 8] + (1 if j in (1, 3, 5, 7) else 0)) for i in range(16) for j in range(8)},
    }


def triton_layouts() -> dict[str, Layout]:
    gluon = pytest.importorskip("triton.experimental.gluon.language._layouts", reason="Triton is not installed")
    from triton._C.libtriton import gluon_ir, ir

    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    c = gluon.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    kinds = {"a": (gluon.DotOperandLayout(0, c, 2), [16, 16]), "b": (gluon.DotOperandLayout(1, c, 2), [16, 8])}
    kinds["c"] = (c, [16, 8])
    result: dict[str, Layout] = {}
    for name, (layout, shape) in kinds.items():
        linear = builder.to_linear_layout(layout._to_ir(builder), shape)
        result[name] = {}
        for lane in range(32):
            for element in range(2 ** len(linear.reg_bases)):
                at = [0, 0]
                for number, bases in ((lane, linear.lane_bases), (element, linear.reg_bases)):
                    for bit, base in enumerate(bases):
                        if number >> bit & 1:
                            at = [at[0] ^ base[0], at[1] ^ base[1]]
                result[name][at[0], at[1]] = (lane, element)
    return result


def fragments(matrix: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[lanes, elements] as the registers of a warp hold them."""
    out = matrix.new_zeros(32, matrix.numel() // 32)
    for (i, j), (lane, element) in layout.items():
        out[lane, element] = matrix[i, j]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [manual_layouts, triton_layouts])
def test_mma(emulator, source, dtype):
    layouts, g = source(), torch.Generator().manual_seed(3)
    a, b = torch.randn(16, 16, generator=g).to(dtype), torch.randn(16, 8, generator=g).to(dtype)
    c = torch.randn(16, 8, generator=g)
    parts = [fragments(x, layouts[name]) for x, name in ((a, "a"), (b, "b"), (c, "c"))]
    ((_, _, d),) = emulator("plain").run([Case("mma", dtype, [], [part.flatten() for part in parts])])
    want = fragments((c.double() + a.double() @ b.double()).float(), layouts["c"]).flatten()
    torch.testing.assert_close(d, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulator, transposed):
    """PTX ISA, "ldmatrix": row i of a matrix goes to lanes 4 i .. 4 i + 3, two elements each."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    case = Case(
        "ldmatrix", torch.bfloat16, [int(transposed)], [matrices.flatten(), torch.zeros(256, dtype=torch.int16)]
    )
    ((_, got),) = emulator("plain").run([case])
    want = torch.zeros(32, 4, 2, dtype=torch.int16)
    for m in range(4):
        rows = matrices[m].T if transposed else matrices[m]
        for lane, pair in enumerate(rows.reshape(32, 2)):
            want[lane, m] = pair
    assert torch.equal(got, want.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(emulator, dtype):
    """Every 16-bit pattern to float32; to 16 bits: both sides of every rounding boundary, and random patterns."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = every.view(dtype).float()
    finite = values[values.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).div(2).float()
    random = (
        torch.randint(-(2**31), 2**31 - 1, (50000,), generator=torch.Generator().manual_seed(5))
        .int()
        .view(torch.float32)
    )
    infinity = torch.tensor(float("inf"))
    ups, downs = torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)
    floats = torch.cat([values, middle, ups, downs, random])
    case = Case(
        "conversions", dtype, [], [every, torch.zeros(len(every)), floats, torch.zeros(len(floats), dtype=dtype)]
    )
    ((_, wide, _, narrow),) = emulator("plain").run([case])
    torch.testing.assert_close(wide, values, rtol=0, atol=0, equal_nan=True)
    want = floats.to(dtype)
    torch.testing.assert_close(narrow, want, rtol=0, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(narrow.view(torch.int16)[numbers], want.view(torch.int16)[numbers])  # the signs of zeros, too
