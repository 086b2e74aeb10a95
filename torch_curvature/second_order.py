"""Uses of parameters in second derivatives: from a layer's output ``z`` through its rule, and on to its input ``a``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backprop import one_hot
from .layers.linear import positions_last
from .plan import working_dtype
from .second_passes import SecondPasses


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
