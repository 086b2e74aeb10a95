"""jacobian_gram of few rows with many positions, where J is formed in chunks of outputs and inputs."""

import pytest
import torch

import torch_curvature as tc

SIZES = [(1, 6, 40, 50, 200), (2, 3, 60, 140, 130), (1, 60, 40, 70, 135), (3, 2, 33, 300, 7), (1, 1, 17, 129, 257)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_rows_of_many_columns(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    V, N, S, O, I = sizes
    g, a = torch.randn(V, N, S, O).to(dtype), torch.randn(N, S, I).to(dtype)
    J = (g.double().mT @ a.double()).flatten(-2)
    want = torch.einsum("vnp,wmp->vnwm", J, J)
    size = J.norm(dim=-1).max().square()
    accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    along = g.mT.contiguous().mT, a.mT.contiguous().mT  # contiguous along positions, as a convolution has them
    for operands in ((g, a), along):
        gram = tc.ops.jacobian_gram(*operands)
        bound = torch.finfo(dtype).eps * want.abs() + 4 * accumulation * (S * O * I) ** 0.5 * size
        assert ((gram.double() - want).abs() <= bound).all()
        assert torch.equal(gram, gram.permute(2, 3, 0, 1))
    held = torch.randn_like(gram)
    added, total = tc.ops.jacobian_gram(g, a, add_to=held.clone()), held.double() + want
    bound = torch.finfo(dtype).eps * (total.abs() + want.abs()) + 4 * accumulation * (S * O * I) ** 0.5 * size
    assert ((added.double() - total).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("O", "I"), [(9001, 1), (9001, 3), (2, 9001)])
def test_one_position_of_many_outputs_or_inputs(O: int, I: int, dtype: torch.dtype) -> None:
    """A few outputs are taken at a time, and added to what the ones before gave."""
    g, a, g2, a2 = torch.randn(2, 5, 1, O), torch.randn(5, 1, I), torch.randn(3, 40, 1, O), torch.randn(40, 1, I)
    J, J2 = ((y.mT.double() @ x.double()).flatten(2) for y, x in ((g, a), (g2, a2)))
    g, a, g2, a2 = (x.to(dtype) for x in (g, a, g2, a2))
    accumulation = 4 * torch.finfo(dtype).eps * (O * I) ** 0.5
    for others, right in (((), J), ((g2, a2), J2)):
        want = torch.einsum("vnp,wmp->vnwm", J, right)
        bound = accumulation * J.norm(dim=-1).max() * right.norm(dim=-1).max()
        found = tc.ops.jacobian_gram(g, a, *others)
        assert ((found.double() - want).abs() <= bound).all()
        held = torch.randn_like(found)
        added = tc.ops.jacobian_gram(g, a, *others, add_to=held.clone())
        assert ((added.double() - held.double() - want).abs() <= bound).all()
        assert others or torch.equal(found, found.permute(2, 3, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("V", "N"), [(1, 1), (5, 1), (1, 33), (3, 41), (2, 128), (1, 257)])
def test_few_rows_that_are_long(V: int, N: int, dtype: torch.dtype) -> None:
    """Whatever lies between the rows' entries, and with an input of one number; on one thread the same to the bit."""
    O = 4107 + 8 * V * N
    wide, a = torch.randn(V, N, 1, 2 * O).to(dtype), torch.randn(N, 1, 1).to(dtype)
    turned = torch.randn(O, N, 1, V).to(dtype).permute(3, 1, 2, 0)
    for g in (wide[..., :O], wide[..., ::2], turned):
        J = (g.double() * a.double())[:, :, 0]
        want = torch.einsum("vnp,wmp->vnwm", J, J)
        accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        bound = torch.finfo(dtype).eps * want.abs() + 4 * accumulation * O**0.5 * J.norm(dim=-1).max().square()
        gram = tc.ops.jacobian_gram(g, a)
        assert ((gram.double() - want).abs() <= bound).all()
        assert torch.equal(gram, gram.permute(2, 3, 0, 1))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(tc.ops.jacobian_gram(g, a), gram)
        finally:
            torch.set_num_threads(threads)
    held = torch.randn_like(gram)
    added, total = tc.ops.jacobian_gram(g, a, add_to=held.clone()), held.double() + want
    assert ((added.double() - total).abs() <= bound + torch.finfo(dtype).eps * total.abs()).all()
