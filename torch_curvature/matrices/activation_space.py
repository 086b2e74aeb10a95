"""Blocks of the Hessian of one batch: which parameters stay in activation space, and their pairs.

The others are multiplied out: one Hessian-vector product for each of their entries, exact for any parameter.  A pair of
one of either kind comes out of the latter's products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.curvature_block import CurvatureBlock, curvature_blocks
from ..second_nodes import Pushed, whole
from ..second_order import Node, SecondOrder
from .expansion import pair_block
from .layers import Layer, layer_of
from .memory import Budget
from .symmetric_sum import SymmetricSum


class Pairs(NamedTuple):
    """Uses of a group's parameters, every two of which make a block.

    Attributes:
        edges: where they are, in order of execution.
        at: the uses at each edge.
        layers: edges whose blocks go straight into their places.
    """

    group: SymmetricSum
    nodes: list[Node]
    edges: list[int]
    at: dict[int, list[Node]]
    layers: dict[int, Layer]


class Contributions:
    """Adds one batch to the blocks of groups of parameters; `finish` adds what was left to be added together.

    Args:
        second: the batch.
        budget: what second derivatives may take.
        curved: with the Gauss-Newton part (the Hessian), or without (the residual).
        columns: gives those of the loss, [V, N, *out] and sign, where the Gauss-Newton part of second-order passes is
            taken from them; None where it comes out of the passes.
    """

    def __init__(
        self,
        second: SecondOrder,
        budget: Budget,
        curved: bool,
        columns: Callable[[], Sequence[tuple[Tensor, Tensor | None]] | None] = lambda: None,
    ) -> None:
        self.second = second
        self.budget = budget
        self.curved = curved
        self._columns = columns
        self._latest: tuple[tuple[int, ...], dict[int, Tensor]] = ((), {})  # the next group may be of the same layer
        self._arrived: dict[int, Tensor] | None = None
        self._signs: Tensor | None = None
        self._waiting: list[Pairs] = []

    @cached_property
    def columns(self) -> Sequence[tuple[Tensor, Tensor | None]] | None:
        return self._columns() if self.curved else None

    def add(self, group: SymmetricSum, distrusted: bool) -> bool:
        """Add the batch to a group; True where terms between layers took part, which the caller may want checked."""
        nodes = [] if distrusted else chosen_nodes(self.second, group.names)
        if nodes:
            self._waiting.append(self._pairs(group, nodes))
        inside = {node.name for node in nodes}
        self._add_products(group, [n for n in group.names if n not in inside])
        return len({node.edge for node in nodes}) > 1

    def finish(self) -> None:
        """Add what stays in activation space, of all groups together; nothing may be read from them before."""
        # Between layers, whose parameters are used once each: no two of these blocks have a place in common.
        blocks: list[CurvatureBlock] = []
        for pairs in self._waiting:
            self._add_pairs(pairs, blocks)
        curvature_blocks(blocks)
        self._waiting = []

    # ------------------------------------------------------------------ activation space

    def _pairs(self, group: SymmetricSum, nodes: list[Node]) -> Pairs:
        edges = sorted({node.edge for node in nodes})
        at = {edge: [node for node in nodes if node.edge == edge] for edge in edges}
        self._require(edges)
        return Pairs(group, nodes, edges, at, {} if group.measured else self._layers(group, at))

    def _add_pairs(self, pairs: Pairs, blocks: list[CurvatureBlock]) -> None:
        """Add them to their group, or to ``blocks`` what is between two layers."""
        group, nodes, edges, at, layers = pairs
        pushed = self._pushed(edges, nodes)
        for place, edge in enumerate(edges):
            if pushed is not None:
                M = {other: pushed.hessians[edge, other] for other in edges if (edge, other) in pushed.hessians}
                g, moved = pushed.gradients.get(edge), pushed.inputs
            else:
                M = self._hessians(edge, edges[: place + 1])
                g, moved = self._gradient(edge, edges[:place], at[edge])
            for other in edges[: place + 1]:
                later, earlier = layers.get(edge), layers.get(other)
                if later is None or earlier is None:
                    self._add_uses(group, at[edge], at[other], M.get(other), g, moved)
                    continue
                D = None if later.input is None or g is None else moved.get(later.input.index, {}).get(other)
                cross = None if D is None or g is None else (g[0], D)
                block = group.between_layers(later, earlier, M.get(other), cross)
                if block is not None:
                    blocks.append(block)
            if pushed is None:  # not those of all layers are held at once
                curvature_blocks(blocks)
                blocks.clear()

    def _pushed(self, edges: Sequence[int], nodes: Sequence[Node]) -> Pushed | None:
        if len(edges) > 1:
            return self.second.pushed(edges, nodes, self.curved, True)
        return self.second.pushed(self.second.edges, (), self.curved, False)  # the next group may want another layer

    def _gradient(
        self, edge: int, others: list[int], nodes: list[Node]
    ) -> tuple[Tensor | None, dict[int, dict[int, Tensor]]]:
        """g at an edge, and what the inputs of the uses there change by with the outputs of earlier layers."""
        g = self.second.gradient(edge)
        if g is None:
            return None, {}
        return self.second.read(edge, g), {n.index: self.second.input_derivatives(n, others) for n in nodes}

    def _add_uses(
        self,
        group: SymmetricSum,
        later: list[Node],
        earlier: list[Node],
        M: Tensor | None,
        g: Tensor | None,
        moved: dict[int, dict[int, Tensor]],
    ) -> None:
        """Pairs of uses at two edges, one by one."""
        for node in later:
            for other in earlier:
                if node.edge == other.edge and other.index > node.index:
                    continue
                D = whole(moved.get(node.index, {}).get(other.edge))
                cross = None
                if D is not None and g is not None:
                    cross = self.second.through_rule(node, g)[0], self._right(other, D)
                block = pair_block(node, other, self._both(node, other, M), cross, group.scratch)
                if block is not None:
                    group.add_uses(node, other, block)

    def _layers(self, group: SymmetricSum, at: dict[int, list[Node]]) -> dict[int, Layer]:
        """Edges whose uses go straight into their places of the matrix."""
        if self.second.dtype != group.like.dtype:
            return {}
        names = [node.name for nodes in at.values() for node in nodes]
        starts = {name: place.start for name, place in group.place.items()}
        found = {}
        for edge, nodes in at.items():
            shape = self.second.captured.samples, self.second.width(edge)
            layer = layer_of(nodes, names, starts, group.like, shape)
            if layer is not None:
                found[edge] = layer
        return found

    def _require(self, edges: list[int]) -> None:
        """Refuse a batch whose second derivatives of one layer against all others cannot be held."""
        widths = [self.second.width(e) for e in edges]
        if widths:
            N = self.second.captured.samples
            self.budget.require(
                N * max(widths) * sum(widths),
                self.second.dtype.itemsize,
                f"the second derivatives of a batch of {N} samples at layers with outputs of {widths} numbers each",
                "give the data in smaller batches, for example a DataLoader (the result is the same), or raise "
                "memory_budget (GiB)",
            )

    def own(self, node: Node) -> Tensor | None:
        """[N, (s, o), (t, p)] of one use with itself."""
        self._require([node.edge])
        return self._both(node, node, self._hessians(node.edge, [node.edge]).get(node.edge))

    def _both(self, later: Node, earlier: Node, M: Tensor | None) -> Tensor | None:
        """[N, Z_m, Z_l] through both rules."""
        if M is None:
            return None
        M = self._right(earlier, M)
        return M if later.plain else self._right(later, M.mT).mT

    def _right(self, node: Node, M: Tensor) -> Tensor:
        """[N, K, Z] with the last axis through a rule: [N, K, (s, o)]."""
        if node.plain:
            return M
        return self.second.through_rule(node, M.transpose(0, 1)).flatten(2).transpose(0, 1)

    def _hessians(self, edge: int, others: list[int]) -> dict[int, Tensor]:
        """{other: [N, Z_edge, Z_other]}."""
        key = (edge, *others)
        if self._latest[0] != key:
            self._latest = (), {}
            self._latest = key, self._computed(edge, others)
        return self._latest[1]

    def residual_diagonal(self, edge: int) -> Tensor | None:
        """[N, Z]: second derivatives by each entry of an output alone, without the Gauss-Newton part; None for zero."""
        pushed = self.second.pushed(self.second.edges, (), False, False)
        if pushed is None:
            return self.second.residual_diagonal(edge)
        return pushed.hessians[edge, edge].diagonal(dim1=1, dim2=2) if (edge, edge) in pushed.hessians else None

    def _computed(self, edge: int, others: list[int]) -> dict[int, Tensor]:
        pushed = self._pushed([edge], []) if others == [edge] else None
        if pushed is not None:
            return {edge: pushed.hessians[edge, edge]} if (edge, edge) in pushed.hessians else {}
        found = self.second.hessians(edge, others, self.curved and self.columns is None)
        if not self.curved or self.columns is None:
            return found
        arrived = self._columns_at()
        if edge in arrived:
            left = arrived[edge] if self._signs is None else arrived[edge] * self._signs.unsqueeze(-1)
            for other in others:
                if other in arrived:
                    B = torch.bmm(left.permute(1, 2, 0), arrived[other].transpose(0, 1))
                    found[other] = B if other not in found else found[other] + B
        return found

    def _columns_at(self) -> dict[int, Tensor]:
        """{edge: [V, N, Z]} of the loss's columns."""
        if self._arrived is None:
            assert self.columns is not None
            chunks = [self.second.pass_.to_edges(columns) for columns, _ in self.columns]
            self._arrived = {}
            for edge in self.second.edges:
                found = [chunk[edge] for chunk in chunks]
                parts = [self.second.read(edge, d) for d in found if d is not None]
                if parts:
                    self._arrived[edge] = torch.cat(parts) if len(parts) > 1 else parts[0]
            signs = [sign for _, sign in self.columns]
            if any(sign is not None for sign in signs):
                self._signs = torch.cat(
                    [c.new_ones(c.shape[:2]) if s is None else s.to(c.dtype) for c, s in self.columns]
                )
        return self._arrived

    # ------------------------------------------------------------------ products

    def _add_products(self, group: SymmetricSum, names: list[str]) -> None:
        """Rows of the parameters ``names`` against all of the group, by Hessian-vector products."""
        done: set[str] = set()
        for name in names:
            columns = [n for n in group.names if n not in done]
            rows = unit_products(self.second, name, columns, self.curved)
            if rows is not None:
                for column, block in rows.items():
                    group.add(name, column, block)
            done.add(name)


