"""Diagonals of the Hessian and the residual: no blocks where a parameter's own second derivatives suffice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..factors import diagonal
from ..second_order import Node, SecondOrder
from .activation_space import Contributions, chosen_nodes
from .base import Batch
from .expansion import pair_diagonal
from .symmetric_sum import SymmetricSum


def add_diagonal(matrix: Any, batch: Batch, second: SecondOrder, curved: bool, total: dict[str, Tensor]) -> None:
    """Adds one batch: the residual from second-order passes, the Gauss-Newton part from the loss's columns."""
    if curved:
        for factors, sign in batch.chunks():
            for name, factor in factors.items():
                total[name] += diagonal(factor, sign)
    at: dict[int, Tensor | None] = {}
    contributions = Contributions(second, matrix.budget, False)
    for name in matrix.parameters:
        if name in second.pass_.plan.unused:
            continue
        nodes = chosen_nodes(second, [name])
        if len(nodes) == 1 and _one_position(nodes[0]):
            edge, a = nodes[0].edge, nodes[0].a
            if edge not in at:
                at[edge] = contributions.residual_diagonal(edge)
            own = at[edge]
            if own is not None:
                part = own.sum(0).unsqueeze(1) if a is None else own.T @ a[:, 0].square()
                total[name] += _as_stored(nodes[0], part, total[name])
        elif len(nodes) == 1:
            M = contributions.own(nodes[0])
            if M is not None:
                total[name] += _as_stored(nodes[0], pair_diagonal(nodes[0], M), total[name])
        elif nodes and matrix._size([name]) ** 2 * matrix.dtype.itemsize <= matrix.budget.working_bytes() // 8:
            group = SymmetricSum([name], matrix.parameters, matrix.zeros(0))
            matrix._add_blocks(batch, second, False, {name: group})
            total[name] += group.finish().diagonal().view_as(total[name])
        else:
            _add_products(second, name, total[name])


def _one_position(node: Node) -> bool:
    return node.plain and (node.a is None or node.a.shape[1] == 1)


def _as_stored(node: Node, part: Tensor, like: Tensor) -> Tensor:
    """[O, I] in the parameter's shape."""
    stored = part.T if node.transposed and node.a is not None else part
    if node.rows is None:
        return stored.reshape(like.shape)
    return torch.zeros_like(like).index_copy_(0, node.rows, stored)


def _add_products(second: SecondOrder, name: str, total: Tensor) -> None:
    """One Hessian-vector product for every entry."""
    p = second.parameters[name]
    flat = total.view(-1)
    step = second.columns_at_once(p.numel())
    for start in range(0, p.numel(), step):
        stop = min(p.numel(), start + step)
        unit = torch.zeros(stop - start, p.numel(), dtype=p.dtype, device=p.device)
        unit.diagonal(start).fill_(1)
        rows = second.products({name: unit.view(-1, *p.shape)}, [name], False)[name]
        flat[start:stop] += rows.diagonal(start)
