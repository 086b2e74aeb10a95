"""Columns through a chain of dense layers and elementwise functions, a few samples at a time, in one call.

In small networks a step of the backward pass takes less than the call that runs it, and its results leave the cache
before the next step reads them. A chain, the graph of a multilayer perceptron, is known node by node from autograd's
graph (as ``nodes.py`` knows any graph of such nodes) and run by one helper of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .nodes import IN_PLACE, LEAF
from .ops.routing import takes_helpers
from .processor import chain_weights

_dense_chain = torch.ops.torch_curvature.dense_chain.default._op
_dense_chain_norms = torch.ops.torch_curvature.dense_chain_norms.default._op
Result = TypeVar("Result")
DENSE, SLOPE, POSITIVE, KEEP = range(4)  # kinds of steps as the helpers number them
UNKNOWN = -1


MOST_WEIGHTS, FEW_WEIGHTS = chain_weights()  # entries, where several columns go through a chain and where one does


class Link(NamedTuple):
    """A node of autograd's graph on the way from the outputs to the beginning.

    Attributes:
        kind: `DENSE`, `SLOPE` (an elementwise function), `POSITIVE` (a ReLU), or `UNKNOWN`: no part of a chain.
        before: the node before it, None at an input.
        weight, bias: what is behind a dense layer's parameters; None for nothing.
    """

    node: Any
    kind: int
    before: Any = None
    weight: Any = None
    bias: Any = None

    def slope(self, dtype: torch.dtype) -> Tensor:
        """Derivative of an elementwise function."""
        slope: Tensor = self.node(torch.ones(self.node._input_metadata[0].shape, dtype=dtype))
        return slope


class Chain(NamedTuple):
    """Steps from the outputs to the last edge.

    Attributes:
        operands, kinds: as the helper takes them.
        edges: index of the edge at each place that is kept.
    """

    operands: list[Tensor]
    kinds: list[int]
    edges: list[int]


def _is_parameter(node: Any) -> bool:
    """Whether nothing but a leaf, or its transpose, is behind this."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or node.name() == LEAF


def links(outputs: Tensor) -> Iterator[Link]:
    """The nodes behind ``outputs [N, F]``, up to an input or the first one that is no part of a chain."""
    node: Any = outputs.grad_fn if outputs.dim() == 2 and outputs.output_nr == 0 else None
    while node is not None:
        name, link = node.name(), Link(node, UNKNOWN)
        if name in IN_PLACE:
            link = Link(node, POSITIVE if name == "ReluBackward0" else SLOPE, node.next_functions[0][0])
        elif name == "AddmmBackward0" and node._saved_alpha == 1:
            (bias, _), (before, _), (weight, _) = node.next_functions
            link = Link(node, DENSE, before, weight, bias)
        elif name == "MmBackward0":
            (before, _), (weight, _) = node.next_functions
            link = Link(node, DENSE, before, weight)
        if link.kind == DENSE and not (_is_parameter(link.weight) and _is_parameter(link.bias)):
            link = Link(node, UNKNOWN)
        yield link
        node = link.before


def chain_between(outputs: Tensor, edges: Sequence[GradientEdge], most: int) -> Chain | None:
    """The chain that leads from ``outputs [N, F]`` to all edges; None where the graph is no such chain, or its weights
    have more than ``most`` entries."""
    wanted = {edge.node: index for index, edge in enumerate(edges) if edge.output_nr == 0}
    if not wanted or len(wanted) != len(edges):
        return None
    chain, entries = Chain([], [], []), 0
    for link in links(outputs):
        index = wanted.get(link.node)
        if index is not None:
            chain.kinds.append(KEEP)
            chain.edges.append(index)
            if len(chain.edges) == len(edges):
                return chain
        if link.kind == UNKNOWN:
            return None
        if link.kind == DENSE:
            if link.before is None:
                return None
            operand = link.node._saved_mat2.T
            entries += operand.numel()
            if entries > most:
                return None
        else:
            operand = link.node._saved_result if link.kind == POSITIVE else link.slope(outputs.dtype)
        chain.kinds.append(link.kind)
        chain.operands.append(operand)
    return None


def pull_back(
    outputs: Tensor, edges: Sequence[GradientEdge], columns: Tensor, roots: bool = False
) -> list[Tensor] | None:
    """``columns [V, N, F]`` pulled back to the edges, [V, N, O] each.

    Args:
        roots: ``sqrt(sum_v G[v]^2)`` [1, N, O] instead.

    Returns:
        None where it must be done otherwise: no chain, large layers, another device, a transform of ``torch.func``.
    """

    def run(chain: Chain) -> list[Tensor]:
        by_edge = dict(zip(chain.edges, _dense_chain(columns, chain.operands, chain.kinds, roots)))
        return [by_edge[index] for index in range(len(edges))]

    return _along(outputs, edges, columns, MOST_WEIGHTS if len(columns) > 1 else FEW_WEIGHTS, run)


def squared_norms(
    outputs: Tensor, edges: Sequence[GradientEdge], columns: Tensor, inputs: Sequence[Tensor | None], ones: list[int]
) -> Tensor | None:
    """``sum_k |G_k[v, n]|^2 (|a_k[n]|^2 + b_k)`` [V, N] over the edges k, from columns [V, N, F]; no G is written.

    Args:
        inputs: a_k [N, I] of the layer that ends at each edge; None for zero.
        ones: b_k, one for each bias there.

    Returns:
        None where :func:`pull_back` gives it for several columns.
    """

    def run(chain: Chain) -> Tensor:
        nothing = columns.new_empty(columns.shape[1], 0)
        given = [nothing if inputs[k] is None else inputs[k] for k in chain.edges]
        found: Tensor = _dense_chain_norms(columns, chain.operands, chain.kinds, given, [ones[k] for k in chain.edges])
        return found

    return _along(outputs, edges, columns, MOST_WEIGHTS, run)


def _along(
    outputs: Tensor, edges: Sequence[GradientEdge], columns: Tensor, most: int, run: Callable[[Chain], Result]
) -> Result | None:
    """What ``run`` makes of the chain with weights of at most so many entries; None where there is none."""
    try:
        with torch.no_grad():
            chain = chain_between(outputs, edges, most) if takes_helpers(columns) else None
            return None if chain is None else run(chain)
    except RuntimeError as error:  # what autograd saved cannot be had here (checkpointing), or dtypes differ
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
