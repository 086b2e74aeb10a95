"""Values: every operator against plain torch operations, over shapes, dtypes, strides and threads."""

import pytest
import torch

import torch_curvature as tc
from tests.ops.cases import OPERATORS, Operator

EXAMPLES = [pytest.param(op, shapes, id=f"{op.name}-{shapes}") for op in OPERATORS for shapes in op.shapes]
BY_NAME = [pytest.param(op, id=op.name) for op in OPERATORS]


def assert_close(
    got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, terms: int, size: torch.Tensor | None = None
) -> None:
    """Within the rounding of inputs exactly as given, accumulated over ``terms`` products in float32 or better.

    ``size``: what the sums are where terms of different signs do not cancel.
    """
    assert got.shape == want.shape
    assert got.dtype == dtype
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    sums = want if size is None else size
    scale = sums.abs().max().item() if want.numel() else 0.0
    bound = torch.finfo(dtype).eps * want.abs() + 4 * accumulation * max(terms, 1) ** 0.5 * max(scale, 1.0)
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "shapes"), EXAMPLES)
def test_equals_plain_operations(op: Operator, shapes: tuple, dtype: torch.dtype) -> None:
    inputs = op.inputs(shapes, dtype)
    got, want = op.call(*inputs), op.plain(*(t.double() for t in inputs))
    assert_close(got, want, dtype, max((t.numel() for t in inputs), default=1))
    if op.symmetric:
        assert torch.equal(got, got.mT)


def strided_twins(t: torch.Tensor):
    """The same values behind other strides: transposed storage, every second element, expanded, negated batch order."""
    yield t.mT.contiguous().mT if t.dim() > 1 else t
    yield torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    yield torch.cat([torch.full_like(t, float("nan")), t], 0)[t.shape[0] :] if t.dim() else t
    yield t.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize(("op", "shapes"), EXAMPLES)
