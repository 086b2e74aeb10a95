"""gauss_newton_block takes the form that costs less, and every form gives the same block."""

import pytest
import torch

import torch_curvature as tc

PAIRS = [(10, 12, 2, 64, 65), (10, 64, 3, 16, 36), (10, 20, 2, 17, 40), (4, 30, 2, 10, 33), (60, 7, 4, 16, 19)]
ROWS = [
    (1, 20, 2, 17, 40),
    (2, 20, 2, 9, 12),
    (4, 30, 3, 10, 33),
    (10, 16, 4, 16, 36),
    (10, 20, 2, 40, 1),
    (3, 9, 40, 5, 8),
]
FORMS = [
    pytest.param(sizes, form, id=f"{sizes}") for form, group in (("pairs", PAIRS), ("rows", ROWS)) for sizes in group
]


def form_taken(V: int, N: int, S: int, O: int, I: int) -> str:
    """Positions that cancel in J: 2^100 - 2^100 is zero, while products of their pairs are beyond float32."""
    g, a = torch.full((V, N, S, O), 2.0**50), torch.zeros(N, S, I)
    a[:, 0], a[:, 1] = 2.0**50, -(2.0**50)
    return "rows" if torch.equal(tc.ops.gauss_newton_block(g, a), torch.zeros(O * I, O * I)) else "pairs"


@pytest.mark.parametrize(("sizes", "form"), FORMS)
def test_the_form_that_costs_less_is_taken(sizes: tuple[int, ...], form: str) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("a CUDA kernel forms J for more than one position")
    assert form_taken(*sizes) == form


@pytest.mark.parametrize("signed", [False, True], ids=["", "signed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sizes", "form"), FORMS)
def test_every_form_gives_the_block(sizes: tuple[int, ...], form: str, dtype: torch.dtype, signed: bool) -> None:
    V, N, S, O, I = sizes
    g, a = torch.randn(V, N, S, O).to(dtype), torch.randn(N, S, I).to(dtype)
    sign = torch.randn(V, N).sign().to(dtype) if signed else None
    J = (g.double().mT @ a.double().unsqueeze(0)).flatten(-2).flatten(0, 1)
    want = J.T @ (J if sign is None else J * sign.double().reshape(-1, 1))
    block = tc.ops.gauss_newton_block(g, a, sign)
    assert block.dtype == dtype
    assert torch.equal(block, block.mT)
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = ((J.square().sum(0)[:, None] * J.square().sum(0)).sqrt()).max()
    bound = torch.finfo(dtype).eps * want.abs() + 4 * accumulation * (V * N * S) ** 0.5 * size
    assert ((block.double() - want).abs() <= bound).all()
    out = torch.full_like(block, float("nan"))
    assert torch.equal(tc.ops.gauss_newton_block(g, a, sign, out=out), block)


@pytest.mark.parametrize("sizes", PAIRS, ids=str)
def test_pairs_of_positions_of_any_strides(sizes: tuple[int, ...]) -> None:
    V, N, S, O, I = sizes
    g, a, sign = torch.randn(V, N, S, O), torch.randn(N, S, I), torch.randn(V, N)
    want = tc.ops.gauss_newton_block(g, a, sign)
    strided = (g.mT.contiguous().mT, a.movedim(0, -1).contiguous().movedim(-1, 0), sign.T.contiguous().T)
    assert torch.equal(tc.ops.gauss_newton_block(*strided), want)


def test_derivatives_through_pairs_of_positions() -> None:
    V, N, S, O, I = 12, 2, 2, 4, 16
    assert torch.get_default_device().type != "cpu" or form_taken(V, N, S, O, I) == "pairs"
    inputs = [torch.randn(*sizes, dtype=torch.float64) for sizes in ((V, N, S, O), (N, S, I), (V, N))]
    probe = torch.randn(O * I, O * I, dtype=torch.float64)

    def plain(g: torch.Tensor, a: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        J = (g.mT @ a).flatten(-2)
        return torch.einsum("vnp,vn,vnq->pq", J, sign, J)

    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        got, want = (
            derivative(lambda *x, f=f: (f(*x) * probe).sum(), argnums=(0, 1, 2))(*inputs)
            for f in (tc.ops.gauss_newton_block, plain)
        )
        torch.testing.assert_close(got, want)
    mapped = torch.func.vmap(tc.ops.gauss_newton_block, in_dims=(None, 0, None))(
        inputs[0], torch.stack([inputs[1], 2 * inputs[1]]), inputs[2]
    )
    torch.testing.assert_close(mapped[1], 4 * plain(*inputs))
    compiled = torch.compile(tc.ops.gauss_newton_block, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, plain(*inputs))
