"""Uses of parameters in second derivatives: from a layer's output ``z`` through its rule, and on to its input ``a``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .chain_hessians import HessianChain, hessian_chain
from .joining import one_hot
from .layers.linear import positions_last
from .node_columns import VIEWS
from .plan import TOLERANCE, working_dtype
from .second_nodes import Frontier, Pushed, frontier, whole
from .second_passes import SecondPasses

Way = Callable[[], "HessianChain | Frontier | None"]


@dataclass(slots=True)
class Node:
    """One use of a parameter, ``J[n] = sum_s g[n, s] (x) a[n, s]`` with g the gradient of the loss.

    Attributes:
        name: of the parameter.
        index: of the use in the record.
        edge: where the layer's output entered the graph.
        a: [N, S, I] input of the layer, detached; None stands for ones with I = 1.
        rows: [I] rows of the parameter that ``a`` stands for, None for all.
        transposed: the parameter is stored as [I, O].
        plain: the entries (s, o) of g are those of z, one by one.
        steady: the rule does not depend on parameters, only ``a`` may.
    """

    name: str
    index: int
    edge: int
    a: Tensor | None
    rows: Tensor | None
    transposed: bool
    plain: bool
    steady: bool


class SecondOrder(SecondPasses):
    """Second derivatives of one batch, with the uses of parameters; arguments as :class:`SecondPasses`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._nodes: dict[int, Node] = {}
        self._pushed: dict[Any, Pushed | None] = {}

    def node(self, index: int) -> Node:
        """A use with its rule; ``index`` counts the recorded uses."""
        if index not in self._nodes:
            recorded = self.captured.record.uses[index]
            use = recorded.use
            a, rows = self.pass_._activation(index), None
            if a is not None and not a.is_floating_point():
                a, rows = one_hot(a[..., 0], self.dtype)
            a = None if a is None else a.to(self.dtype)
            whole = recorded.numel == self.parameters[recorded.name].numel()
            plain = whole and use.gradient in (None, positions_last) and (a is not None or self._single(index))
            self._nodes[index] = Node(
                recorded.name, index, recorded.edge, a, rows, recorded.transposed, plain, plain or self._steady(index)
            )
        return self._nodes[index]

    def _single(self, index: int) -> bool:
        """Whether a sample meets the parameter at one position."""
        recorded = self.captured.record.uses[index]
        return recorded.output_shape[: recorded.use.batch_axes].numel() == self.captured.samples

    def _steady(self, index: int) -> bool:
        recorded = self.captured.record.uses[index]
        if recorded.use.gradient is None:
            return True
        outputs = self.captured.outputs
        dz = torch.ones(1, *recorded.output_shape, dtype=working_dtype(outputs.dtype), device=outputs.device)
        axes = recorded.use.batch_axes
        with torch.enable_grad():
            return not recorded.use.gradient(dz.reshape(1, -1, *recorded.output_shape[axes:])).requires_grad

    def through_rule(self, node: Node, values: Tensor) -> Tensor:
        """Derivatives with respect to z, [V, N, Z], as derivatives g [V, N, S, O]."""
        if node.plain:
            S = 1 if node.a is None else node.a.shape[1]
            return values.reshape(*values.shape[:2], S, -1)
        with torch.no_grad():
            return self.pass_._gradient(node.index, self.write(node.edge, values)).to(self.dtype)

    def input_derivatives(self, node: Node, edges: Sequence[int]) -> dict[int, Tensor]:
        """{e: [N, (s, i), Z_e]}: the derivative of the layer's input ``a`` with respect to earlier outputs z_e."""
        use = self.captured.record.uses[node.index].use
        if use.activation is None or node.rows is not None or not edges:
            return {}
        with torch.enable_grad():
            attached = use.activation()
        if not attached.requires_grad:
            return {}
        recorded = self.captured.record.uses[node.index]
        with torch.enable_grad():
            arranged = self.pass_.plan.layouts[node.index].arrange(
                attached, recorded.output_shape[: use.batch_axes], self.captured.samples, 0
            )
        N, width = self.captured.samples, arranged[0].numel()
        step = self.columns_at_once(sum(self.width(e) for e in edges) * N)
        known = self.captured.record.edges
        parts: dict[int, list[Tensor]] = {}
        for start in range(0, width, step):
            stop = min(width, start + step)
            unit = torch.zeros(stop - start, 1, width, dtype=attached.dtype, device=attached.device)
            unit[:, 0].diagonal(start).fill_(1)
            seeds = unit.expand(-1, N, -1).reshape(stop - start, *arranged.shape)
            for e, d in zip(edges, self.pull_once(arranged, [known[e] for e in edges], seeds)):
                if d is not None:
                    parts.setdefault(e, []).append(self.read(e, d).transpose(0, 1))
        return {e: torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0] for e, pieces in parts.items()}

    # ------------------------------------------------------------------ through known nodes

    def pushed(self, edges: Sequence[int], nodes: Sequence[Node], curved: bool, pairs: bool) -> Pushed | None:
        """All second derivatives by the outputs of these layers, without second-order passes.

        Args:
            edges: in order of execution.
            nodes: uses whose inputs' derivatives are wanted.
            pairs: of different layers too.

        Returns:
            None where the graph has unknown nodes, where passes cost less, or where they gave something else: they
            are compared the first time that a graph is met.
        """
        key = tuple(edges), tuple(node.index for node in nodes), curved, pairs
        if key not in self._pushed:
            self._pushed[key] = self._push(edges, nodes, curved, pairs)
        return self._pushed[key]

    def _push(self, edges: Sequence[int], nodes: Sequence[Node], curved: bool, pairs: bool) -> Pushed | None:
        outputs, record = self.captured.outputs, self.captured.record
        if record.hooked or outputs.dtype != self.dtype or any(self.places(e) is not None for e in edges):
            return None
        if any(record.edges[e].output_nr for e in edges):
            return None
        at = {e: record.edges[e].node for e in edges}
        inputs = {node.index: self._input_node(node) for node in nodes if node.edge != edges[0]}
        inputs = {index: node for index, node in inputs.items() if node is not None}
        for way in (hessian_chain, frontier):
            found = self._proved(partial(way, outputs, at, inputs, pairs), edges, nodes, curved, pairs)
            if found is not None:
                return found
        return None

    def _proved(
        self, way: Way, edges: Sequence[int], nodes: Sequence[Node], curved: bool, pairs: bool
    ) -> Pushed | None:
        """What one way gives, if it was compared with second-order passes or can be."""
        made = way()
        if made is None:
            return None
        ours, passes, held = made.cost()
        if ours > passes or held * self.captured.samples * self.captured.outputs.element_size() > self.limit:
            return None
        known, key = self.pass_.plan.second_by_nodes, (made.signature(), curved)
        if known.get(key) is False:
            return None
        if curved and key not in known and self._proved(way, edges, nodes, False, pairs) is None:
            return None  # the residual is compared alone: beside the Gauss-Newton part it may be too small to be seen
        found = made.push(self.cotangent.detach(), self._loss_hessian() if curved else None)
        if found is None or key in known:
            return found
        agrees = self._agrees(found, edges, nodes, curved, pairs)
        if not agrees or any(bool(g.any()) for g in found.gradients.values()):  # where all vanishes nothing was shown
            if len(known) >= 64:
                known.clear()
            known[key] = agrees
        return found if agrees else None

    def _input_node(self, node: Node) -> Any:
        """The node that a layer's input was made by, up to views; None for one that depends on nothing."""
        use = self.captured.record.uses[node.index].use
        if use.activation is None:
            return None
        with torch.enable_grad():
            made = use.activation().grad_fn
        while made is not None and made.name() in (*VIEWS, "UnsqueezeBackward0"):
            made = made.next_functions[0][0]
        return made

    def _loss_hessian(self) -> Tensor:
        """[C, N, *out]: the loss's second derivative by the outputs, column by column."""
        outputs = self.captured.outputs
        C = outputs[0].numel()
        unit = torch.eye(C, dtype=outputs.dtype, device=outputs.device).view(C, 1, *outputs.shape[1:])
        return (self.bound.hessian_product(unit.expand(C, *outputs.shape)) * self.scale).to(outputs.dtype)

    def _agrees(self, found: Pushed, edges: Sequence[int], nodes: Sequence[Node], curved: bool, several: bool) -> bool:
        """Whether second-order passes give the same."""
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        for place, edge in enumerate(edges):
            g = self.gradient(edge)
            pairs.append((found.gradients.get(edge), None if g is None else self.read(edge, g)))
            others = edges[: place + 1] if several else [edge]
            passed = self.hessians(edge, others, curved)
            pairs += [(found.hessians.get((edge, other)), passed.get(other)) for other in others]
            for node in nodes:
                if node.edge == edge:
                    moved = self.input_derivatives(node, edges[:place])
                    ours = found.inputs.get(node.index, {})
                    pairs += [(whole(ours.get(other)), moved.get(other)) for other in edges[:place]]
        tolerance = TOLERANCE[self.captured.outputs.dtype]
        largest = max((float(b.norm()) for _, b in pairs if b is not None), default=0.0)
        for a, b in pairs:
            given = [t for t in (a, b) if t is not None]
            if len(given) == 2 and given[0].shape != given[1].shape:
                return False
            if given:
                difference = given[0] - given[1] if len(given) == 2 else given[0]
                size = 0.0 if b is None else float(b.norm())
                if not float(difference.norm()) <= tolerance * (size + 1e-2 * largest):
                    return False
        return True
