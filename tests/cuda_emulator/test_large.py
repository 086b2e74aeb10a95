"""Indices past 2^31. Buffers are address space of which only the end holds data, and only the last blocks run."""

import torch

from .emulation import Case

FAR = 2**31 + 8  # elements; a multiple of what vector loads need


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_outer_writes_past_two_to_the_31(emulator):
    m, n, dtype = 40000, 60000, torch.bfloat16
    u, v, window = draw(m, dtype=dtype), draw(n, dtype=dtype), 4 * n
    chunk = 256 * 4 * 8  # elements of a block
    assert m * n > 2**31
    case = Case(
        "outer",
        "bfloat16",
        [1, m, n, 0, 1, 0, 1],
        [u, v, torch.full((window,), float("nan"), dtype=dtype)],
        sparse=[0, 0, m * n * 2],
        first_block=(m * n - window) // chunk,
    )
    ((_, _, out),) = emulator("plain").run([case])
    assert torch.equal(out, (u[-4:, None].float() * v.float()).to(dtype).flatten())


def test_frobenius_inner_reads_past_two_to_the_31(emulator):
    x, y = draw(24, 40), draw(24, 40)
    buffers = [x.flatten(), y.flatten(), torch.full((2,), float("nan"))]
    space = (FAR + x.numel()) * 4  # the first matrix is all zeros
    case = Case("frobenius_inner", "float32", [2, 24, 40, FAR, 40, 1, 0, 40, 1], buffers, sparse=[space, 0, 0])
    ((_, _, out),) = emulator("plain").run([case])
    torch.testing.assert_close(out, torch.stack([torch.zeros(()), (x * y).sum()]), rtol=1e-5, atol=1e-5)


