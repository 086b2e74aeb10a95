"""Products ``J v`` and ``J^T u`` of a chain of dense layers and elementwise functions, in one call each.

As ``chains.py`` does it for columns: a few samples at a time, by helpers of the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chains import DENSE, MOST_WEIGHTS, POSITIVE, SLOPE, Link, links
from .nodes import LEAF
from .ops.routing import takes_helpers

_ahead = torch.ops.torch_curvature.dense_chain_ahead.default._op
_back = torch.ops.torch_curvature.dense_chain_back.default._op
_WEIGHT, _INPUT, _BIAS = 4, 8, 16


class Step(NamedTuple):
    """One step towards the beginning.

    Attributes:
        kind: as the helpers name it, without flags.
        operand: the weight [I, O] of a dense layer where there is something before it, slopes or result of others.
        input: [N, I] of a dense layer whose weight is a parameter.
        weight, transposed: that parameter, and whether it is stored as [O, I].
        bias: the parameter that is added.
    """

    kind: int
    operand: Tensor | None
    input: Tensor | None = None
    weight: nn.Parameter | None = None
    transposed: bool = False
    bias: nn.Parameter | None = None


class ProductChain(NamedTuple):
    """The steps from the outputs to the first layer with a parameter."""

    samples: int
    steps: list[Step]

    def ahead(self, tangents: dict[int, Tensor]) -> Tensor:
        """``J v`` [N, K], for tangents by the identity of the parameter."""
        operands: list[Tensor] = []
        kinds: list[int] = []
        for step in reversed(self.steps):
            kind = step.kind
            if kinds and step.operand is not None:
                operands.append(step.operand)
                kind += _WEIGHT * (kind == DENSE)
            if step.weight is not None and step.input is not None:
                tangent = tangents[id(step.weight)]
                operands += (step.input, tangent.T if step.transposed else tangent)
                kind += _INPUT
            if step.bias is not None:
                operands.append(tangents[id(step.bias)])
                kind += _BIAS
            kinds.append(kind)
        with torch.no_grad():
            product: Tensor = _ahead(operands, kinds, self.samples)
        return product

    def back(self, u: Tensor) -> dict[int, Tensor]:
        """``J^T u`` by the identity of the parameter, for u [N, K]."""
        operands: list[Tensor] = []
        kinds: list[int] = []
        kept: list[tuple[nn.Parameter, bool]] = []
        last = len(self.steps) - 1
        for place, step in enumerate(self.steps):
            kind = step.kind
            if step.operand is not None and (kind != DENSE or place < last):
                operands.append(step.operand.T if kind == DENSE else step.operand)
                kind += _WEIGHT * (kind == DENSE)
            if step.weight is not None and step.input is not None:
                operands.append(step.input)
                kept.append((step.weight, not step.transposed))
                kind += _INPUT
            if step.bias is not None:
                kept.append((step.bias, False))
                kind += _BIAS
            kinds.append(kind)
        with torch.no_grad():
            sums = _back(u, operands, kinds)
        return {id(p): total.T if turned else total for (p, turned), total in zip(kept, sums, strict=True)}


def _leaf(node: Any, wanted: set[int]) -> tuple[Any, bool]:
    """The leaf behind this node, None for none that is wanted, and whether it is transposed."""
    transposed = node is not None and node.name() == "TBackward0"
    if transposed:
        node = node.next_functions[0][0]
    leaf = None if node is None else node.variable
    return (leaf if id(leaf) in wanted else None), transposed


def _dense_step(link: Link, wanted: set[int]) -> Step | None:
    """A dense layer."""
    node = link.node
    (weight, transposed), (bias, turned) = _leaf(link.weight, wanted), _leaf(link.bias, wanted)
    added = node.name() == "AddmmBackward0"
    if turned or (added and node._saved_beta != 1):
        return None
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != node._input_metadata[0].shape[1]):
        return None  # it is broadcast
    operand = None if _is_input(link.before) else node._saved_mat2
    input = None if weight is None else node._saved_mat1 if added else node._saved_self
    return Step(DENSE, operand, input, weight, transposed, bias)


def _is_input(node: Any) -> bool:
    return node is None or node.name() == LEAF


def _steps(outputs: Tensor, wanted: set[int]) -> list[Step] | None:
    steps: list[Step] = []
    entries = 0
    for link in links(outputs):
        if link.kind == DENSE:
            step = _dense_step(link, wanted)
        elif link.kind == POSITIVE:
            step = Step(POSITIVE, link.node._saved_result)
        else:
            step = Step(SLOPE, link.slope(outputs.dtype)) if link.kind == SLOPE else None
        if step is None:
            return None
        steps.append(step)
        entries += 0 if step.weight is None else step.weight.numel()
        if entries > MOST_WEIGHTS:
            return None
        if link.kind == DENSE and _is_input(link.before):
            break
    return steps


def product_chain(outputs: Tensor, parameters: dict[str, nn.Parameter]) -> ProductChain | None:
    """The chain that ``outputs [N, K]`` are at the end of; None where they are not, or it is done better otherwise."""
    if not takes_helpers(outputs.detach()):
        return None
    try:
        with torch.no_grad():
            steps = _steps(outputs, {id(p) for p in parameters.values()})
    except RuntimeError as error:  # what autograd saved cannot be had here (checkpointing)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    while steps and steps[-1].weight is None and steps[-1].bias is None:
        steps.pop()
    seen = [id(p) for step in steps or () for p in (step.weight, step.bias) if p is not None]
    if not steps or len(seen) != len(set(seen)):
        return None
    return ProductChain(outputs.shape[0], steps)
