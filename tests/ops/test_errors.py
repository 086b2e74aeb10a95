"""Bad input: each case gets an error that names the argument, what was got and what to do; on every route the same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_curvature as tc
from tests.ops.cases import OPERATORS, Operator

BY_NAME = [pytest.param(op, id=op.name) for op in OPERATORS]
ones = torch.ones


def routes(op: Operator):
    """Ways to call an operator on the same inputs: the kernel, autograd, forward mode in a transform, fake."""

    def fake(*inputs):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return op.call(*(mode.from_tensor(t) for t in inputs))

    yield "kernel", op.call
    yield "autograd", lambda *x: op.call(*(t.clone().requires_grad_(t.is_floating_point()) for t in x))
    yield "jvp", lambda *x: torch.func.jvp(lambda s: op.call(*(t * s.to(t.dtype) for t in x)), (ones(()),), (ones(()),))
    yield "fake", fake


@pytest.mark.parametrize("op", BY_NAME)
def test_wrong_dtype(op: Operator) -> None:
    for dtype in (torch.int32, torch.bool, torch.complex64):
        inputs = tuple(ones(s).to(dtype) for s in op.shapes[0])
        for name, call in routes(op):
            if dtype == torch.complex64 and name == "autograd":
                continue  # complex leaves do require gradients; the kernel route refuses them all the same
            with pytest.raises(TypeError, match=r"is torch\.\w+, but this operator takes float32"):
                call(*inputs)


@pytest.mark.parametrize("op", BY_NAME)
def test_mixed_dtypes(op: Operator) -> None:
    first, *rest = op.inputs(op.shapes[0], torch.float32)
    for _, call in routes(op):
        with pytest.raises(TypeError, match=r"'\w+' is torch\.float64 and '\w+' is torch\.float32"):
            call(first.double(), *rest)


@pytest.mark.parametrize("op", BY_NAME)
def test_mixed_devices(op: Operator) -> None:
    first, *rest = op.inputs(op.shapes[0], torch.float32)
    with pytest.raises(ValueError, match=r"is on meta and '\w+' on \w+"):
        op.call(first.to("meta"), *rest)


@pytest.mark.parametrize("op", BY_NAME)
def test_missing_axes(op: Operator) -> None:
    for k in range(len(op.shapes[0])):
        inputs = list(op.inputs(op.shapes[0], torch.float32))
        inputs[k] = torch.tensor(1.0)
        for _, call in routes(op):
            with pytest.raises(ValueError, match=r"has shape \[\], but at least \d axes are needed: \[\*, "):
                call(*inputs)


@pytest.mark.parametrize("op", BY_NAME)
def test_not_a_tensor(op: Operator) -> None:
    with pytest.raises(TypeError, match=r"'\w+' is a list, but a torch.Tensor is needed"):
        op.call(*([1.0] for _ in op.shapes[0]))


WRONG_SHAPES = {
    "outer": ((2, 3), (4, 3)),
    "frobenius_inner": ((2, 3, 4), (2, 4, 3)),
    "kronecker_sum": ((3, 2, 2), (4, 3)),
    "kronecker_sum(a2)": ((3, 2, 2), (3, 3), (2, 3)),
    "kronecker_sum(symmetric)": ((3, 2, 3), (3, 3)),
    "jacobian_norms": ((1, 3, 2, 4), (3, 1, 4)),
    "jacobian_gram": ((1, 3, 2, 4), (4, 2, 4)),
    "jacobian_gram(g2, a2)": ((1, 3, 2, 4), (3, 2, 4), (1, 3, 2, 5), (3, 2, 4)),
    "gauss_newton_diagonal": ((1, 3, 2, 4), (4, 2, 4)),
    "gauss_newton_diagonal(sign)": ((1, 3, 2, 4), (3, 2, 4), (2, 3)),
    "gauss_newton_block": ((5, 1, 3, 2, 4), (2, 3, 2, 4)),
    "gauss_newton_block(sign)": ((1, 3, 2, 4), (3, 2, 4), (1, 2)),
}


@pytest.mark.parametrize("op", BY_NAME)
def test_shapes_that_do_not_fit(op: Operator) -> None:
    inputs = tuple(ones(s) for s in WRONG_SHAPES[op.name])
    for _, call in routes(op):
        with pytest.raises(ValueError, match=r"do not broadcast|must be as long as|symmetric=True says"):
            call(*inputs)


def test_unequal_batches() -> None:
    with pytest.raises(ValueError, match=r"outer: the leading axes of 'u' \[2, 3\], 'v' \[4, 3\] do not broadcast"):
        tc.ops.outer(ones(2, 3), ones(4, 3))
    with pytest.raises(ValueError, match=r"frobenius_inner: the leading axes"):
        tc.ops.frobenius_inner(ones(2, 3, 3), ones(4, 3, 3))
    with pytest.raises(ValueError, match=r"kronecker_sum: 'a' has shape \[4, 3\] and 'b' \[3, 2, 2\], but axis -2"):
        tc.ops.kronecker_sum(ones(3, 2, 2), ones(4, 3))


def test_symmetric_excludes_a2() -> None:
    with pytest.raises(ValueError, match=r"'a2' is left out; got 'b' of shape \[3, 2, 2\] and an 'a2'"):
        tc.ops.kronecker_sum(ones(3, 2, 2), ones(3, 4), ones(3, 4), symmetric=True)


def test_result_that_does_not_fit_is_named_before_anything_is_allocated() -> None:
    with pytest.raises(RuntimeError, match=r"kronecker_sum: the result \[1000000, 1000000\] takes 3725\.3 GiB"):
        tc.ops.kronecker_sum(ones(1, 1000, 1000), ones(1, 1000), symmetric=True)
    with pytest.raises(RuntimeError, match=r"outer: the result \[10000000, 10000000\] takes 372529\.0 GiB"):
        tc.ops.outer(ones(1).expand(10_000_000), ones(1).expand(10_000_000))
