"""Columns through a chain of dense layers and elementwise functions, a few samples at a time, in one call.

In small networks a step of the backward pass takes less than the call that runs it, and its results leave the cache
before the next step reads them. A chain, the graph of a multilayer perceptron, is known node by node from autograd's
graph (as ``nodes.py`` knows any graph of such nodes) and run by one helper of the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .nodes import IN_PLACE, LEAF
from .ops.routing import takes_helpers

_dense_chain = torch.ops.torch_curvature.dense_chain.default._op
_DENSE, _SLOPE, _POSITIVE, _KEEP = range(4)

# Entries of weights that stay in the second-level cache of one core (float32: half a MiB). Larger layers are worth a
# matrix product of their own.
MOST_WEIGHTS = 1 << 17


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


def chain_between(outputs: Tensor, edges: Sequence[GradientEdge]) -> Chain | None:
    """The chain that leads from ``outputs [N, F]`` to all edges; None where the graph is no such chain."""
    if outputs.dim() != 2 or outputs.output_nr != 0:
        return None
    wanted = {edge.node: index for index, edge in enumerate(edges) if edge.output_nr == 0}
    if not wanted or len(wanted) != len(edges):
        return None
    chain, entries = Chain([], [], []), 0
    node: Any = outputs.grad_fn
    while node is not None:
        index = wanted.get(node)
        if index is not None:
            chain.kinds.append(_KEEP)
            chain.edges.append(index)
            if len(chain.edges) == len(edges):
                return chain
        name = node.name()
        if name == "ReluBackward0":
            chain.kinds.append(_POSITIVE)
            chain.operands.append(node._saved_result)
            node = node.next_functions[0][0]
            continue
        if name in IN_PLACE:
            chain.kinds.append(_SLOPE)
            chain.operands.append(node(torch.ones(node._input_metadata[0].shape, dtype=outputs.dtype)))
            node = node.next_functions[0][0]
            continue
        if name == "AddmmBackward0":
            if node._saved_alpha != 1:
                return None
            (bias, _), (before, _), (weight, _) = node.next_functions
        elif name == "MmBackward0":
            bias, ((before, _), (weight, _)) = None, node.next_functions
        else:
            return None
        if before is None or not (_is_parameter(bias) and _is_parameter(weight)):
            return None
        operand = node._saved_mat2.T
        entries += operand.numel()
        if entries > MOST_WEIGHTS:
            return None
        chain.kinds.append(_DENSE)
        chain.operands.append(operand)
        node = before
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
    try:
        with torch.no_grad():
            if not takes_helpers(columns):
                return None
            chain = chain_between(outputs, edges)
            if chain is None:
                return None
            found = _dense_chain(columns, chain.operands, chain.kinds, roots)
    except RuntimeError as error:  # what autograd saved cannot be had here (checkpointing), or dtypes differ
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    by_edge = dict(zip(chain.edges, found))
    return [by_edge[index] for index in range(len(edges))]