def test_any_strides(op: Operator, shapes: tuple) -> None:
    inputs = op.inputs(shapes, torch.float32)
    want = op.plain(*(t.double() for t in inputs))
    for k in range(len(inputs)):
        for twin in strided_twins(inputs[k]):
            got = op.call(*inputs[:k], twin, *inputs[k + 1 :])
            assert_close(got, want, torch.float32, max(t.numel() for t in inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", BY_NAME)
def test_transposed_inputs_of_every_dtype(op: Operator, dtype: torch.dtype) -> None:
    for shapes in op.shapes:
        inputs = op.inputs(shapes, dtype)
        want = op.plain(*(t.double() for t in inputs))
        for k in range(len(inputs)):
            twin = inputs[k].mT.contiguous().mT if inputs[k].dim() > 1 else inputs[k]
            got = op.call(*inputs[:k], twin, *inputs[k + 1 :])
            assert_close(got, want, dtype, max((t.numel() for t in inputs), default=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 5, 37, 3, 33), (3, 4, 130, 9, 5), (2, 3, 64, 33, 40), (1, 20, 17, 1, 1)], ids=str
)
@pytest.mark.parametrize("op", [p for p in BY_NAME if "jacobian" in p.id or "gauss_newton" in p.id])
def test_operands_of_a_convolution(op: Operator, sizes: tuple, dtype: torch.dtype) -> None:
    """One or both of g and a contiguous along positions, not from the start of their memory."""
    V, N, S, O, I = sizes
    rest = {2: (), 3: ((V, N),), 4: ((2, 3, S, O), (3, S, I))}[len(op.shapes[0])]
    inputs = op.inputs(((V, N, S, O), (N, S, I), *rest), dtype)
    want = op.plain(*(t.double() for t in inputs))
    uncancelled = [*inputs[:2], *(t.abs() for t in inputs[2:])] if len(inputs) == 3 else inputs  # with a sign
    size = op.plain(*(t.double() for t in uncancelled))
    along = [torch.cat([t[:1], t]).mT.contiguous().mT[1:] for t in inputs]
    for given in ([along[0], *inputs[1:]], [inputs[0], along[1], *inputs[2:]], along):
        assert_close(op.call(*given), want, dtype, max(t.numel() for t in inputs), size)


@pytest.mark.parametrize("op", BY_NAME)
def test_expanded_batch(op: Operator) -> None:
    inputs = op.inputs(op.shapes[0], torch.float64)
    for k in range(len(inputs)):
        wide = [t.unsqueeze(0).expand(3, *t.shape) if i == k else t for i, t in enumerate(inputs)]
        torch.testing.assert_close(op.call(*wide), op.plain(*(t.contiguous() for t in wide)))


@pytest.mark.parametrize("op", BY_NAME)
def test_same_bits_every_time_and_for_any_number_of_threads(op: Operator) -> None:
    for shapes in op.shapes:
        inputs = op.inputs(shapes, torch.float32)
        threads = torch.get_num_threads()
        first = op.call(*inputs)
        try:
            torch.set_num_threads(1)
            single = op.call(*inputs)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(first, op.call(*inputs))
        torch.testing.assert_close(first, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", BY_NAME)
def test_infinities_and_nans_pass_through(op: Operator) -> None:
    for value in (float("nan"), float("inf")):
        inputs = op.inputs(op.shapes[1], torch.float64)
        inputs[-1].flatten()[0] = value
        got, want = op.call(*inputs), op.plain(*inputs)
        if (
            "jacobian" in op.name or "gauss_newton" in op.name
        ):  # another order of sums: infinity where the other has NaN
            got, want = (torch.where(t.isfinite(), t, float("nan")) for t in (got, want))
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("op", [p for p in BY_NAME if p.values[0].raw in ("outer", "kronecker_sum")])
def test_out(op: Operator) -> None:
    keywords = {"symmetric": True} if op.symmetric else {}
    function = getattr(__import__("torch_curvature").ops, op.raw)
    for shapes in op.shapes:
        inputs = op.inputs(shapes, torch.float32)
        want = op.call(*inputs)
        out = torch.full_like(want, float("nan"))
        assert function(*inputs, **keywords, out=out) is out
        assert torch.equal(out, want)
    inputs = op.inputs(op.shapes[0], torch.float32)
    want = op.call(*inputs)
    with pytest.raises(RuntimeError, match="'out' has shape"):
        function(*inputs, **keywords, out=torch.empty(3))
    with pytest.raises(RuntimeError, match="contiguous"):
        function(*inputs, **keywords, out=want.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match=r"torch.float64 and 'the inputs'"):
        function(*inputs, **keywords, out=want.double())
    with pytest.raises(RuntimeError, match="'out' cannot be combined with differentiation"):
        function(*(t.requires_grad_() for t in inputs), **keywords, out=torch.empty(3))


@pytest.mark.parametrize(("m", "n"), [(128, 128), (3, 3), (129, 127), (7, 5003), (65, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_out_beyond_the_caches(dtype: torch.dtype, m: int, n: int) -> None:
    """64 MiB and more are written past the caches, and the result need not begin on a line of them."""
    B = -(-(64 << 20) // (m * n * dtype.itemsize))
    u, v = torch.randn(B, m).to(dtype), torch.randn(B, n).to(dtype)
    want = u.unsqueeze(-1) * v.unsqueeze(-2)
    for offset in (0, 1):
        memory = torch.full((want.numel() + 2,), float("nan"), dtype=dtype)
        out = memory[offset : offset + want.numel()].view(want.shape)
        tc.ops.outer(u, v, out=out)
        assert torch.equal(out, want)
        assert memory.isnan().sum() == 2  # nothing beside the result is touched


@pytest.mark.parametrize(
    "shapes", [((2, 3, 1, 4), (3, 1, 5)), ((2, 35, 9, 12), (35, 9, 17)), ((3, 600, 1, 9), (600, 1, 5))]
)
def test_results_written_into_and_added_to(shapes: tuple) -> None:
    g, a = (torch.randn(s) for s in shapes)
    V, N, _, O = g.shape
    P = O * a.shape[2]
    out = torch.full((P, P), float("nan"))
    assert tc.ops.gauss_newton_block(g, a, out=out) is out
    assert torch.equal(out, tc.ops.gauss_newton_block(g, a))
    once, total = tc.ops.jacobian_gram(g, a), torch.zeros(V, N, V, N)
    for _ in range(2):
        assert tc.ops.jacobian_gram(g, a, add_to=total) is total
    torch.testing.assert_close(total, 2 * once)
    for call in (tc.ops.gauss_newton_block, lambda *x, out: tc.ops.jacobian_gram(*x, add_to=out)):
        with pytest.raises(RuntimeError, match="'out' has shape"):
            call(g, a, out=torch.empty(3))
        with pytest.raises(RuntimeError, match="cannot be combined with differentiation"):
            call(g.clone().requires_grad_(), a, out=torch.empty(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 8, 15, 33, 128, 1024, 1025])
def test_outer_rounds_to_the_bit(n: int, dtype: torch.dtype) -> None:
    """Products in float32, rounded to the nearest even: of huge, tiny and subnormal numbers, infinities and NaN."""
    for attempt in range(8):
        u, v = torch.randn(3, 7), torch.randn(3, n)
        u *= 10.0 ** torch.randint(-30, 30, u.shape)
        v *= 10.0 ** torch.randint(-20, 20, v.shape)
        for x, share in ((u, 0.1), (v, 0.02)):
            for value in [float("nan"), float("inf"), -float("inf"), 0.0][: attempt % 5]:
                x[torch.rand(x.shape) < share] = value
        u, v = u.to(dtype), v.to(dtype)
        got = tc.ops.outer(u, torch.stack([v, v], -1)[..., 0] if attempt % 2 else v)
        want = (u.float().unsqueeze(-1) * v.float().unsqueeze(-2)).to(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        bits = [torch.where(t.isnan(), 0, t).view(torch.int16) for t in (got, want)]
        assert torch.equal(*bits)
