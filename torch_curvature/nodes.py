"""Derivatives of many columns through autograd's own graph, where it consists of nodes that are known here.

Multilayer perceptrons are dense layers and elementwise functions, and small ones cost more in batching and dispatching
their backward pass (``is_grads_batched``) than in arithmetic.  Their nodes are few, and linear in what arrives: with
the tensors that autograd saved each is one operation on all columns ``[V, N, *features]`` backwards, and on a tangent
forwards.  A graph with any other node is left to autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from . import spatial


class Kind(NamedTuple):
    """What is known of one kind of node.

    Attributes:
        back: (node, G [V, *output], which input) -> [V, *input]; None where this input is no function of z here.
        ahead: (node, tangents of the inputs, None for zero) -> tangent of the output.
    """

    back: Callable[[Any, Tensor, int], Tensor | None]
    ahead: Callable[[Any, list[Tensor | None]], Tensor | None]


def _shape(node: Any) -> torch.Size:
    """Of the node's output."""
    return torch.Size(node._input_metadata[0].shape)


def _fits(value: Tensor, node: Any, lead: int) -> bool:
    """Whether this can be a derivative of the node's output: not so where it was broadcast, or converted."""
    return value.shape[lead:] == _shape(node) and value.dtype == node._input_metadata[0].dtype


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _product_back(G: Tensor, mat2: Tensor) -> Tensor:
    return torch.mm(G.reshape(-1, G.shape[-1]), mat2.T).view(*G.shape[:-1], -1)


def _product_ahead(mat1: Any, mat2: Any, d1: Tensor | None, d2: Tensor | None) -> Tensor | None:
    """Tangent of a product; a factor is asked for only where the other one has a tangent (else it is not saved)."""
    tangent = None if d2 is None else torch.mm(mat1(), d2)
    if d1 is None:
        return tangent
    return torch.mm(d1, mat2()) if tangent is None else tangent.addmm_(d1, mat2())


def _addmm_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    if input == 0:  # broadcast along the rows, if at all
        summed = G.sum(1) if len(_shape(node.next_functions[0][0])) == 1 else G
        return _scaled(summed, node._saved_beta)
    factor = torch.matmul(node._saved_mat1.T, G) if input == 2 else _product_back(G, node._saved_mat2)
    return _scaled(factor, node._saved_alpha)


def _addmm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    d0, d1, d2 = tangents
    product = _product_ahead(lambda: node._saved_mat1, lambda: node._saved_mat2, d1, d2)
    if product is not None:
        product = _scaled(product, node._saved_alpha)
    if d0 is None:
        return product
    d0 = _scaled(d0, node._saved_beta)
    return d0.expand(_shape(node)) if product is None else product.add_(d0)


def _mm_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    return _product_back(G, node._saved_mat2) if input == 0 else torch.matmul(node._saved_self.T, G)


def _mm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    return _product_ahead(lambda: node._saved_self, lambda: node._saved_mat2, *tangents)


