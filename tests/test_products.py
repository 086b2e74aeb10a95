"""Products against `einsum`, over shapes and in every mode of differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_curvature as tc

DOUBLE = {"dtype": torch.float64}

TENSOR_PRODUCTS = {
    "matrices": ((3, 4), (4, 5), 1, 0, "ik,kj->ij"),
    "matrix and vector": ((3, 4), (4,), 1, 0, "ik,k->i"),
    "vectors": ((4,), (4,), 1, 0, "k,k->"),
    "three axes": ((2, 3, 4), (4, 5, 6), 1, 0, "hik,kjl->hijl"),
    "two contracted": ((3, 4, 2), (4, 2, 5), 2, 0, "ikl,klj->ij"),
    "all contracted": ((4, 2), (4, 2), 2, 0, "kl,kl->"),
    "none contracted": ((3,), (4, 2), 0, 0, "i,jk->ijk"),
    "batch": ((6, 3, 4), (6, 4, 5), 1, 1, "bik,bkj->bij"),
    "batch that broadcasts": ((6, 1, 3, 4), (1, 2, 4, 5), 1, 2, "bcik,bckj->bcij"),
    "batch, two contracted": ((2, 3, 4, 2), (2, 4, 2), 2, 1, "bikl,bkl->bi"),
    "nothing to sum": ((3, 0), (0, 5), 1, 0, "ik,kj->ij"),
    "empty batch": ((0, 3, 4), (0, 4, 5), 1, 1, "bik,bkj->bij"),
}


@pytest.mark.parametrize("name", TENSOR_PRODUCTS)
def test_tensor_product(name: str) -> None:
    shape_a, shape_b, axes, batch_axes, equation = TENSOR_PRODUCTS[name]
    a, b = torch.randn(shape_a, **DOUBLE), torch.randn(shape_b, **DOUBLE)
    batch = torch.broadcast_shapes(shape_a[:batch_axes], shape_b[:batch_axes])
    wide_a = a.expand(*batch, *shape_a[batch_axes:])
    truth = torch.einsum(equation, wide_a, b.expand(*batch, *shape_b[batch_axes:]))
    torch.testing.assert_close(tc.tensor_product(a, b, axes=axes, batch_axes=batch_axes), truth)
    strided = torch.stack([a, a], dim=-1)[..., 0]
    torch.testing.assert_close(tc.tensor_product(strided, b, axes=axes, batch_axes=batch_axes), truth)


def test_tensor_product_of_vectors_is_their_inner_product_and_of_matrices_associative() -> None:
    u, v = torch.randn(2, 5, **DOUBLE)
    torch.testing.assert_close(tc.tensor_product(u, v), tc.inner(u, v))
    torch.testing.assert_close(tc.tensor_product(u, v, axes=0), tc.outer(u, v))
    a, b = torch.randn(3, 4, **DOUBLE), torch.randn(3, 4, **DOUBLE)
    torch.testing.assert_close(tc.tensor_product(a, b, axes=2), tc.frobenius_inner(a, b))


@pytest.mark.parametrize(
    ("a", "b", "options"),
    [
        ((3, 4), (5, 6), {}),
        ((3, 4), (4,), {"axes": 2}),
        ((2, 3, 4), (3, 4, 5), {"batch_axes": 1}),
        ((3, 4), (4, 5), {"axes": -1}),
        ((), (4,), {}),
    ],
)
def test_tensor_product_refuses_shapes_that_do_not_compose(a: tuple[int], b: tuple[int], options: dict) -> None:
    with pytest.raises(ValueError, match=r"a .* and b .*") as error:
        tc.tensor_product(torch.ones(a), torch.ones(b), **options)
    assert str(a) in str(error.value)
    assert str(b) in str(error.value)


@pytest.mark.parametrize(
    "shapes", [((5,), (5,)), ((3, 5), (3, 5)), ((2, 1, 5), (4, 5)), ((3, 0), (3, 0)), ((0, 4), (4,))]
)
def test_inner(shapes: tuple[tuple[int, ...], ...]) -> None:
    u, v = (torch.randn(s, **DOUBLE) for s in shapes)
    torch.testing.assert_close(tc.inner(u, v), (u * v).sum(-1))
    with pytest.raises(ValueError, match="share their last axis"):
        tc.inner(u, torch.ones(7, **DOUBLE))


def test_products_are_differentiable_in_every_mode() -> None:
    def check(function, *inputs: Tensor) -> None:
        inputs = tuple(t.requires_grad_() for t in inputs)
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, inputs)

    check(lambda a, b: tc.tensor_product(a, b, axes=2, batch_axes=1), *torch.randn(2, 2, 2, 2, 2, **DOUBLE))
    check(tc.inner, torch.randn(2, 3, **DOUBLE), torch.randn(3, **DOUBLE))
    u = torch.randn(3, **DOUBLE)
    identity = 2 * torch.eye(3, **DOUBLE)
    torch.testing.assert_close(torch.func.hessian(lambda x: tc.inner(x, x))(u), identity)
    batched = torch.func.vmap(torch.func.hessian(lambda x: tc.tensor_product(x, x)))(torch.randn(4, 3, **DOUBLE))
    torch.testing.assert_close(batched, identity.expand(4, 3, 3))
