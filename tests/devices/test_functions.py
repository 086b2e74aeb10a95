"""Functions of tensors alone, on fake CUDA tensors: shapes, dtypes and the device, with no value to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import torch_curvature as tc

from .stand_in import on_device, same, stand_in

Shapes = tuple[tuple[int, ...], ...]
FUNCTIONS: dict[str, tuple[Callable[..., Any], Shapes]] = {
    "tensor_product": (lambda a, b: tc.tensor_product(a, b, axes=2, batch_axes=1), ((2, 3, 4, 5), (2, 4, 5, 6))),
    "inner": (tc.inner, ((3, 4), (3, 4))),
    "outer": (tc.outer, ((3, 4), (3, 5))),
    "frobenius_inner": (tc.frobenius_inner, ((3, 4, 5), (3, 4, 5))),
    "softmax_jacobian": (tc.softmax_jacobian, ((3, 4),)),
    "compose_jacobian": (tc.compose_jacobian, ((2, 3, 4), (2, 4, 5))),
    "compose_hessian, scalar": (tc.compose_hessian, ((4,), (4, 4), (4, 5), (4, 5, 5))),
    "compose_hessian": (tc.compose_hessian, ((2, 3, 4), (2, 3, 4, 4), (2, 4, 5), (2, 4, 5, 5))),
    "compose": (lambda j, h, k: tc.compose((j, h), (k, None)), ((3, 4), (3, 4, 4), (4, 5))),
    "MatchingLoss identity": (tc.MatchingLoss("identity", reduction="none"), ((3, 4), (3, 4))),
    "MatchingLoss sigmoid": (tc.MatchingLoss("sigmoid"), ((3, 4), (3, 4))),
    "MatchingLoss softmax": (tc.MatchingLoss("softmax"), ((3, 4, 2), (3, 4, 2))),
    "MatchingLoss exp": (tc.MatchingLoss("exp", reduction="sum"), ((3, 4), (3, 4))),
    "MatchingLoss tanh": (tc.MatchingLoss("tanh"), ((3, 4), (3, 4))),
}


def described(result: Any) -> list[tuple[torch.Size, torch.dtype] | None]:
    return [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(result)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_cuda_tensors(name: str, dtype: torch.dtype) -> None:
    function, shapes = FUNCTIONS[name]
    expected = function(*(torch.rand(s, dtype=dtype) for s in shapes))
    with FakeTensorMode():
        found = function(*(torch.empty(s, dtype=dtype, device="cuda") for s in shapes))
    assert described(found) == described(expected)
    assert all(x.device.type == "cuda" for x in tree_leaves(found) if isinstance(x, Tensor))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [torch.rand(s) for s in shapes]
    expected = function(*inputs)
    with stand_in() as gpu:
        same(function(*on_device(inputs)), expected)
        assert not gpu.reads
        assert not gpu.sends


def test_a_transfer_of_the_user() -> None:
    u, y = 3 * torch.randn(3, 4), torch.rand(3, 4)
    loss = tc.MatchingLoss(lambda t: t.clamp(0, 1) + torch.sinh(t))
    expected = loss(u, y)
    with stand_in():
        same(loss(*on_device((u, y))), expected)


REFERENCE: dict[str, tuple[Callable[..., Any], Shapes]] = {
    "loss_jacobian": (lambda u, y: tc.reference.loss_jacobian(_loss, u, y), ((3, 4), (3, 4))),
    "loss_hessian": (lambda u, y: tc.reference.loss_hessian(_loss, u, y), ((3, 4), (3, 4))),
    "output_gradient": (lambda u, y: tc.reference.output_gradient(_loss, u, y), ((3, 4), (3, 4))),
    "output_fisher": (lambda u, y: tc.reference.output_fisher(_loss, u, y), ((3, 4), (3, 4))),
    "function_jacobian": (lambda x: tc.reference.function_jacobian(torch.sin, x), ((4,),)),
    "function_hessian": (lambda x: tc.reference.function_hessian(lambda t: t.exp().sum(), x), ((4,),)),
}
_loss = torch.nn.MSELoss()


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_of_functions(name: str) -> None:
    function, shapes = REFERENCE[name]
    inputs = [torch.rand(s) for s in shapes]
    expected = function(*inputs)
    with stand_in():
        same(function(*on_device(inputs)), expected)


def test_every_public_function_is_on_a_list() -> None:
    """Matrices and `track` run over models in test_engine; `register_rule` and `is_matching` hold no tensor."""
    here = {name.split()[0].rstrip(",") for name in FUNCTIONS}
    engine = {"GaussNewton", "Fisher", "EmpiricalFisher", "Jacobian", "Hessian", "Residual", "hessian_split", "track"}
    other = {
        "HessianSplit",
        "UnsupportedModelError",
        "Use",
        "is_matching",
        "losses",
        "ops",
        "reference",
        "register_rule",
    }
    assert here | engine | other == set(tc.__all__)
