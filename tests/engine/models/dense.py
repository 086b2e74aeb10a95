"""Dense layers, matrix products and elementwise parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Function, case, features, parameter


@case("mlp", features(4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))


@case("mlp without bias, relu in place", features(4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False))


@case("single layer", features(4))
def _() -> nn.Module:
    return nn.Linear(4, 3)


@case("sequence of dense layers", features(3, 4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3))


@case("sequence of dense layers changed in place", features(3, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.one(x), inplace=True)
        return m.three(m.two(x).mul_(2).add_(x[..., :2]).flatten(1))

    return Function(run, one=nn.Linear(4, 5), two=nn.Linear(5, 2), three=nn.Linear(6, 3))


@case("bilinear", lambda N: (torch.randn(N, 3), torch.randn(N, 2)))
def _() -> nn.Module:
    return Function(
        lambda m, x, y: m.last(torch.tanh(m.form(x, y)) + torch.bilinear(x, y, m.weight, None)),
        form=nn.Bilinear(3, 2, 4),
        weight=parameter(4, 3, 2),
        last=nn.Linear(4, 3),
    )


@case("matrix products with parameters", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x @ m.one)
        x = torch.tanh(torch.matmul(x, m.two) + m.shift)
        x = torch.tanh(torch.mm(x, m.three)) + x.mm(m.four)
        x = torch.addmm(m.offset, x.matmul(m.five), m.six)
        return torch.addmm(x, x, m.seven)

    shapes = {"one": (4, 3), "two": (3, 4), "three": (4, 4), "four": (4, 4), "five": (4, 3), "six": (3, 3)}
    parts = {name: parameter(*shape) for name, shape in shapes.items()}
    return Function(run, **parts, seven=parameter(3, 3), shift=parameter(4), offset=parameter(3))


@case("functional calls", features(2, 5))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.conv1d(x, m.kernel, padding=1)
        x = F.linear(F.silu(x).flatten(1), weight=m.weight, bias=m.bias)
        return F.linear(input=torch.tanh(x), weight=m.last)

    return Function(run, kernel=parameter(3, 2, 3), weight=parameter(4, 15), bias=parameter(4), last=parameter(3, 4))


@case("elementwise parameters", features(2, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x * m.scale + m.shift) * m.gain
        x = torch.mul(m.rows, x).add(m.columns) + 1.0
        x = torch.add(x, m.both).mul(m.last)
        x = m.left + x * torch.sigmoid(x)
        x = m.right * x
        return F.prelu(torch.prelu(x, m.slope), m.slopes).flatten(1)[:, :5]

    return Function(
        run,
        scale=parameter(4),
        shift=parameter(1, 2, 1),
        gain=parameter(1),
        rows=parameter(2, 1),
        columns=parameter(4),
        both=parameter(1, 2, 4),
        last=nn.Parameter(torch.randn(())),
        left=parameter(4),
        right=parameter(2, 4),
        slope=parameter(1),
        slopes=parameter(2),
    )
