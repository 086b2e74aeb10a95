"""Derivatives of compositions against those of the composed function, which nobody composed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torch_curvature as tc
from torch_curvature import reference

Function = Callable[[Tensor], Tensor]


def smooth(inputs: int, outputs: int, seed: int) -> Function:
    """A random function with derivatives of every order: `A sin(B x) + quadratic`."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    a, b, q = randn(outputs, 5), randn(5, inputs), randn(outputs, inputs, inputs)
    return lambda x: a @ (b @ x).sin() + torch.einsum("oij,i,j->o", q, x, x)


def both(function: Function, point: Tensor) -> tuple[Tensor, Tensor]:
    return reference.function_jacobian(function, point), reference.function_hessian(function, point)


def close(found: Tensor, truth: Tensor) -> None:
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-12 * max(scale, 1.0))


@pytest.mark.parametrize("components", [1, 2, 7])
@pytest.mark.parametrize(("inputs", "hidden"), [(3, 4), (6, 2), (1, 5), (4, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_hessian_of_a_composition(components: int, inputs: int, hidden: int, seed: int) -> None:
    network, outside = smooth(inputs, hidden, seed), smooth(hidden, components, seed + 100)
    x = torch.randn(inputs, dtype=torch.float64)
    (j_n, h_n), (j_l, h_l) = both(network, x), both(outside, network(x))
    truth_j, truth_h = both(lambda w: outside(network(w)), x)
    close(tc.compose_jacobian(j_l, j_n), truth_j)
    composed = tc.compose_hessian(j_l, h_l, j_n, h_n)
    close(composed.hessian, truth_h)
    close(composed.gauss_newton, torch.einsum("mkl,ki,lj->mij", h_l, j_n, j_n))
    close(composed.residual, torch.einsum("mk,kij->mij", j_l, h_n))
    close(truth_h, torch.func.hessian(lambda w: outside(network(w)))(x))
    for term in (*composed, composed.hessian):
        assert torch.equal(term, term.mT)


def test_a_scalar_outer_function_in_vector_form() -> None:
    network, loss = smooth(4, 3, 7), smooth(3, 1, 8)
    x = torch.randn(4, dtype=torch.float64)
    (j_n, h_n), (j_l, h_l) = both(network, x), both(loss, network(x))
    row = tc.compose_hessian(j_l, h_l, j_n, h_n)
    vector = tc.compose_hessian(j_l[0], h_l[0], j_n, h_n)
    for found, truth in zip(vector, row, strict=True):
        assert found.shape == (4, 4)
        close(found, truth[0])
    close(tc.compose_jacobian(j_l[0], j_n), j_n.mT @ j_l[0])
    close(tc.compose_jacobian(j_l[0], j_n), tc.compose_jacobian(j_l, j_n)[0])


def test_a_convex_outer_function_has_a_positive_semi_definite_first_term() -> None:
    x = torch.randn(5, dtype=torch.float64)
    j_n, h_n = both(smooth(5, 3, 3), x)
    j_l, h_l = both(lambda u: u.logsumexp(-1), torch.randn(3, dtype=torch.float64))
    term = tc.compose_hessian(j_l, h_l, j_n, h_n).gauss_newton
    values = torch.linalg.eigvalsh(term[0])
    assert values.min() > -1e-12 * values.max()


@pytest.mark.parametrize("components", [None, 1, 2, 7])
@pytest.mark.parametrize("batch", [((3,), (3,)), ((1,), (3,)), ((2, 1), (1, 4)), ((0,), (0,))])
def test_batches(components: int | None, batch: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    o, n = 4, 3
    m = () if components is None else (components,)
    j_l, h_l = (torch.randn(*batch[0], *m, *(o,) * k, dtype=torch.float64) for k in (1, 2))
    j_n, h_n = (torch.randn(*batch[1], o, *(n,) * k, dtype=torch.float64) for k in (1, 2))
    h_l, h_n = h_l + h_l.mT, h_n + h_n.mT
    found = tc.compose_hessian(j_l, h_l, j_n, h_n)
    if components is None:
        equations = ("...kl,...ki,...lj->...ij", "...k,...kij->...ij")
    else:
        equations = ("...mkl,...ki,...lj->...mij", "...mk,...kij->...mij")
    close(found.gauss_newton, torch.einsum(equations[0], h_l, j_n, j_n))
    close(found.residual, torch.einsum(equations[1], j_l, h_n))
    assert torch.equal(found.hessian, found.hessian.mT)
    equation = "...k,...ki->...i" if components is None else "...mk,...ki->...mi"
    close(tc.compose_jacobian(j_l, j_n), torch.einsum(equation, j_l, j_n))


@pytest.mark.parametrize("sizes", [(3, 4), (3, 4, 2), (2, 5, 3, 4), (3, 2, 4, 1, 3, 2)])
@pytest.mark.parametrize("scalar", [False, True])
def test_folding_a_chain(sizes: tuple[int, ...], scalar: bool) -> None:
    chain = [smooth(i, o, 10 + k) for k, (i, o) in enumerate(itertools.pairwise(sizes))]
    chain = [lambda x, f=f: f(x).tanh() for f in chain]
    point = torch.randn(sizes[0], dtype=torch.float64)

    def whole(x: Tensor) -> Tensor:
        for f in chain:
            x = f(x)
        return x

    levels, x = [], point
    for f in chain:
        levels.append(both(f, x))
        x = f(x)
    levels.reverse()
    truth_j, truth_h = both(whole, point)
    if scalar:
        levels[0] = (levels[0][0][-1], levels[0][1][-1])
        truth_j, truth_h = truth_j[-1], truth_h[-1]
    found = tc.compose(*levels)
    close(found.jacobian, truth_j)
    close(found.hessian, truth_h)
    assert torch.equal(found.hessian, found.hessian.mT)
    if len(levels) > 2:
        nested = tc.compose(levels[0], tc.compose(*levels[1:]))
        close(nested.hessian, truth_h)


def test_affine_functions_have_no_hessian() -> None:
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert tc.compose((a, None), (b, None)).hessian is None
    f = smooth(4, 3, 0)
    x = torch.randn(5, dtype=torch.float64)
    j, h = both(f, b @ x)
    truth = reference.function_hessian(lambda w: f(b @ w), x)
    close(tc.compose((j, h), (b, None)).hessian, truth)
    assert not tc.compose_hessian(j, h, b, None).residual.any()
    j, h = both(f, x[:4])
    outer = torch.randn(2, 3, dtype=torch.float64)
    found = tc.compose_hessian(outer, None, j, h)
    assert not found.gauss_newton.any()
    close(found.hessian, reference.function_hessian(lambda w: outer @ f(w), x[:4]))


def test_gauss_newton_and_residual_of_a_network_and_loss() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    data = (torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))
    loss_fn = torch.nn.CrossEntropyLoss()
    outputs = model(data[0]).detach()
    composed = tc.compose_hessian(
        reference.loss_jacobian(loss_fn, outputs, data[1]),
        reference.loss_hessian(loss_fn, outputs, data[1]).unsqueeze(0),
        reference.jacobian(model, data[0]).flatten(0, 1),
        reference.network_hessian(model, data[0]).flatten(0, 1),
    )
    close(composed.gauss_newton[0], reference.gauss_newton(model, loss_fn, data))
    close(composed.residual[0], reference.residual(model, loss_fn, data))
    close(composed.hessian[0], reference.hessian(model, loss_fn, data))


def test_differentiable_and_under_vmap() -> None:
    j_l, h_l, j_n, h_n = (torch.randn(s, dtype=torch.float64) for s in ((2, 3), (2, 3, 3), (3, 2), (3, 2, 2)))
    inputs = tuple(t.requires_grad_() for t in (j_l, h_l, j_n, h_n))
    assert torch.autograd.gradcheck(lambda *t: tc.compose_hessian(*t).hessian, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: tc.compose_hessian(*t).hessian, inputs)
    many = tuple(torch.randn(4, *t.shape, dtype=torch.float64) for t in inputs)
    found = torch.func.vmap(lambda *t: tc.compose_hessian(*t).hessian)(*many)
    close(found, tc.compose_hessian(*many).hessian)


@pytest.mark.parametrize(
    ("j_l", "j_n"), [((2, 3), (4, 5)), ((3,), (4, 5)), ((3,), (3,)), ((2, 2, 2, 3), (3, 5)), ((4, 2, 3), (5, 3, 6))]
)
def test_jacobians_that_do_not_compose(j_l: tuple[int, ...], j_n: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got outer .*inner|batch axes do not broadcast: outer"):
        tc.compose_jacobian(torch.ones(j_l), torch.ones(j_n))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (2, 3, 4), (3, 5), (3, 5, 5)),
        ((2, 3), (3, 3), (3, 5), (3, 5, 5)),
        ((2, 3), (2, 3, 3), (4, 5), (4, 5, 5)),
        ((2, 3), (2, 3, 3), (3, 5), (3, 5, 6)),
        ((2, 3), (2, 3, 3), (3, 5), (5, 5)),
        ((3,), (2, 3, 3), (3, 5), (3, 5, 5)),
        ((3,), (3, 3), (3,), (3, 5, 5)),
    ],
)
def test_hessians_that_do_not_compose(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="do not compose") as error:
        tc.compose_hessian(*(torch.ones(s) for s in shapes))
    assert all(str(s) in str(error.value) for s in shapes)
    with pytest.raises(ValueError, match="do not broadcast"):
        tc.compose_hessian(torch.ones(2, 3), torch.ones(2, 3, 3), torch.ones(4, 3, 5), torch.ones(4, 3, 5, 5))


def test_only_the_symmetric_part_of_a_hessian_enters() -> None:
    j_l, h_l, j_n, h_n = (torch.randn(s, dtype=torch.float64) for s in ((2, 3), (2, 3, 3), (3, 4), (3, 4, 4)))
    found = tc.compose_hessian(j_l, h_l, j_n, h_n)
    truth = tc.compose_hessian(j_l, (h_l + h_l.mT) / 2, j_n, (h_n + h_n.mT) / 2)
    for term, symmetric in zip(found, truth, strict=True):
        close(term, symmetric)
        assert torch.equal(term, term.mT)


def test_a_jacobian_of_too_many_axes_is_refused_without_a_hessian_too() -> None:
    with pytest.raises(ValueError, match=r"do not compose.*\(7, 2, 3\) and None"):
        tc.compose_hessian(torch.ones(7, 2, 3), None, torch.ones(3, 5), torch.ones(3, 5, 5))


def test_an_empty_chain() -> None:
    with pytest.raises(ValueError, match="at least one"):
        tc.compose()
