"""Second derivatives in activation space from first-order operations alone, where all nodes of the graph are known.

Edge pushing (Gower and Mello, Optimization Methods and Software 27, 2012) on whole layers.  Backwards through the
graph, a frontier of values is kept of which the loss is a function, with its second derivatives by pairs of them.
Replacing the value ``y = f(x)`` in the frontier by ``x``, for any other value or layer output w and with ``c = dL/dy``,

    d2L/dx dw = f'^T d2L/dy dw,      d2L/dx dx = f'^T d2L/dy dy f' + c . f''

so that a node is met by columns of first derivatives only; its second derivative enters as a diagonal, and only that of
elementwise functions.  It starts with the loss's own second derivative by the outputs (or with nothing: the residual).
Layer outputs that have been passed stay as columns, as do the inputs of layers, for ``d a / d z``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .node_columns import PRODUCTS, VIEWS, Back, Columns, Diagonal, dense, shape_and_dtype, turned
from .nodes import _or_else_none, known_graph

# What nodes make of a slope c that arrives: c f''(u), given c f'(u). None: zero almost everywhere.
Bend = Callable[[Any, Tensor, Tensor], Tensor] | None


def _by_autograd(node: Any, c: Tensor, moved: Tensor) -> Tensor:
    """What autograd's own formula gives."""
    with torch.enable_grad():
        moved = node(c)
        (bent,) = torch.autograd.grad(
            moved, GradientEdge(*node.next_functions[0]), torch.ones_like(moved), retain_graph=True
        )
    found: Tensor = bent
    return found


ELEMENTWISE: dict[str, Bend] = {
    **{f"{name}Backward0": None for name in ("Relu", "LeakyRelu", "Hardtanh")},
    **{
        f"{name}Backward0": _by_autograd
        for name in ("Gelu", "Silu", "Elu", "Softplus", "Hardswish", "Mish", "LogSigmoid", "Sin", "Cos", "Exp")
    },
    "TanhBackward0": lambda node, c, moved: (moved * node._saved_result).mul_(-2),
    "SigmoidBackward0": lambda node, c, moved: moved * (1 - 2 * node._saved_result),
}
LINEAR = (*PRODUCTS, *VIEWS, "AddBackward0")


@dataclass(slots=True)
class Pushed:
    """Derivatives of the loss in activation space.

    Attributes:
        gradients: {edge: [1, N, Z]}.
        hessians: {(edge, an earlier one or itself): [N, Z_edge, Z_other]}; left out where it vanishes identically.
        inputs: {use: {earlier edge: [N, I, Z]}}: the derivative of the layer's input; or, where it is diagonal, [N, Z].
    """

    gradients: dict[int, Tensor] = field(default_factory=dict)
    hessians: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    inputs: dict[int, dict[int, Tensor]] = field(default_factory=dict)


def whole(derivative: Tensor | None) -> Tensor | None:
    """A layer input's derivative [N, I, Z], whether only the diagonal [N, Z] is given or not."""
    return derivative if derivative is None or derivative.dim() == 3 else torch.diag_embed(derivative)


def cost(steps: Iterable[tuple[int, bool, Sequence[int]]], pairs: bool, live: int) -> tuple[float, float, float]:
    """(Multiply-adds of edge pushing, of second-order passes, largest memory in elements), per sample.

    Args:
        steps: from the outputs on, entries of a value, whether it is an edge, those of values that products lead to.
        live: values at once.
    """
    ours = products = held = 0.0
    Z = 0
    for width, edge, children in steps:
        Z += width * edge
        for child in children:
            products += width * child
            ours += width * child * (live * (width + child) + Z * pairs)
        held = max(held, 3.0 * live * width**2)
        if edge:
            held += width * (Z if pairs else width)
    return ours, 4.0 * Z * products, held


