"""Products ``J v`` and ``J^T u`` of a chain of dense layers and elementwise functions, in one call each.

As ``chains.py`` does it for columns: a few samples at a time, by helpers of the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chains import MOST_WEIGHTS
from .nodes import IN_PLACE, LEAF
from .ops.routing import takes_helpers

_ahead = torch.ops.torch_curvature.dense_chain_ahead.default._op
_back = torch.ops.torch_curvature.dense_chain_back.default._op
_DENSE, _SLOPE, _POSITIVE = range(3)
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
                kind += _WEIGHT * (kind == _DENSE)
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
            if step.operand is not None and (kind != _DENSE or place < last):
                operands.append(step.operand.T if kind == _DENSE else step.operand)
                kind += _WEIGHT * (kind == _DENSE)
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


def _parameter(node: Any) -> tuple[Any, bool] | None:
    """The leaf behind this node and whether it is transposed, (None, False) for none; None where more is behind it."""
    transposed = node is not None and node.name() == "TBackward0"
    if transposed:
        node = node.next_functions[0][0]
    if node is None:
        return None, False
    return (node.variable, transposed) if node.name() == LEAF else None


def _dense_step(node: Any, name: str, wanted: set[int]) -> tuple[Step, Any] | None:
    """A dense layer and the node before it."""
    bias: Any = None
    if name == "AddmmBackward0":
        (bias, _), (before, _), (factor, _) = node.next_functions
        if node._saved_alpha != 1 or node._saved_beta != 1:
            return None
    else:
        (before, _), (factor, _) = node.next_functions
    of_weight, of_bias = _parameter(factor), _parameter(bias)
    if of_weight is None or of_bias is None or of_bias[1]:
        return None
    (weight, transposed), (added, _) = of_weight, of_bias
    if weight is not None and id(weight) not in wanted:
        weight = None
    if added is not None and id(added) not in wanted:
        added = None
    if added is not None and (added.dim() != 1 or added.shape[0] != node._input_metadata[0].shape[1]):
        return None  # it is broadcast
    if before is not None and before.name() == LEAF:
        before = None  # an input
    operand = None if before is None else node._saved_mat2
    input = None if weight is None else node._saved_mat1 if name == "AddmmBackward0" else node._saved_self
    return Step(_DENSE, operand, input, weight, transposed, added), before


def product_chain(outputs: Tensor, parameters: dict[str, nn.Parameter]) -> ProductChain | None:
    """The chain that ``outputs [N, K]`` are at the end of; None where they are not, or it is done better otherwise."""
    if outputs.dim() != 2 or outputs.output_nr != 0 or not takes_helpers(outputs.detach()):
        return None
    wanted = {id(p) for p in parameters.values()}
    steps: list[Step] = []
    seen: list[int] = []
    entries = 0
    node: Any = outputs.grad_fn
    try:
        with torch.no_grad():
            while node is not None:
                name = node.name()
                if name == "ReluBackward0":
                    steps.append(Step(_POSITIVE, node._saved_result))
                    node = node.next_functions[0][0]
                elif name in IN_PLACE:
                    slope = node(torch.ones(node._input_metadata[0].shape, dtype=outputs.dtype))
                    steps.append(Step(_SLOPE, slope))
                    node = node.next_functions[0][0]
                elif name in ("AddmmBackward0", "MmBackward0"):
                    found = _dense_step(node, name, wanted)
                    if found is None:
                        return None
                    step, node = found
                    steps.append(step)
                    seen += [id(p) for p in (step.weight, step.bias) if p is not None]
                    entries += 0 if step.weight is None else step.weight.numel()
                    if entries > MOST_WEIGHTS:
                        return None
                else:
                    return None
    except RuntimeError as error:  # what autograd saved cannot be had here (checkpointing)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None
    while steps and steps[-1].weight is None and steps[-1].bias is None:
        steps.pop()
    if not steps or len(seen) != len(set(seen)):
        return None
    return ProductChain(outputs.shape[0], steps)