def test_kronecker_sum_reads_and_writes_past_two_to_the_31(emulator):
    """O = I = 256: 2^32 results. The last tile holds pairs (255, p) by (255, j) for the last p and j; of n = 0, 1, 2
    only the last, past 2^31 elements of a, is not zero."""
    N, size, last = 3, 256, 100
    a, b = draw(size), draw(N, size, size)
    b = b + b.mT
    step, side = FAR // 2, size * size
    window = side  # the results (255, 255, p, j)
    tiles = ((size * (size + 1) // 2 + 127) // 128) ** 2
    strides = [0, side, size, 1, 0, step, 1, 0, step, 1]
    space = (2 * step + size) * 4
    case = Case(
        "kronecker_sum",
        "float32",
        [1, N, size, size, size, size, 1, 1, *strides],
        [b.flatten(), a, a, torch.full((window,), float("nan"))],
        sparse=[0, space, space, side * side * 4],
        first_block=tiles - 1,
    )
    ((*_, out),) = emulator("plain").run([case])
    want = b[2, 255][:, None] * (a[255] * a)[None, :]
    torch.testing.assert_close(out.reshape(size, size)[-last:, -last:], want[-last:, -last:], rtol=1e-5, atol=1e-5)


def test_jacobian_kernels_read_past_two_to_the_31(emulator):
    """Sample n = 1 of both g and a lies past 2^31 elements; sample 0 is zero."""
    S, O, I = 3, 8, 16
    g, a = draw(S, O), draw(S, I)
    J = torch.einsum("so,si->oi", g, a)
    layer = [1, 2, S, O, I, 0, FAR, O, FAR, I]
    inputs, spaces = [g.flatten(), a.flatten()], [(FAR + g.numel()) * 4, (FAR + a.numel()) * 4]
    none = torch.zeros(1)
    wants = {
        "jacobian_norms": (layer, [], torch.stack([torch.zeros(()), J.square().sum()])),
        "gauss_newton_diagonal": ([*layer, 0], [none], J.square().flatten()),
        "gauss_newton_block": ([*layer, 0], [none], torch.outer(J.flatten(), J.flatten()).flatten()),
        "jacobian_gram": (
            [*layer, *layer, 1, 0],
            [none, none],
            torch.stack([*torch.zeros(3), J.square().sum()]),
        ),
    }
    for operator, (numbers, extra, want) in wants.items():
        buffers = [*inputs, *extra, torch.full((want.numel(),), float("nan"))]
        sparse = [*spaces, *[0] * (len(extra) + 1)]
        (result,) = emulator("plain").run([Case(operator, "float32", numbers, buffers, sparse=sparse)])
        torch.testing.assert_close(result[-1], want, rtol=1e-4, atol=1e-4)


def test_jacobian_gram_forms_jacobians_past_two_to_the_31(emulator):
    """As above, with so many positions that forming Jacobians is cheaper, of a pair of layers: one far by samples, one
    by columns."""
    S, O, I = 90, 3, 5
    g, a = draw(S, O), draw(S, I)
    J = torch.einsum("so,si->oi", g, a)
    left, right = [1, 2, S, O, I, 0, FAR, O, FAR, I], [2, 1, S, O, I, FAR, 0, O, 0, I]
    buffers = [g.flatten(), a.flatten(), g.flatten(), a.flatten(), torch.full((4,), float("nan"))]
    far = (FAR + g.numel()) * 4
    case = Case(
        "jacobian_gram", "float32", [*left, *right, 0, 0], buffers, sparse=[far, (FAR + a.numel()) * 4, far, 0, 0]
    )
    ((*_, out),) = emulator("plain").run([case])
    torch.testing.assert_close(out, torch.stack([*torch.zeros(3), J.square().sum()]), rtol=1e-4, atol=1e-4)


def test_jacobian_gram_writes_past_two_to_the_31(emulator):
    """50000 samples: the last tile holds rows and columns 49984 and on."""
    N, first, rows = 50000, 49984, 4
    g, a = draw(N, 2), draw(N, 3)
    layer = [1, N, 1, 2, 3, 0, 2, 2, 3, 3]
    none, tiles = torch.zeros(1), (N + 63) // 64
    case = Case(
        "jacobian_gram",
        "float32",
        [*layer, *layer, 1, 0],
        [g.flatten(), a.flatten(), none, none, torch.full((rows * N,), float("nan"))],
        sparse=[0, 0, 0, 0, N * N * 4],
        first_block=tiles * (tiles + 1) // 2 - 1,
    )
    ((*_, out),) = emulator("plain").run([case])
    want = (g[-rows:] @ g[first:].T) * (a[-rows:] @ a[first:].T)
    torch.testing.assert_close(out.reshape(rows, N)[:, first:], want, rtol=1e-5, atol=1e-5)


def test_curvature_block_writes_past_two_to_the_31(emulator):
    """The last parameters of 50000: those of two layers of 2 x 3 and 3 x 2 weights, and of one of them with itself."""
    P, N, rows = 50000, 4, 12
    m, a, a2 = draw(N, 2, 3), draw(N, 3), draw(N, 2)
    own = draw(N, 2, 2)
    own = own + own.mT
    places = [P - 12, 3, 1, -1, P - 6, 2, 1, -1]
    none, window = torch.zeros(1), torch.zeros(rows * P)
    cases = [
        Case(
            "curvature_block",
            "float32",
            [*sizes, P, *strides, 3, 1, 2, 1, 0, 0, 0, 0, 0, *places],
            [x.flatten(), a.flatten(), a2.flatten(), none, none, window],
            sparse=[0, 0, 0, 0, 0, P * P * 4],
        )
        for x, sizes, strides in [
            (m, [N, 2, 3, 3, 2, 0, 0, 0, 0], [6, 3, 1]),
            (own, [N, 2, 2, 3, 3, 0, 1, 0, 0], [4, 2, 1]),
        ]
    ]
    (*_, cross), (*_, block) = emulator("plain").run(cases)
    want = torch.einsum("nop,ni,nj->oipj", m, a, a2).reshape(6, 6)
    torch.testing.assert_close(cross.reshape(rows, P)[:6, -6:], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.reshape(rows, P)[6:, -12:-6], want.T, rtol=1e-5, atol=1e-5)
    want = torch.einsum("nop,ni,nj->oipj", own, a, a).reshape(6, 6)
    torch.testing.assert_close(block.reshape(rows, P)[:6, -12:-6], want, rtol=1e-5, atol=1e-5)