def _relu(node: Any, G: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.threshold_backward(G, spatial.saved_like(node, "_saved_result", G), 0)
    return found


def _slope(node: Any, G: Tensor) -> Tensor:
    """Derivative of an elementwise function: what autograd's own formula makes of ones."""
    slope: Tensor = node(torch.ones(_shape(node), dtype=G.dtype, device=G.device))
    return slope


def _elementwise(node: Any, G: Tensor) -> Tensor:
    return G * _slope(node, G)


def _add_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    return _scaled(G, node._saved_alpha) if input == 1 else G


def _add_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    d0, d1 = tangents
    d1 = None if d1 is None else _scaled(d1, node._saved_alpha)
    total = d1 if d0 is None else d0 if d1 is None else d0 + d1
    return None if total is None else total.expand(_shape(node))


def _view_back(node: Any, G: Tensor, input: int) -> Tensor:
    return G.reshape(G.shape[0], *_shape(node.next_functions[0][0]))


def _view_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    return None if tangents[0] is None else tangents[0].reshape(_shape(node))


def _alike(function: Callable[[Any, Tensor], Tensor]) -> Kind:
    """The same forwards and backwards."""
    return Kind(
        lambda node, G, input: function(node, G),
        lambda node, tangents: None if tangents[0] is None else function(node, tangents[0]),
    )


_SMOOTH = (
    *("Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "LeakyRelu", "Softplus", "Hardtanh", "Hardswish", "Mish"),
    *("LogSigmoid", "Sin", "Cos", "Exp"),
)
_VIEW = Kind(_view_back, _view_ahead)
SPATIAL = {
    "CloneBackward0": _alike(lambda node, x: x),  # of images that are brought into another memory format
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
    "AddBackward0": Kind(_add_back, _add_ahead),
    "ReluBackward0": _alike(_relu),
    **{f"{name}Backward0": _alike(_elementwise) for name in _SMOOTH},
    "ViewBackward0": _VIEW,
    "UnsafeViewBackward0": _VIEW,
    "ReshapeAliasBackward0": _VIEW,
    "TBackward0": _alike(lambda node, x: x.mT),
    **SPATIAL,
}
# Elementwise kinds where what arrives is needed nowhere else: fewer fresh pages, which cost more than the arithmetic.
IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ReluBackward0": spatial.relu_in_place,
    **{f"{name}Backward0": lambda node, G: G.mul_(_slope(node, G)) for name in _SMOOTH},
}
LEAF = "torch::autograd::AccumulateGrad"


def _or_else_none(function: Callable[..., Any]) -> Callable[..., Any]:
    """None where what autograd saved cannot be had outside of its own passes (activation checkpointing)."""

    @functools.wraps(function)
    def guarded(*args: Any) -> Any:
        try:
            with torch.no_grad():
                return function(*args)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None

    return guarded


def known_graph(outputs: Tensor) -> list[Any] | None:
    """All nodes behind ``outputs``, each after those it was computed from; None where one of them is not known."""
    if outputs.grad_fn is None or outputs.output_nr != 0:
        return None
    found: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(outputs.grad_fn, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            found.append(node)
        elif node not in seen:
            seen.add(node)
            name = node.name()
            if name not in KINDS and name != LEAF:
                return None
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
    return found


@_or_else_none
def pull_back(outputs: Tensor, edges: Sequence[GradientEdge], columns: Tensor) -> list[Tensor | None] | None:
    """``columns [V, *outputs]`` pulled back to the edges, [V, *z] each (None: the outputs do not depend on it).

    Returns:
        None where autograd must do it.
    """
    nodes = known_graph(outputs)
    if nodes is None or any(edge.output_nr != 0 for edge in edges):
        return None
    targets = {edge.node for edge in edges}
    leading = set()  # nodes that are an edge, or lead to one
    for node in nodes:
        if node in targets or any(child in leading for child, _ in node.next_functions):
            leading.add(node)
    arrived: dict[Any, Tensor] = {outputs.grad_fn: columns}
    fresh = set()  # nodes at which has arrived what nobody else has
    for node in reversed(nodes):
        if node not in leading or node not in arrived:
            continue
        G, name, last_use = arrived[node], node.name(), node in fresh and node not in targets
        inputs = [(i, child) for i, (child, _) in enumerate(node.next_functions) if child in leading]
        for input, child in inputs:
            in_place = last_use and name in IN_PLACE
            part = IN_PLACE[name](node, G) if in_place else KINDS[name].back(node, G, input)
            if part is None or not _fits(part, child, 1):
                return None
            if child in arrived:
                part = arrived[child] + part
            if not _shares_memory(part, G) or (last_use and len(inputs) == 1):
                fresh.add(child)
            arrived[child] = part
        if node not in targets:
            del arrived[node]
    return [arrived.get(edge.node) for edge in edges]


@_or_else_none
def push_forward(outputs: Tensor, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]) -> Tensor | None:
    """The tangent of ``outputs`` for tangents of the parameters; None where forward mode must do it."""
    nodes = known_graph(outputs)
    if nodes is None:
        return None
    given = {id(p): tangents[name].reshape(p.shape).to(p.dtype) for name, p in parameters.items()}
    found: dict[Any, Tensor | None] = {}
    for node in nodes:
        if node.name() == LEAF:
            found[node] = given.get(id(node.variable))
        else:
            inputs = [None if child is None else found[child] for child, _ in node.next_functions]
            tangent = found[node] = KINDS[node.name()].ahead(node, inputs)
            if tangent is not None and not _fits(tangent, node, 0):
                return None
    tangent = found[outputs.grad_fn]
    return torch.zeros_like(outputs) if tangent is None else tangent
