"""What has no derivative per sample, no scalar loss or no right Hessian is refused, and the message says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_curvature import reference


class MixesSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient.detach()  # so that its own derivative misses a term


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WrongBackward.apply(x[:, :1]) * x[:, 1:]


class Total(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sum()


X = torch.randn(4, 3, dtype=torch.float64)
REFUSED = {
    "batch statistics": (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), X, ValueError, r"1 \(BatchNorm1d\).*eval"),
    "no running statistics": (
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(),
        X,
        ValueError,
        "BatchNorm1d",
    ),
    "dropout": (nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)), X, ValueError, "differ between two runs"),
    "samples that mix": (MixesSamples(), X, ValueError, "sample 0 change with the inputs of other samples"),
    "not a number": (nn.Linear(3, 2), X * float("nan"), ValueError, "NaN"),
    "tuple of outputs": (nn.LSTM(3, 2, batch_first=True), X[:, None], TypeError, "returned tuple"),
    "a list of inputs": (nn.Linear(3, 2), [X], TypeError, "inputs must be"),
    "frozen": (nn.Linear(3, 2).requires_grad_(False), X, ValueError, "no parameter"),
    "lazy": (nn.LazyLinear(2), X, ValueError, "not initialised"),
    "scalar output": (Total(), X, ValueError, "returned a scalar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_derivative_per_sample_are_refused(name: str) -> None:
    model, inputs, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        reference.jacobian(model.double() if name != "lazy" else model, inputs)


def test_a_loss_that_is_no_scalar_is_refused_with_its_shape() -> None:
    data = (X, torch.zeros(4, 2))
    for function in (reference.hessian, reference.gauss_newton, reference.per_sample_gradients):
        with pytest.raises(ValueError, match=r"scalar.*\(4, 2\)"):
            function(nn.Linear(3, 2), nn.MSELoss(reduction="none"), data)
    with pytest.raises(TypeError, match=r"one batch \(inputs, targets\)"):
        reference.hessian(nn.Linear(3, 2), nn.MSELoss(), X)  # type: ignore[arg-type]


def test_a_hessian_that_is_not_symmetric_is_refused_by_the_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 2), Wrong())
    with pytest.raises(RuntimeError, match=r"not symmetric.*'0\.(weight|bias)'"):
        reference.hessian(model, nn.MSELoss(), (X, torch.zeros(4, 1)))
    with pytest.raises(RuntimeError, match="not symmetric"):
        reference.function_hessian(lambda u: Wrong()(u[None]).sum(), torch.randn(2))
