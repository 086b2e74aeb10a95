"""Second derivatives pushed through a chain of dense layers and elementwise functions, in one call.

As ``second_nodes.py`` does it for any graph of known nodes, with the nodes and formulas that are known there: a few
samples at a time, by a helper of the CPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chains import DENSE, KEEP, MOST_WEIGHTS, POSITIVE, SLOPE, UNKNOWN, Link, links
from .nodes import _or_else_none
from .ops.routing import takes_helpers
from .second_nodes import ELEMENTWISE, Pushed, cost

_hessians = torch.ops.torch_curvature.dense_chain_hessians.default._op
_INPUT, _TANH, _SIGMOID, _BENT = range(4, 8)
_BY_RESULT = {"TanhBackward0": _TANH, "SigmoidBackward0": _SIGMOID}


class Step(NamedTuple):
    """One step towards the beginning.

    Attributes:
        kind: as the helper names it.
        name: of the node.
        mark: the edge that is kept, or the uses whose input this is.
        operands: as the helper takes them.
        width: entries of what the step is given.
    """

    kind: int
    name: str
    mark: Any
    operands: tuple[Tensor, ...]
    width: int


class HessianChain:
    """Edge pushing through a chain, by :func:`hessian_chain`."""

    def __init__(self, samples: int, steps: list[Step], pairs: bool) -> None:
        self.samples, self.steps, self.pairs = samples, steps, pairs

    def signature(self) -> Hashable:
        """The same for chains of the same functions with the same layers."""
        return "chain", self.pairs, *((step.name, step.mark) for step in self.steps)

    def cost(self) -> tuple[float, float, float]:
        """As :func:`second_nodes.cost`."""
        steps = []
        kept = False
        for step in self.steps:
            if step.kind == KEEP:
                kept = True
            elif step.kind != _INPUT:
                steps.append((step.width, kept, [step.operands[0].shape[1]] if step.kind == DENSE else []))
                kept = False
        if kept:
            steps.append((self.steps[-1].width, True, []))
        return cost(steps, self.pairs, 1)

    @_or_else_none
    def push(self, slope: Tensor, start: Tensor | None) -> Pushed | None:
        """From dL/du [N, F] and d2L/du du [F, N, F] (None: without); None where it cannot be done."""
        operands = [operand for step in self.steps for operand in step.operands]
        kinds = [step.kind for step in self.steps]
        found = iter(_hessians(slope, start, operands, kinds, self.pairs))
        result, curved = Pushed(), start is not None
        columns: list[Any] = []  # edges and inputs before
        for step in self.steps:
            if step.kind == KEEP:
                edge = step.mark
                result.gradients[edge] = next(found).unsqueeze(0)
                if curved:
                    result.hessians[edge, edge] = next(found).permute(2, 0, 1)
                for mark in columns:
                    values = next(found)
                    values = values if values.dim() == 2 else values.permute(2, 0, 1)
                    if not isinstance(mark, tuple):
                        result.hessians[mark, edge] = values
                        continue
                    for use in mark:
                        result.inputs.setdefault(use, {})[edge] = values
                if curved and self.pairs:
                    columns.append(edge)
            elif step.kind == _INPUT:
                columns.append(step.mark)
            else:
                curved = curved or step.kind >= _TANH
        return result


def _operands(link: Link, dtype: torch.dtype) -> tuple[int, tuple[Tensor, ...]]:
    """Kind and operands of the step through a node."""
    if link.kind == DENSE:
        return DENSE, (link.node._saved_mat2.T,)
    if link.kind == POSITIVE:
        return POSITIVE, (link.node._saved_result,)
    name = link.node.name()
    if name in _BY_RESULT:
        return _BY_RESULT[name], (link.node._saved_result,)
    slope, bend = link.slope(dtype), ELEMENTWISE[name]
    return (SLOPE, (slope,)) if bend is None else (_BENT, (slope, bend(link.node, torch.ones_like(slope), slope)))


@_or_else_none
def hessian_chain(outputs: Tensor, edges: dict[int, Any], inputs: dict[int, Any], pairs: bool) -> HessianChain | None:
    """The chain that leads from ``outputs [N, F]`` to all edges; None where the graph is no such chain.

    Args:
        edges: {number: node} of layers' outputs.
        inputs: {number of a use: node} of layers' inputs.
        pairs: second derivatives by two layers' outputs too, not only by one.
    """
    if not takes_helpers(outputs.detach()) or len(set(edges.values())) != len(edges):
        return None
    wanted = {node: edge for edge, node in edges.items()}
    uses: dict[Any, tuple[int, ...]] = {}
    for use, node in inputs.items():
        uses[node] = (*uses.get(node, ()), use)
    steps: list[Step] = []
    entries = 0
    for link in links(outputs):
        width, edge = link.node._input_metadata[0].shape[-1], wanted.pop(link.node, None)
        if edge is not None:
            steps.append(Step(KEEP, "", edge, (), width))
            if not wanted:
                return HessianChain(outputs.shape[0], steps, pairs) if not uses else None
        if link.kind == UNKNOWN or (edge is not None and link.kind != DENSE) or link.before is None:
            return None
        kind, operands = _operands(link, outputs.dtype)
        steps.append(Step(kind, link.node.name(), None, operands, width))
        if kind == DENSE:
            entries += operands[0].numel()
            if entries > MOST_WEIGHTS:
                return None
            marked = uses.pop(link.before, None)
            if marked is not None and pairs:
                steps.append(Step(_INPUT, "", marked, (), operands[0].shape[1]))
    return None
