"""Shared, frozen, unused, reparametrised and unusual parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .case import Function, case, features, parameter


@case("one layer used three times", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(m.again(x))
        return m.last(x)

    return Function(run, again=nn.Linear(4, 4), last=nn.Linear(4, 3))


@case("autoencoder with a transposed weight", features(4))
def _() -> nn.Module:
    return Function(
        lambda m, x: F.linear(torch.tanh(m.code(x)), m.code.weight.t(), m.bias), code=nn.Linear(4, 2), bias=parameter(4)
    )


@case("rows of one weight", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        gate, value = m.weight.chunk(2)
        return m.last(torch.sigmoid(F.linear(x, gate, m.bias[:3])) * F.linear(x, value, m.bias[3:]))

    return Function(run, weight=parameter(6, 4), bias=parameter(6), last=nn.Linear(3, 3))


@case("frozen parts", features(4))
def _() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


@case("unused parameter", features(4), unused=("extra",))
def _() -> nn.Module:
    return Function(lambda m, x: m.last(torch.tanh(x)), extra=parameter(3), last=nn.Linear(4, 3))


@case(
    "weight normalisation",
    features(4),
    fallback=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
)
def _() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


@case("spectral normalisation", features(4), fallback=("0.parametrizations.weight.original",))
def _() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).eval()


@case("weights made of a parameter", features(4), fallback=("code", "low", "high", "power"))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.linear(x, torch.outer(m.code, m.code.cos())) + F.linear(x, m.low @ m.high)
        return m.last(torch.tanh(x).abs() ** m.power)

    return Function(
        run,
        code=parameter(4),
        low=parameter(4, 2),
        high=parameter(2, 4),
        power=nn.Parameter(torch.ones(4) * 2),
        last=nn.Linear(4, 3),
    )


@case("branches", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = torch.tanh(m.left(x)), torch.sigmoid(m.right(x))
        return m.last(left * right + left) + m.side(right)

    return Function(
        run, left=nn.Linear(4, 3), right=nn.Linear(4, 3), last=nn.Linear(3, 3), side=nn.Linear(3, 3, bias=False)
    )


class ScaledLinear(nn.Module):
    """A user's own layer, ``z = exp(1) x W``; its rule is registered by the tests."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = parameter(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,io->no", x, self.weight) * torch.e


@case("a user's own layer", features(4))
def _() -> nn.Module:
    return nn.Sequential(ScaledLinear(4, 4), nn.Tanh(), nn.Linear(4, 3))
