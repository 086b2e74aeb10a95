"""The oracle itself, against central differences: nothing else can vouch for it."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from docs.derivative_cases import CASES, Case
from docs.torch_second_derivatives import central_differences
from torch_curvature import reference

# Losses without a second derivative in torch: the reference must refuse them with the name of the function.
REFUSED = {
    "MultiMarginLoss": "multi_margin_loss",
    "MultiMarginLoss p=2": "multi_margin_loss",
    "MultiLabelMarginLoss": "multilabel_margin_loss",
    "CTCLoss": "ctc_loss",
}
# Of first derivatives against differences of values, and of second ones against differences of torch's own gradients.
# The gradients of hardsigmoid and celu have constants in single precision in torch, in float64 too.
FIRST, SECOND = 1e-9, 1e-7
IMPRECISE_IN_TORCH = {"Hardsigmoid()", "CELU(alpha=1.3)"}


class Point:
    """A case as plain functions of one flat parameter vector, run by torch as it is."""

    def __init__(self, case: Case, seed: int) -> None:
        self.model, self.inputs, self.loss_fn, self.targets = case.make(seed)
        self.named = {name: p.detach() for name, p in self.model.named_parameters()}
        self.flat = torch.cat([p.flatten() for p in self.named.values()])
        self.arguments = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def outputs(self, flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in self.named.values()])
        replaced = {n: part.reshape(p.shape) for (n, p), part in zip(self.named.items(), parts, strict=True)}
        return functional_call(self.model, replaced, self.arguments)

    def loss(self, flat: Tensor) -> Tensor:
        return self.loss_fn(self.outputs(flat), self.targets)

    def gradient(self, flat: Tensor) -> Tensor:
        variable = flat.clone().requires_grad_()
        return torch.autograd.grad(self.loss(variable), variable)[0]


def close(found: Tensor, truth: Tensor, tolerance: float) -> None:
    assert found.shape == truth.shape
    scale = max(float(truth.abs().max()), 1.0)
    assert float((found - truth).abs().max()) <= tolerance * scale


def test_enough_of_torch_is_covered() -> None:
    assert len(CASES) == len({case.name for case in CASES})
    assert len(CASES) >= 110
    assert set(REFUSED) < {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_first_derivatives_are_central_differences(case: Case) -> None:
    point = Point(case, seed=1)
    found = reference.jacobian(point.model, point.inputs)
    truth = central_differences(lambda w: reference.flatten_outputs(point.outputs(w)), point.flat)
    close(found, truth, FIRST)
    if case.kind == "loss" and case.name in REFUSED:
        return
    shares = reference.per_sample_gradients(point.model, point.loss_fn, (point.inputs, point.targets))
    found = torch.cat([share.sum(0).flatten() for share in shares.values()])
    close(found, central_differences(point.loss, point.flat), FIRST)
    close(found, point.gradient(point.flat), SECOND if case.name in IMPRECISE_IN_TORCH else 1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in REFUSED], ids=lambda case: case.name)
def test_second_derivatives_are_central_differences(case: Case) -> None:
    point = Point(case, seed=2)
    data = (point.inputs, point.targets)
    found = reference.hessian(point.model, point.loss_fn, data)
    close(found, central_differences(point.gradient, point.flat), SECOND)
    assert torch.equal(found, found.mT)

    split = [f(point.model, point.loss_fn, data) for f in (reference.gauss_newton, reference.residual)]
    close(split[0] + split[1], found, 1e-12)

    outputs = point.outputs(point.flat)

    def output_gradient(u: Tensor) -> Tensor:
        variable = u.clone().requires_grad_()
        return torch.autograd.grad(point.loss_fn(variable.reshape(outputs.shape), point.targets), variable)[0]

    found = reference.loss_hessian(point.loss_fn, outputs, point.targets)
    close(found, central_differences(output_gradient, outputs.flatten()), SECOND)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in REFUSED], ids=lambda case: case.name)
def test_a_missing_second_derivative_is_refused_by_name(case: Case) -> None:
    point = Point(case, seed=0)
    data = (point.inputs, point.targets)
    for refused in (reference.hessian, reference.gauss_newton):
        with pytest.raises((RuntimeError, NotImplementedError), match=REFUSED[case.name]):
            refused(point.model, point.loss_fn, data)


def test_the_hessian_of_the_network_is_a_central_difference_of_its_jacobian() -> None:
    for name in ("Tanh()", "LayerNorm", "LSTM", "weight_norm (parametrization)"):
        point = Point(next(c for c in CASES if c.name == name), seed=3)

        def jacobian(flat: Tensor, point: Point = point) -> Tensor:
            variable = flat.clone().requires_grad_()
            outputs = reference.flatten_outputs(point.outputs(variable))
            rows = [torch.autograd.grad(u, variable, retain_graph=True)[0] for u in outputs.flatten()]
            return torch.stack(rows).reshape(*outputs.shape, -1)

        found = reference.network_hessian(point.model, point.inputs)
        close(found, central_differences(jacobian, point.flat), SECOND)
        assert torch.equal(found, found.mT)