def unit_products(second: SecondOrder, name: str, columns: list[str], curved: bool) -> dict[str, Tensor] | None:
    """{column: [p, p_column]}: all rows of one parameter, None where the outputs do not depend on it."""
    if name in second.pass_.plan.unused:
        return None
    p = second.parameters[name]
    step = second.columns_at_once(sum(second.parameters[n].numel() for n in columns))
    parts: dict[str, list[Tensor]] = {n: [] for n in columns}
    for start in range(0, p.numel(), step):
        stop = min(p.numel(), start + step)
        unit = torch.zeros(stop - start, p.numel(), dtype=p.dtype, device=p.device)
        unit.diagonal(start).fill_(1)
        for column, rows in second.products({name: unit.view(-1, *p.shape)}, columns, curved).items():
            parts[column].append(rows)
    return {n: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for n, pieces in parts.items()}


def chosen_nodes(second: SecondOrder, names: Sequence[str]) -> list[Node]:
    """Uses of the parameters of a group that stay in activation space, in order of execution.

    Decided by counted passes through the network: one for each entry of ``z`` per sample (second order, about three
    times a plain one) and, where there are several layers, one for each entry of ``a``; against one Hessian-vector
    product (about four) for each entry of the parameter.  The rule must not depend on parameters: only then does
    ``a`` hold all that the layer's Jacobian changes by (a parameter alone, used once, is free of this).
    """
    closed = {n: second.pass_.plan.closed[n] for n in names if n in second.pass_.plan.closed}
    uses = second.captured.record.uses
    several = len({uses[i].edge for indices in closed.values() for i in indices}) > 1
    seeded: set[int] = set()
    kept: dict[str, list[int]] = {}
    with_input = sorted(closed, key=lambda n: uses[closed[n][0]].use.activation is None)
    for name in with_input:
        indices = closed[name]
        passes = 3 * sum(second.width(e) for e in {uses[i].edge for i in indices} - seeded)
        if several:
            passes += sum(_input_width(second, i) for i in indices)
        if not within_cost(passes, 4 * second.parameters[name].numel()):
            continue
        if several and not all(second.node(i).steady for i in indices):
            continue
        kept[name] = indices
        seeded |= {uses[i].edge for i in indices}
    return sorted((second.node(i) for indices in kept.values() for i in indices), key=lambda node: node.index)


def within_cost(passes: int, products: int) -> bool:
    return passes <= products


def _input_width(second: SecondOrder, index: int) -> int:
    """Entries of ``a`` that belong to one sample."""
    a = second.node(index).a
    return 0 if a is None or second.node(index).rows is not None else a.shape[1] * a.shape[2]
