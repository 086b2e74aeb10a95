"""Derivatives of many columns through autograd's own graph, where it consists of nodes that are known here.

Batching and dispatching a backward pass (``is_grads_batched``) costs small networks more than their arithmetic, and
larger ones a loop over columns wherever autograd has no batched formula.  Nodes are linear in what arrives: with the
tensors that autograd saved each is one operation on all columns ``[V, N, *features]`` backwards, and on a tangent
forwards.  A graph with any other node on the way is left to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from . import rearranging, sequences, spatial
from .dense_products import mostly_large, product, takes_one_dnn
from .node_kinds import Kind, alike, input_shape, only_ahead, output_shape, scaled
from .rearranging import PARTS, REARRANGING, SEVERAL_OUTPUTS
from .sequences import SEQUENCES


def _fits(value: Tensor, node: Any, lead: int, output: int = 0) -> bool:
    """Whether this can be a derivative of the node's output: not so where it was converted."""
    meta = node._input_metadata[output]
    return value.shape[lead:] == torch.Size(meta.shape) and value.dtype == meta.dtype


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def _product_back(G: Tensor, mat2: Tensor) -> Tensor:
    return product(G.reshape(-1, G.shape[-1]), mat2.T).view(*G.shape[:-1], -1)


def _product_ahead(mat1: Any, mat2: Any, d1: Tensor | None, d2: Tensor | None) -> Tensor | None:
    """Tangent of a product; a factor is asked for only where the other one has a tangent (else it is not saved)."""
    tangent = None if d2 is None else product(mat1(), d2)
    return tangent if d1 is None else product(d1, mat2(), tangent)


def _addmm_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    if input == 0:  # broadcast along the rows, if at all
        summed = G.sum(1) if len(input_shape(node, 0)) == 1 else G
        return scaled(summed, node._saved_beta)
    factor = torch.matmul(node._saved_mat1.T, G) if input == 2 else _product_back(G, node._saved_mat2)
    return scaled(factor, node._saved_alpha)


def _addmm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    d0, d1, d2 = tangents
    product = _product_ahead(lambda: node._saved_mat1, lambda: node._saved_mat2, d1, d2)
    if product is not None:
        product = scaled(product, node._saved_alpha)
    if d0 is None:
        return product
    d0 = scaled(d0, node._saved_beta)
    return d0.expand(output_shape(node)) if product is None else product.add_(d0)


def _mm_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    return _product_back(G, node._saved_mat2) if input == 0 else torch.matmul(node._saved_self.T, G)


def _mm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    return _product_ahead(lambda: node._saved_self, lambda: node._saved_mat2, *tangents)