class Frontier:
    """Edge pushing through known nodes.

    Args:
        outputs: [N, *out] of the network.
        edges: {number: node} of layers' outputs.
        inputs: {number of a use: node} of layers' inputs.
        pairs: second derivatives by two layers' outputs too, not only by one.
    """

    def __init__(self, outputs: Tensor, edges: dict[int, Any], inputs: dict[int, Any], pairs: bool) -> None:
        self.samples = outputs.shape[0]
        self.dtype = outputs.dtype
        self.pairs = pairs
        self.nodes = known_graph(outputs) or []
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.edges = {node: edge for edge, node in edges.items()}
        self.inputs: dict[Any, list[int]] = {}
        for use, node in inputs.items():
            self.inputs.setdefault(node, []).append(use)
        self.leading: set[Any] = set()  # nodes that are one of the edges, or lead to one
        for node in self.nodes:
            if node in self.edges or any(child in self.leading for child, _ in node.next_functions):
                self.leading.add(node)
        # By node y: dL/dy [1, N, Y]; d2L/dy dy [Y, N, Y]; d2L/dw dy [W, N, Y] by nodes w that are met later, by
        # outputs ("edge", number) that were met before; and d w/dy by inputs ("input", use) that were.
        self.slopes: dict[Any, Tensor] = {}
        self.own: dict[Any, Tensor] = {}
        self.between: dict[Any, dict[Any, Columns]] = {}
        self.kept: set[int] = set()  # memory that may have several readers
        self.found = Pushed()

    @property
    def applicable(self) -> bool:
        """All nodes and their shapes are such that rows of every value belong to one sample, in order."""
        named = {*self.edges, *self.inputs}
        if not self.nodes or not all(node in self.order for node in named) or len(self.edges) == 0:
            return False
        for node in self.leading:
            name, (shape, dtype) = node.name(), shape_and_dtype(node)
            if name not in ELEMENTWISE and name not in LINEAR:
                return False
            if dtype != self.dtype or not shape or shape[0] == 0 or shape[0] % self.samples:
                return False
        return True

    def signature(self) -> Hashable:
        """The same for graphs of the same nodes with the same connections and the same layers."""
        graph = tuple(
            (node.name(), tuple(self.order.get(child) for child, _ in node.next_functions)) for node in self.nodes
        )
        edges = tuple(sorted((edge, self.order[node]) for node, edge in self.edges.items()))
        inputs = tuple(sorted((self.order[node], *uses) for node, uses in self.inputs.items()))
        return graph, edges, inputs, self.pairs

    def widths(self) -> dict[Any, int]:
        """Entries per sample of every leading value."""
        return {node: shape_and_dtype(node)[0].numel() // self.samples for node in self.leading}

    def cost(self) -> tuple[float, float, float]:
        """As :func:`cost`."""
        width = self.widths()
        steps = []
        for node in reversed(self.nodes):
            if node in self.leading:
                children = [c for c, _ in node.next_functions if c in self.leading and node.name() in PRODUCTS]
                steps.append((width[node], node in self.edges, [width[child] for child in children]))
        live = 1 + sum(node.name() == "AddBackward0" for node in self.leading)  # values at once, at most
        return cost(steps, self.pairs, live)

    # ------------------------------------------------------------------ pushing

    @_or_else_none
    def push(self, slope: Tensor, start: Tensor | None) -> Pushed | None:
        """From dL/du [N, *out] and d2L/du du [C, N, *out] (None: without); None where it cannot be done."""
        root = self.nodes[-1]
        self.slopes[root] = slope.reshape(1, self.samples, -1)
        if start is not None:
            self.own[root] = start.reshape(start.shape[0], self.samples, -1)
        for node in reversed(self.nodes):
            if node not in self.leading or node not in self.slopes:
                continue
            self._meet(node)
            children = [(i, c) for i, (c, _) in enumerate(node.next_functions) if c in self.leading]
            if children and node.name() in ELEMENTWISE:
                self._bend(node, children[0][1])
            else:
                self._through(node, children)
            for kept in (self.slopes, self.own, self.between):
                kept.pop(node, None)
        return self.found

    def _meet(self, node: Any) -> None:
        """At a layer's input or output: results, and columns that stay."""
        columns = self.between.setdefault(node, {})
        for use in self.inputs.get(node, ()):
            columns["input", use] = Diagonal(torch.ones_like(self.slopes[node]))
        edge = self.edges.get(node)
        if edge is None:
            return
        self.found.gradients[edge] = self.slopes[node]
        self._keep(node)
        own = self.own.get(node)
        if own is not None:
            self.found.hessians[edge, edge] = own.transpose(0, 1)
        for w, value in list(columns.items()):
            if not isinstance(w, tuple):  # met later: columns by this output are there from now on
                if self.pairs:
                    self.between.setdefault(w, {})["edge", edge] = turned(dense(value))
            elif w[0] == "edge" and w[1] > edge:
                self.found.hessians[w[1], edge] = dense(value).transpose(0, 1)
            elif w[0] == "edge":  # branches are met in any order
                self.found.hessians[edge, w[1]] = dense(value).permute(1, 2, 0)
            else:
                self.found.inputs.setdefault(w[1], {})[edge] = dense(value).transpose(0, 1)
        if own is not None and self.pairs:
            columns["edge", edge] = own

    def _bend(self, node: Any, child: Any) -> None:
        """Through an elementwise function."""
        slope = self.slopes[node]
        ones = torch.ones(shape_and_dtype(node)[0], dtype=slope.dtype, device=slope.device)
        f = node(ones).view_as(slope)
        moved = slope * f
        bend = ELEMENTWISE[node.name()]
        bent = None
        if bend is not None:
            bent = bend(node, slope.view_as(ones), moved.view_as(ones)).reshape(slope.shape[1:])
        own, columns = self.own.get(node), self.between[node]
        half = None
        if own is not None:
            half = self._times(own, f)
            other = f[0].T.unsqueeze(-1)
            own = half * other if any(value is own for value in columns.values()) else half.mul_(other)
        if bent is not None:
            if own is None:
                own = slope.new_zeros(slope.shape[2], *slope.shape[1:])
            own.diagonal(dim1=0, dim2=2).add_(bent)
        self._arrive(child, moved, own)
        for w, value in columns.items():
            self._pair(child, w, half if half is not None and value is self.own[node] else self._times(value, f))

    def _times(self, value: Any, f: Tensor) -> Any:
        """``value * f``, in place where nobody else reads it."""
        if isinstance(value, Diagonal):
            return Diagonal(value.values * f)
        return value * f if value.data_ptr() in self.kept else value.mul_(f)

    def _keep(self, node: Any) -> None:
        """Leave the memory of this value's derivatives as it is."""
        values = [*self.between[node].values(), self.own.get(node)]
        self.kept.update(value.data_ptr() for value in values if isinstance(value, Tensor))

    def _through(self, node: Any, children: list[tuple[int, Any]]) -> None:
        """Through a linear node."""
        if node.name() not in PRODUCTS:
            self._keep(node)  # what comes out of it is the same memory
        own = self.own.get(node)
        halves: list[tuple[Any, Tensor]] = []  # d2L/dy dx for the inputs x so far
        for input, child in children:
            back = Back(node, input, child, self.samples)
            half = None
            self._arrive(child, back(self.slopes[node]), None)
            if own is not None:
                half = back(own)
                for other, first in halves:
                    self._pair(child, other, back(turned(first)))
                self._arrive(child, None, back(turned(half)))
                halves.append((child, half))
            for w, value in self.between[node].items():
                self._pair(child, w, half if half is not None and value is own else back(value))

    def _arrive(self, node: Any, slope: Tensor | None, own: Tensor | None) -> None:
        for kept, value in ((self.slopes, slope), (self.own, own)):
            if value is not None:
                kept[node] = kept[node] + value if node in kept else value

    def _pair(self, node: Any, w: Any, value: Any) -> None:
        """d2L/dw dy of a value y of the frontier and a w that stays, or another value of the frontier."""
        if w is node:
            value = dense(value)
            self._arrive(node, None, value + turned(value))
            return
        if not isinstance(w, tuple) and self.order[w] > self.order[node]:
            node, w, value = w, node, turned(dense(value))
        columns = self.between.setdefault(node, {})
        columns[w] = dense(columns[w]) + dense(value) if w in columns else value


def frontier(outputs: Tensor, edges: dict[int, Any], inputs: dict[int, Any], pairs: bool) -> Frontier | None:
    """The frontier at the outputs; None where nodes are not known."""
    made = Frontier(outputs, edges, inputs, pairs)
    return made if made.applicable else None
