"""What a case of the list is, and what the cases are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """``build()`` gives the model, ``inputs(N)`` N samples; ``fallback`` names parameters without a closed rule."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    fallback: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    classes_axis: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def case(
    name: str, inputs: Callable[[int], Any], fallback: tuple[str, ...] = (), unused: tuple[str, ...] = ()
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[name] = Case(build, inputs, frozenset(fallback), frozenset(unused))
        return build

    return add


def features(*shape: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randn(N, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randint(0, vocabulary, (N, length))


class Function(nn.Module):
    """A forward pass written as a function of the module; ``parts`` are its submodules and parameters."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(*shape))
