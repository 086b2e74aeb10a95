"""Every matrix, in every representation, for every model of the list, on a stand-in for a GPU: the same as on the CPU.

The stand-in refuses operands on two devices and host access to device memory, so that a tensor made on the wrong
device, a hidden ``.cpu()`` and a generator of the wrong device fail here as they would on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.models import CASES
from tests.engine.test_matrices import call, own_rule, problem  # noqa: F401

from .stand_in import DEVICE, on_device, same, stand_in

Cell = Callable[[Any], Any]
ALWAYS = {
    *("mlp", "residual block with batch normalisation", "transposed convolutions", "tied embedding", "embedding bags"),
    *("layer, group and instance normalisation", "self-attention", "weight normalisation", "elementwise parameters"),
    *("one layer used three times", "packed sequences"),
}  # a model of every route through the engine; the rest of the list with --full
SOME = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.full) for name in CASES]
QUADRATIC: dict[str, Cell] = {
    "dense": lambda m: m.dense(),
    "blocks": lambda m: m.blocks(),
    "blocks by module": lambda m: m.blocks(by="module"),
    "diagonal": lambda m: m.diagonal(),
    "trace": lambda m: m.trace(),
    "frobenius_norm": lambda m: m.frobenius_norm(),
    "@ vector": lambda m: m @ _vectors(m, 1)[:, 0],
    "@ vectors": lambda m: m @ _vectors(m, 17),
    "@ names": lambda m: m @ m.split(_vectors(m, 1)[:, 0]),  # of ones, softmax of a single layer makes nothing
}
GRAM: dict[str, Cell] = {
    "gram": lambda m: m.gram(),
    "kronecker expand": lambda m: m.kronecker("expand"),
    "kronecker reduce": lambda m: m.kronecker("reduce"),
}
JACOBIAN: dict[str, Cell] = {
    **{name: QUADRATIC[name] for name in ("dense", "blocks", "blocks by module", "frobenius_norm", "@ vectors")},
    "gram": lambda m: m.gram(),
}


def _vectors(matrix: Any, K: int) -> Tensor:
    P = sum(p.numel() for p in matrix.parameters.values())
    return torch.linspace(-1, 1, P * K, device=matrix.device).view(P, K).sin()


def compare(make: Callable[[nn.Module, Any], Any], cells: dict[str, Cell], model: nn.Module, data: Any) -> None:
    """All cells of what ``make`` makes, on the CPU and on the stand-in."""
    expected: dict[str, Any] = {}
    theirs = make(model, data)
    for name, cell in cells.items():
        with contextlib.suppress(tc.UnsupportedModelError):
            expected[name] = cell(theirs)
    with stand_in():
        ours = make(on_device(model), on_device(data))
        for name, cell in cells.items():
            if name not in expected:
                with pytest.raises(tc.UnsupportedModelError):
                    cell(ours)
                continue
            try:
                same(cell(ours), expected[name])
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error


def _targets(name: str) -> tuple[nn.Module, tuple[Any, Tensor]]:
    model, inputs, targets = problem(name)
    return model, (inputs, targets)


@pytest.mark.parametrize("name", CASES)
def test_every_model(name: str) -> None:
    model, data = _targets(name)
    some = {key: QUADRATIC[key] for key in ("diagonal", "@ vector")}
    compare(lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d), some, model, data)


@pytest.mark.parametrize("name", SOME)
def test_gauss_newton(name: str) -> None:
    model, data = _targets(name)
    compare(lambda m, d: tc.GaussNewton(m, nn.CrossEntropyLoss(), d), {**QUADRATIC, **GRAM}, model, data)


@pytest.mark.parametrize("name", SOME)
def test_fisher_and_gradient_second_moment(name: str) -> None:
    model, data = _targets(name)
    some = {key: QUADRATIC[key] for key in ("dense", "diagonal", "@ vector", "@ vectors")}
    loss = nn.CrossEntropyLoss(reduction="sum")
    compare(lambda m, d: tc.Fisher(m, loss, d), some, model, data)
    compare(lambda m, d: tc.Fisher(m, loss, d, samples=3), {**some, **GRAM}, model, data)
    norms: dict[str, Cell] = {"gradient_norms": lambda m: m.gradient_norms()}
    compare(lambda m, d: tc.EmpiricalFisher(m, loss, d), {**some, **GRAM, **norms}, model, data)


@pytest.mark.parametrize("name", SOME)
def test_jacobian(name: str) -> None:
    model, (inputs, _) = _targets(name)
    with torch.no_grad():
        shape = call(model, inputs).shape
    cells = {**JACOBIAN, "transposed_product": lambda m: m.transposed_product(torch.ones(shape, device=m.device))}
    compare(tc.Jacobian, cells, model, (inputs, None) if isinstance(inputs, tuple) else inputs)


@pytest.mark.parametrize("name", SOME)
def test_hessian_and_residual(name: str) -> None:
    model, data = _targets(name)
    loss = nn.CrossEntropyLoss()
    compare(lambda m, d: tc.Hessian(m, loss, d), QUADRATIC, model, data)
    compare(lambda m, d: tc.Residual(m, loss, d), {k: QUADRATIC[k] for k in ("dense", "diagonal")}, model, data)
    for kind in ("dense", "blocks", "diagonal"):
        split = {kind: lambda m, kind=kind: _fields(tc.hessian_split(*m, kind))}
        compare(lambda m, d: (m, loss, d), split, model, data)


def _fields(split: tc.HessianSplit) -> list[Any]:
    return [split.gauss_newton, split.residual, split.gauss_newton_norm, split.residual_norm, split.hessian]


@pytest.mark.parametrize("name", SOME)
def test_tracking(name: str) -> None:
    model, data = _targets(name)

    def tracked(model: nn.Module, data: Any) -> Any:
        with tc.track(model) as t:
            nn.CrossEntropyLoss()(call(model, data[0]), data[1]).backward()
        return t

    cells: dict[str, Cell] = {
        "gradients": lambda t: t.gradients(),
        "gradient_norms": lambda t: t.gradient_norms(),
        "gradient_gram": lambda t: t.gradient_gram(),
        "gradient_variance": lambda t: t.gradient_variance(),
    }
    compare(tracked, cells, model, data)


@pytest.mark.parametrize("name", SOME)
def test_reference(name: str) -> None:
    model, data = _targets(name)
    loss, r = nn.CrossEntropyLoss(), tc.reference
    functions = (r.gauss_newton, r.residual, r.hessian, r.fisher, r.empirical_fisher, r.per_sample_gradients)
    cells: dict[str, Cell] = {f.__name__: lambda p, f=f: f(p[0], loss, p[1]) for f in functions}
    compare(lambda m, d: (m, d), cells, model, data)


def test_the_models_that_always_run_are_on_the_list() -> None:
    assert set(CASES) >= ALWAYS


def test_torch_default_device_does_not_matter() -> None:
    """``torch.set_default_device("cuda")`` moves what is made without a device, and no generator of the CPU."""
    model, data = _targets("mlp")
    expected = [tc.GaussNewton(model, nn.CrossEntropyLoss(), data).dense()]
    expected += [tc.Hessian(model, nn.CrossEntropyLoss(), data).dense()]
    with stand_in(), torch.device(DEVICE):
        ours, moved = on_device(model), on_device(data)
        same(tc.GaussNewton(ours, nn.CrossEntropyLoss(), moved).dense(), expected[0])
        same(tc.Hessian(ours, nn.CrossEntropyLoss(), moved).dense(), expected[1])
        assert tc.is_matching(nn.MSELoss(), "identity")
