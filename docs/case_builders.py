"""How a layer, activation or loss of torch becomes a scalar function of parameters, to try derivatives on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Composed(nn.Module):
    """A linear map, so that there are parameters before the function, and then the function under test."""

    def __init__(self, function: Callable[[Tensor], Tensor], features: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(3, features)
        self.function = function
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x).reshape(x.shape[0], *self.shape))


class Call(nn.Module):
    """A module called in its own way, for those that take or give more than a tensor."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


@dataclass(frozen=True)
class Case:
    """`make()` gives a float64 model, its inputs, and a loss of (outputs, targets) with targets."""

    name: str
    kind: str
    build: Callable[[], tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]]

    def make(self, seed: int = 0) -> tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]:
        """The same for the same seed; float64; in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.name} {seed}".encode()))
            previous = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                model, inputs, loss_fn, targets = self.build()
            finally:
                torch.set_default_dtype(previous)
        return model.eval(), inputs, loss_fn, targets


CASES: list[Case] = []


def curved(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss with a gradient and a Hessian everywhere: `sum (u - y)^2 / 2 + sum sin(u + y)`."""
    return (outputs - targets).square().sum() / 2 + (outputs + targets).sin().sum()


def function(name: str, kind: str, call: Callable[[Tensor], Tensor], *shape: int) -> None:
    """A function of a `[2, *shape]` tensor that a linear map gives."""

    def build() -> tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]:
        model = Composed(call, int(torch.tensor(shape).prod()), shape)
        inputs = torch.randn(2, 3)
        return model, inputs, curved, torch.randn_like(model(inputs).detach())

    CASES.append(Case(name, kind, build))


def layer(name: str, make: Callable[[], nn.Module], *shape: int, call: Any = None) -> None:
    """A layer with parameters on a `[2, *shape]` input that a linear map gives."""

    def build() -> tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]:
        module = make()
        for parameter in module.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        called = module if call is None else Call(module, call)
        model = Composed(called, int(torch.tensor(shape).prod()), shape).eval()
        inputs = torch.randn(2, 3)
        return model, inputs, curved, torch.randn_like(model(inputs).detach())

    CASES.append(Case(name, "layer", build))


def lookup(name: str, make: Callable[[], nn.Module], inputs: Callable[[], Any]) -> None:
    """A layer with integer inputs."""

    def build() -> tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]:
        model, given = make(), inputs()
        outputs = model(*given) if isinstance(given, tuple) else model(given)
        return model, given, curved, torch.randn_like(outputs.detach())

    CASES.append(Case(name, "layer", build))


def loss(
    name: str,
    loss_fn: Callable[[Tensor, Any], Tensor],
    targets: Callable[[], Any],
    *shape: int,
    transfer: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """A loss of the `[3, *shape]` outputs of a small network."""

    def build() -> tuple[nn.Module, Any, Callable[[Tensor, Any], Tensor], Any]:
        model = Composed(transfer or nn.Identity(), int(torch.tensor(shape).prod()), shape)
        return model, torch.randn(3, 3), loss_fn, targets()

    CASES.append(Case(name, "loss", build))