def _relu(node: Any, G: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.threshold_backward(G, spatial.saved_like(node, "_saved_result", G), 0)
    return found


def _slope(node: Any, G: Tensor) -> Tensor:
    """Derivative of an elementwise function: what autograd's own formula makes of ones."""
    slope: Tensor = node(torch.ones(output_shape(node), dtype=G.dtype, device=G.device))
    return slope


def _elementwise(node: Any, G: Tensor) -> Tensor:
    found: Tensor = node(G[0]).unsqueeze(0) if len(G) == 1 else G * _slope(node, G)
    return found


def _elementwise_in_place(node: Any, G: Tensor) -> Tensor:
    return _elementwise(node, G) if len(G) == 1 else G.mul_(_slope(node, G))


def _elementwise_ahead(node: Any, x: Tensor) -> Tensor:
    found: Tensor = node(x)
    return found


_SMOOTH = (
    *("Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "LeakyRelu", "Softplus", "Hardtanh", "Hardswish", "Mish"),
    *("LogSigmoid", "Sin", "Cos", "Exp"),
)
_ELEMENTWISE = Kind(lambda node, G, input: _elementwise(node, G), only_ahead(_elementwise_ahead))
_OTHERS = ("Pow", "Sqrt", "Rsqrt", "Abs", "Log", "Erf")


SPATIAL = {
    "CloneBackward0": alike(lambda node, x: x),  # of images that are brought into another memory format
    "ConvolutionBackward0": Kind(spatial.convolution_back, spatial.convolution_ahead),
    "AvgPool2DBackward0": Kind(spatial.average_back, spatial.average_ahead),
    "AdaptiveAvgPool2DBackward0": Kind(spatial.adaptive_average_back, spatial.adaptive_average_ahead),
    "MaxPool2DWithIndicesBackward0": Kind(spatial.largest_back, spatial.largest_ahead),
    "ConstantPadNdBackward0": Kind(spatial.padding_back, spatial.padding_ahead),
    "NativeBatchNormBackward0": Kind(spatial.normalisation_back, spatial.normalisation_ahead),
    "MeanBackward1": Kind(spatial.mean_back, spatial.mean_ahead),
}

KINDS: dict[str, Kind] = {
    "AddmmBackward0": Kind(_addmm_back, _addmm_ahead),
    "MmBackward0": Kind(_mm_back, _mm_ahead),
    "ReluBackward0": alike(_relu),
    **{f"{name}Backward0": _ELEMENTWISE for name in (*_SMOOTH, *_OTHERS)},
    **REARRANGING,
    **SEQUENCES,
    **SPATIAL,
}
# Elementwise kinds where what arrives is needed nowhere else: fewer fresh pages, which cost more than the arithmetic.
IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ReluBackward0": spatial.relu_in_place,
    **{f"{name}Backward0": _elementwise_in_place for name in _SMOOTH},
}
OVERWRITING: dict[str, Callable[[Any, Tensor, int], Tensor]] = {**rearranging.IN_PLACE, **sequences.IN_PLACE}
# One column passes these faster in autograd's own engine, which lets go of what it has passed (but where most of the
# products between are large, and go a faster way here); and so do several whose derivatives at the edges have fewer
# entries than this on average: then nodes cost what Python takes for each of them.
FEW_ENTRIES = 1 << 15
FOR_SEVERAL = SEQUENCES.keys() | REARRANGING.keys() - {
    *("AddBackward0", "TBackward0", "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
}
LEAF = "torch::autograd::AccumulateGrad"


def _or_else_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """None where what autograd saved cannot be had outside of its own passes (activation checkpointing)."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        try:
            with torch.no_grad():
                return function(*args)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None

    return guarded


def graph_behind(outputs: Tensor, refused: Callable[[str], bool] = lambda name: False) -> list[Any]:
    """All nodes behind ``outputs``, each after those it was computed from; none where there is no graph, or a node of a
    name that is refused."""
    if outputs.grad_fn is None or outputs.output_nr != 0:
        return []
    found: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(outputs.grad_fn, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            found.append(node)
        elif node not in seen:
            if refused(node.name()):
                return []
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
    return found


def known_graph(outputs: Tensor) -> list[Any] | None:
    """As :func:`graph_behind`; None where one of the nodes is not known, or there is none."""
    return graph_behind(outputs, lambda name: name not in KINDS and name != LEAF) or None


@_or_else_none
def pull_back(outputs: Tensor, edges: Sequence[GradientEdge], columns: Tensor) -> list[Tensor | None] | None:
    """``columns [V, *outputs]`` pulled back to the edges, [V, *z] each (None: the outputs do not depend on it).

    Returns:
        None where autograd must do it.
    """
    targets = {edge.node for edge in edges}
    entries = sum(output_shape(node).numel() for node in targets)
    alone = len(columns) == 1
    small = (alone and not takes_one_dnn(columns)) or len(columns) * entries < FEW_ENTRIES * len(targets)
    nodes = graph_behind(outputs, FOR_SEVERAL.__contains__) if small else graph_behind(outputs)
    if not nodes or any(edge.output_nr != 0 for edge in edges):
        return None
    if alone and not small and any(node.name() in FOR_SEVERAL for node in nodes) and not mostly_large(nodes):
        return None
    ways: dict[Any, list[int]] = {}  # inputs of nodes that lead to an edge; only these need be known
    for node in nodes:
        inputs = [i for i, (child, _) in enumerate(node.next_functions) if child in ways]
        if inputs and node.name() not in KINDS:
            return None
        if inputs or node in targets:
            ways[node] = inputs
    arrived = Arrived(outputs.grad_fn, columns)
    for node in reversed(nodes):
        inputs, name = ways.get(node, []), node.name()
        if not inputs or not arrived.at(node):
            continue
        several = name in SEVERAL_OUTPUTS
        G: Any = arrived.all_of(node) if several else arrived.alone(node)
        last_use = not several and len(inputs) == 1 and node not in targets and arrived.is_fresh(node)
        for input in inputs:
            child, output = node.next_functions[input]
            if name in PARTS and arrived.is_fresh(child, output):
                PARTS[name](node, arrived.value(child, output), 1).add_(G)
                continue
            if last_use and name in IN_PLACE:
                part: Tensor | None = IN_PLACE[name](node, G)
            elif last_use and name in OVERWRITING:
                part = OVERWRITING[name](node, G, input)
            else:
                part = KINDS[name].back(node, G, input)
            if part is None or not _fits(part, child, 1, output):
                return None
            arrived.add(child, output, part, last_use or several or not _shares_memory(part, G))
        if node not in targets:
            arrived.forget(node)
    return [arrived.alone(edge.node) if arrived.at(edge.node) else None for edge in edges]


class Arrived:
    """What has arrived at the outputs of nodes, and whether nobody else has it."""

    def __init__(self, node: Any, columns: Tensor) -> None:
        self._values: dict[Any, dict[int, Tensor]] = {node: {0: columns}}
        self._fresh: set[tuple[Any, int]] = set()

    def at(self, node: Any) -> bool:
        return node in self._values

    def value(self, node: Any, output: int) -> Tensor:
        return self._values[node][output]

    def alone(self, node: Any) -> Tensor:
        """Of a node of one output."""
        values = self._values[node]
        if values.keys() != {0}:
            raise RuntimeError("left to autograd: an output beside the first")
        return values[0]

    def all_of(self, node: Any) -> list[Tensor | None]:
        values = self._values[node]
        return [values.get(output) for output in range(len(node._input_metadata))]

    def is_fresh(self, node: Any, output: int = 0) -> bool:
        return (node, output) in self._fresh

    def add(self, node: Any, output: int, part: Tensor, fresh: bool) -> None:
        values, place = self._values.setdefault(node, {}), (node, output)
        if output not in values:
            values[output] = part
        elif place in self._fresh:
            values[output].add_(part)
            return
        elif fresh:
            values[output] = part.add_(values[output])
        else:
            values[output], fresh = values[output] + part, True
        if fresh:
            self._fresh.add(place)

    def forget(self, node: Any) -> None:
        del self._values[node]


@_or_else_none
def push_forward(outputs: Tensor, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]) -> Tensor | None:
    """The tangent of ``outputs`` for tangents of the parameters; None where forward mode must do it."""
    nodes = known_graph(outputs)
    if nodes is None:
        return None
    given = {id(p): tangents[name].reshape(p.shape).to(p.dtype) for name, p in parameters.items()}
    found: dict[Any, Any] = {}
    for node in nodes:
        name = node.name()
        if name == LEAF:
            found[node] = given.get(id(node.variable))
            continue
        inputs = [None if child is None else _output_of(found[child], output) for child, output in node.next_functions]
        tangent = found[node] = KINDS[name].ahead(node, inputs)
        for output, part in enumerate(tangent if isinstance(tangent, list) else [tangent]):
            if part is not None and not _fits(part, node, 0, output):
                return None
    tangent = found[outputs.grad_fn]
    return torch.zeros_like(outputs) if tangent is None else tangent


def _output_of(tangent: Any, output: int) -> Tensor | None:
    found: Tensor | None = tangent[output] if isinstance(tangent, list) else tangent
    if tangent is not None and not isinstance(tangent, list) and output != 0:
        raise RuntimeError("left to forward mode: an output beside the first")
    return found
