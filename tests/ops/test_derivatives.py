"""Derivatives in every mode of torch: each operator against plain torch operations."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.ops.cases import OPERATORS, Operator

BY_NAME = [pytest.param(op, id=op.name) for op in OPERATORS]
SMALL = [pytest.param(op, shapes, id=f"{op.name}-{shapes}") for op in OPERATORS for shapes in op.shapes[:3]]


def prepared(op: Operator, function):
    """The function with inputs made valid inside it, so that any perturbation of them is one of valid inputs."""
    return lambda *t: function(*op.prepare(*t))


def leaves(op: Operator, shapes: tuple) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in op.inputs(shapes))


@pytest.mark.parametrize(("op", "shapes"), SMALL)
def test_gradcheck(op: Operator, shapes: tuple) -> None:
    inputs, function = leaves(op, shapes), prepared(op, op.call)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("op", BY_NAME)
def test_each_input_alone(op: Operator) -> None:
    for k in range(len(op.shapes[0])):
        inputs = [t.detach() for t in leaves(op, op.shapes[0])]
        inputs[k].requires_grad_()
        assert gradcheck(prepared(op, op.call), inputs, check_forward_ad=True)


def _weighted(function):
    """A scalar that is not linear in the result, so that second derivatives of the square do not vanish."""

    def scalar(*t):
        result = function(*t)
        weights = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).reshape(result.shape)
        return (weights * result + (result**2) / 3).sum()

    return scalar


def _tangents(inputs):
    return tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in inputs)


def _nested_jvp(f, inputs):
    inner = lambda *t: jvp(f, t, _tangents(t))[1]  # noqa: E731
    return jvp(inner, inputs, _tangents(inputs))[1]


# Each takes (function, inputs) and returns tensors; the operator and the plain formula must agree.
TRANSFORMS = {
    "grad": lambda f, x: grad(_weighted(f), tuple(range(len(x))))(*x),
    "vjp": lambda f, x: (lambda out, back: back(torch.ones_like(out)))(*vjp(f, *x)),
    "jvp": lambda f, x: jvp(f, x, _tangents(x)),
    "jacrev": lambda f, x: jacrev(f, tuple(range(len(x))))(*x),
    "jacfwd": lambda f, x: jacfwd(f, tuple(range(len(x))))(*x),
    "hessian": lambda f, x: hessian(_weighted(f), tuple(range(len(x))))(*x),
    "jacfwd(jacfwd)": lambda f, x: jacfwd(jacfwd(_weighted(f)))(*x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(_weighted(f)))(*x),
    "jacfwd(jacrev)": lambda f, x: jacfwd(jacrev(_weighted(f)))(*x),
    "jacrev(jacfwd)": lambda f, x: jacrev(jacfwd(_weighted(f)))(*x),
    "jvp(jvp)": _nested_jvp,
    "jvp(grad)": lambda f, x: jvp(grad(_weighted(f)), x, _tangents(x)),
    "grad(jvp)": lambda f, x: grad(lambda *t: jvp(_weighted(f), t, _tangents(t))[1])(*x),
    "grad(grad)": lambda f, x: grad(lambda *t: grad(_weighted(f))(*t).square().sum())(*x),
    "vmap": lambda f, x: vmap(f)(*(torch.stack([t, 2 * t, -t]) for t in x)),
    "vmap, last axis": lambda f, x: vmap(f, in_dims=-1)(*(torch.stack([t, 2 * t, -t], -1) for t in x)),
    "vmap, first input only": lambda f, x: vmap(f, in_dims=(0, *(None,) * (len(x) - 1)))(
        torch.stack([x[0]] * 3), *x[1:]
    ),
    "vmap, last input only": lambda f, x: vmap(f, in_dims=(*(None,) * (len(x) - 1), 0))(
        *x[:-1], torch.stack([x[-1]] * 3)
    ),
    "vmap(vmap)": lambda f, x: vmap(vmap(f))(*(torch.stack([t, 2 * t]).unsqueeze(0) for t in x)),
    "vmap(grad)": lambda f, x: vmap(grad(_weighted(f)))(*(torch.stack([t, 2 * t]) for t in x)),
    "grad(vmap)": lambda f, x: grad(lambda *t: vmap(_weighted(f))(*t).sum())(*(torch.stack([t, 2 * t]) for t in x)),
    "vmap(jvp)": lambda f, x: vmap(lambda *t: jvp(f, t, _tangents(t))[1])(*(torch.stack([t, 2 * t]) for t in x)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", BY_NAME)
def test_torch_func(op: Operator, transform: str) -> None:
    inputs = op.inputs(op.shapes[0])
    apply = TRANSFORMS[transform]
    torch.testing.assert_close(apply(prepared(op, op.call), inputs), apply(prepared(op, op.plain), inputs))


@pytest.mark.parametrize("op", BY_NAME)
def test_forward_over_reverse_with_dual_numbers(op: Operator) -> None:
    def product(function):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, s) for t, s in zip(leaves_, _tangents(leaves_))]
            gradients = torch.autograd.grad(_weighted(prepared(op, function))(*duals), duals, create_graph=True)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]

    leaves_ = leaves(op, op.shapes[0])
    torch.testing.assert_close(product(op.call), product(op.plain))


@pytest.mark.parametrize("op", BY_NAME)
def test_backward_in_half_precision_keeps_dtype(op: Operator) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = tuple(t.detach().requires_grad_() for t in op.inputs(op.shapes[0], dtype))
        for t in torch.autograd.grad(op.call(*inputs).sum(), inputs):
            assert t.dtype == dtype


@pytest.mark.parametrize("op", BY_NAME)
def test_checkpointing(op: Operator) -> None:
    inputs = leaves(op, op.shapes[0])
    run = functools.partial(torch.utils.checkpoint.checkpoint, prepared(op, op.call), use_reentrant=False)
    got = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(prepared(op, op.plain)(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", BY_NAME)
def test_no_history_without_gradients(op: Operator) -> None:
    inputs = leaves(op, op.shapes[0])
    with torch.no_grad():
        assert op.call(*inputs).grad_fn is None
    with torch.inference_mode():
        assert op.call(*inputs).is_inference()
    assert op.call(*inputs).grad_fn is not None
