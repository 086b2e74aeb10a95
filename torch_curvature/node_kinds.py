"""What is said of a node of autograd's graph: its shapes, and how derivatives pass it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kind(NamedTuple):
    """What is known of one kind of node.

    Attributes:
        back: (node, G [V, *output], which input) -> [V, *input]; None where this input is no function of z here.
        ahead: (node, tangents of the inputs, None for zero) -> tangent of the output.

    A node of several outputs is given a list of their G, None for zero, and gives a list of tangents.
    """

    back: Callable[[Any, Any, int], Tensor | None]
    ahead: Callable[[Any, list[Tensor | None]], Any]


def output_shape(node: Any) -> torch.Size:
    return torch.Size(node._input_metadata[0].shape)


def input_shape(node: Any, input: int) -> torch.Size:
    """Of what the node was given there, which some other node made."""
    before, output = node.next_functions[input]
    return torch.Size(before._input_metadata[output].shape)


def signed(number: int) -> int:
    """What torch holds as an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def axis_of(node: Any, axes: int, name: str = "_saved_dim") -> int:
    """An axis that a node saved, counted from the front."""
    return signed(getattr(node, name)) % max(1, axes)


def shared(G: Tensor, shape: Sequence[int]) -> Tensor:
    """Derivatives [V, *larger] by what was broadcast from ``shape``: sums over what it was repeated along."""
    lead = G.dim() - 1 - len(shape)
    axes = [*range(1, 1 + lead)]
    axes += [1 + lead + k for k, size in enumerate(shape) if size == 1 and G.shape[1 + lead + k] != 1]
    return (G.sum(axes, keepdim=True) if axes else G).reshape(G.shape[0], *shape)


def only_ahead(function: Callable[[Any, Tensor], Any]) -> Callable[[Any, list[Tensor | None]], Any]:
    """Of a node of one input that is linear in it."""
    return lambda node, tangents: None if tangents[0] is None else function(node, tangents[0])


def alike(function: Callable[[Any, Tensor], Any]) -> Kind:
    """The same forwards and backwards."""
    return Kind(lambda node, G, input: function(node, G), only_ahead(function))


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def total(terms: Sequence[Tensor]) -> Tensor | None:
    """None for no term."""
    return sum(terms[1:], start=terms[0]) if terms else None
