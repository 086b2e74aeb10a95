"""What the emulator makes of tensor-core instructions and 16-bit formats, against descriptions that it has no part in.

The fragments of the three mma instructions are checked against the figures of the PTX ISA manual, written out below,
and against Triton's compiler, which describes the same instructions, where it is installed. Conversions are checked
against torch's, or against arithmetic in float64.
"""

import pytest
import torch

from .checks import FORMATS
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
# "Matrix fragments for mma.m16n8k8", .tf32: the same, a register an element; a0 above a1 in the left half, a2 above a3
# in the right; b0 above b1.
LANES_A_TF32 = """
 0  1  2  3  0  1  2  3
 4  5  6  7  4  5  6  7
 8  9 10 11  8  9 10 11
12 13 14 15 12 13 14 15
16 17 18 19 16 17 18 19
20 21 22 23 20 21 22 23
24 25 26 27 24 25 26 27
28 29 30 31 28 29 30 31
 0  1  2  3  0  1  2  3
 4  5  6  7  4  5  6  7
 8  9 10 11  8  9 10 11
12 13 14 15 12 13 14 15
16 17 18 19 16 17 18 19
20 21 22 23 20 21 22 23
24 25 26 27 24 25 26 27
28 29 30 31 28 29 30 31
"""
LANES_B_TF32 = """
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
"""
# "Matrix fragments for mma.m8n8k4 with .f64": one element of a and of b a lane, two neighbours of c.
LANES_A_F64 = """
 0  1  2  3
 4  5  6  7
 8  9 10 11
12 13 14 15
16 17 18 19
20 21 22 23
24 25 26 27
28 29 30 31
"""
LANES_B_F64 = """
 0  4  8 12 16 20 24 28
 1  5  9 13 17 21 25 29
 2  6 10 14 18 22 26 30
 3  7 11 15 19 23 27 31
"""
LANES_C = """
 0  0  1  1  2  2  3  3
 4  4  5  5  6  6  7  7
 8  8  9  9 10 10 11 11
12 12 13 13 14 14 15 15
16 16 17 17 18 18 19 19
20 20 21 21 22 22 23 23
24 24 25 25 26 26 27 27
28 28 29 29 30 30 31 31
"""
# Format -> rows of a, depth, elements of a 32-bit register (or of the 64-bit ones of float64).
SHAPES = {"bfloat16": (16, 16, 2), "float16": (16, 16, 2), "tf32": (16, 8, 1), "float64": (8, 4, 1)}
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float64": torch.float64}
Layout = dict[tuple[int, int], tuple[int, int]]  # (row, column) -> (lane, element of the lane's fragment)


def lanes(text: str) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in text.split("\n") if line]


