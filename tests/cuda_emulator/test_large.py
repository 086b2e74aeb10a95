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
        dtype,
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
    case = Case("frobenius_inner", torch.float32, [2, 24, 40, FAR, 40, 1, 0, 40, 1], buffers, sparse=[space, 0, 0])
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
        torch.float32,
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
    }
    for operator, (numbers, extra, want) in wants.items():
        buffers = [*inputs, *extra, torch.full((want.numel(),), float("nan"))]
        sparse = [*spaces, *[0] * (len(extra) + 1)]
        (result,) = emulator("plain").run([Case(operator, torch.float32, numbers, buffers, sparse=sparse)])
        torch.testing.assert_close(result[-1], want, rtol=1e-4, atol=1e-4)
