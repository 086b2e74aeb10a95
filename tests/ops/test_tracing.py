"""Compilation, export, tracing, fake tensors, autocast, registration."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jvp
from torch.fx.experimental.proxy_tensor import make_fx

from tests.ops.cases import OPERATORS, Operator
from tests.ops.test_derivatives import _tangents, _weighted, leaves, prepared

BY_NAME = [pytest.param(op, id=op.name) for op in OPERATORS]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """Traced whole, through autograd and decompositions; the code generator behind it is torch's own affair."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


COMPILED = {
    "function": lambda f, x: f(*x),
    "gradient inside": lambda f, x: grad(_weighted(f), tuple(range(len(x))))(*x),
    "jvp inside": lambda f, x: jvp(f, x, _tangents(x)),
    "hessian inside": lambda f, x: hessian(_weighted(f))(*x),
}


@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("op", BY_NAME)
def test_compile(op: Operator, what: str) -> None:
    inputs = op.inputs(op.shapes[0])
    call = compiled(lambda *x: COMPILED[what](prepared(op, op.call), x))
    torch.testing.assert_close(call(*inputs), COMPILED[what](prepared(op, op.plain), inputs))


@pytest.mark.parametrize("op", BY_NAME)
def test_gradient_of_compiled(op: Operator) -> None:
    inputs = leaves(op, op.shapes[0])
    got = torch.autograd.grad(compiled(prepared(op, op.call))(*inputs).square().sum(), inputs)
    want = torch.autograd.grad(prepared(op, op.plain)(*inputs).square().sum(), inputs)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", BY_NAME)
def test_compile_with_code_generation(op: Operator) -> None:
    inputs = op.inputs(op.shapes[0], torch.float32)
    torch.testing.assert_close(torch.compile(op.call, fullgraph=True)(*inputs), op.plain(*inputs))


@pytest.mark.parametrize("op", BY_NAME)
def test_dynamic_shapes(op: Operator) -> None:
    call = torch.compile(op.call, fullgraph=True, backend="aot_eager", dynamic=True)
    for shapes in op.shapes[:2]:
        inputs = op.inputs(shapes)
        torch.testing.assert_close(call(*inputs), op.plain(*inputs))


@pytest.mark.parametrize("op", BY_NAME)
def test_export(op: Operator) -> None:
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return op.call(*inputs)

    inputs = op.inputs(op.shapes[0])
    program = torch.export.export(Module(), inputs)
    torch.testing.assert_close(program.module()(*inputs), op.plain(*inputs))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", BY_NAME)
def test_make_fx(op: Operator, mode: str) -> None:
    inputs = op.inputs(op.shapes[0])
    graph = make_fx(lambda *x: op.call(*x), tracing_mode=mode)(*inputs)
    torch.testing.assert_close(graph(*inputs), op.plain(*inputs))
    loss = _weighted(prepared(op, op.call))
    graph = make_fx(grad(loss), tracing_mode=mode)(*inputs)
    torch.testing.assert_close(graph(*inputs), grad(_weighted(prepared(op, op.plain)))(*inputs))


@pytest.mark.parametrize("place", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("op", BY_NAME)
def test_fake_and_meta_tensors(op: Operator, place: str) -> None:
    for shapes in op.shapes:
        want = op.plain(*op.inputs(shapes)).shape
        for dtype in (torch.float32, torch.bfloat16):
            with FakeTensorMode():
                got = op.call(*(torch.empty(s, dtype=dtype, device=place) for s in shapes))
            assert (got.shape, got.dtype, got.device.type) == (want, dtype, place)
        meta = op.call(*(torch.empty(s, device="meta") for s in shapes))
        assert (meta.shape, meta.device.type) == (want, "meta")


@pytest.mark.parametrize("op", BY_NAME)
def test_autocast_does_not_lower_the_precision(op: Operator) -> None:
    inputs = leaves(op, op.shapes[0])
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = prepared(op, op.call)(*inputs)
        gradients = torch.autograd.grad(got.square().sum(), inputs)
    want = prepared(op, op.plain)(*inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients, torch.autograd.grad(want.square().sum(), inputs))


@pytest.mark.parametrize("op", BY_NAME)
def test_autocast_promotes_mixed_dtypes(op: Operator) -> None:
    first, *rest = op.inputs(op.shapes[0], torch.float32)
    first = first.bfloat16()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = op.call(first, *rest)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, op.plain(first.float(), *rest))


@pytest.mark.parametrize("op", BY_NAME)
def test_registration(op: Operator) -> None:
    raw = getattr(torch.ops.torch_curvature, op.raw).default
    for shapes in op.shapes[:3]:
        torch.library.opcheck(raw, op.raw_arguments(*op.inputs(shapes, torch.float32)))