def manual_layouts(form: str) -> dict[str, Layout]:
    """Elements of a are numbered by quadrants (upper left, lower left, upper right, lower right), those of b upper half
    first, those of c, pairs of neighbours, likewise; a pair of 16-bit elements shares a register."""
    rows, depth, packed = SHAPES[form]
    figures = {"tf32": (LANES_A_TF32, LANES_B_TF32), "float64": (LANES_A_F64, LANES_B_F64)}
    a, b = (lanes(text) for text in figures.get(form, (LANES_A, LANES_B)))
    c = lanes(LANES_C) * (rows // 8)
    second = [k % packed for k in range(depth)]  # of a pair
    upper_right = 2 if rows == 16 else 1
    return {
        "a": {
            (i, k): (a[i][k], ((i >= 8) + upper_right * (k >= max(8 // (3 - packed), 4))) * packed + second[k])
            for i in range(rows)
            for k in range(depth)
        },
        "b": {
            (k, j): (b[k][j], (k >= max(8 // (3 - packed), 4)) * packed + second[k])
            for k in range(depth)
            for j in range(8)
        },
        "c": {
            (i, j): (c[i][j], [0, 2][i >= 8] + (1 if j in (1, 3, 5, 7) else 0)) for i in range(rows) for j in range(8)
        },
    }


def triton_layouts(form: str) -> dict[str, Layout]:
    gluon = pytest.importorskip("triton.experimental.gluon.language._layouts", reason="Triton is not installed")
    from triton._C.libtriton import gluon_ir, ir

    rows, depth, packed = SHAPES[form]
    context = ir.context()
    ir.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    c = gluon.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[rows, 8])
    a, b = (gluon.DotOperandLayout(operand, c, packed) for operand in (0, 1))
    kinds = {"a": (a, [rows, depth]), "b": (b, [depth, 8]), "c": (c, [rows, 8])}
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


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("source", [manual_layouts, triton_layouts])
def test_mma(emulator, source, form):
    """Two blocks of rows by two of columns, from the fragments that a description says, to those that it says."""
    (rows, depth, _), dtype, layouts = SHAPES[form], TYPES[form], source(form)
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, rows, depth, generator=g).to(dtype), torch.randn(2, depth, 8, generator=g).to(dtype)
    if form == "tf32":
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    c = torch.randn(2, 2, rows, 8, generator=g).to(torch.float64 if form == "float64" else torch.float32)
    left, right = ([fragments(block, layouts[name]) for block in x] for x, name in ((a, "a"), (b, "b")))
    held = torch.cat(right, 1) if form != "float64" else torch.stack(right)  # two columns' blocks share an array
    start = torch.stack([fragments(c[i, j], layouts["c"]) for i in range(2) for j in range(2)])
    buffers = [torch.stack(left).flatten(), held.flatten(), start.flatten()]
    ((_, _, d),) = emulator("plain").run([Case("mma", form, [], buffers)])
    product = c.double() + (a.double()[:, None] @ b.double()[None, :])
    want = torch.stack([fragments(product[i, j].to(c.dtype), layouts["c"]) for i in range(2) for j in range(2)])
    tolerance = 1e-14 if form == "float64" else 1e-5
    torch.testing.assert_close(d, want.flatten(), rtol=tolerance, atol=tolerance)


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """To 11 significant bits, to nearest, halves away from zero, by arithmetic in float64; below 2^-126 in steps of
    2^-136, past the range infinite."""
    mantissa, exponent = torch.frexp(x.double().abs())
    step = torch.ldexp(torch.ones_like(mantissa), (exponent - 11).clamp(min=-136))
    rounded = torch.where(x.isfinite(), torch.floor(x.double().abs() / step + 0.5) * step, x.double().abs())
    return torch.copysign(rounded.float(), x)


def test_rounding_to_tf32(emulator):
    """Values, both sides of every rounding boundary of one binade, subnormals, and random patterns."""
    steps = torch.arange(2**12).float() / 2**12 + 1  # 1 .. 2 in half steps: values and boundaries
    infinity = torch.tensor(float("inf"))
    near = torch.cat([steps, torch.nextafter(steps, infinity), torch.nextafter(steps, -infinity)])
    random = torch.randint(-(2**31), 2**31 - 1, (50000,), generator=torch.Generator().manual_seed(6)).int()
    floats = torch.cat([near, -near, near * 2.0**-140, near * 2.0**127, random.view(torch.float32), infinity[None]])
    case = Case("round_to_tf32", "tf32", [], [floats, torch.zeros(len(floats))])
    ((_, got),) = emulator("plain").run([case])
    torch.testing.assert_close(got, rounded_to_tf32(floats), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulator, transposed):
    """PTX ISA, "ldmatrix": row i of a matrix goes to lanes 4 i .. 4 i + 3, two elements each."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    case = Case("ldmatrix", "bfloat16", [int(transposed)], [matrices.flatten(), torch.zeros(256, dtype=torch.int16)])
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
        "conversions",
        FORMATS[dtype],
        [],
        [every, torch.zeros(len(every)), floats, torch.zeros(len(floats), dtype=dtype)],
    )
    ((_, wide, _, narrow),) = emulator("plain").run([case])
    torch.testing.assert_close(wide, values, rtol=0, atol=0, equal_nan=True)
    want = floats.to(dtype)
    torch.testing.assert_close(narrow, want, rtol=0, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(narrow.view(torch.int16)[numbers], want.view(torch.int16)[numbers])  # the signs of zeros, too
