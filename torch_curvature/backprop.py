"""From columns at the network's output to the normal form of every parameter.

Columns ``s [V, N, *out]`` are backpropagated to the layers' outputs in one batched backward pass; each rule turns
what arrives into ``g``; uses of one parameter are joined along the positions S, so that cross terms come out right
by themselves.  Parameters without a trusted rule get their Jacobian sample by sample (``fallback.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import chains
from .capture import Capture
from .closed_rules import ClosedRules
from .factors import Factor
from .fallback import per_sample_jacobians
from .joining import with_ones
from .nodes import pull_back
from .ops.routing import takes_helpers, without_autocast
from .plan import Plan, working_dtype
from .trust import check_same_pass, is_separate, pairs_of_biases, proven, verify

PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


class Backpropagation(ClosedRules):
    """Turns columns into factors for one captured batch.

    Args:
        repeatable: the forward pass can be run again sample by sample.
        attached: where the pass was made without the parameters in its graph, makes it once more with them: there is
            nothing else that its factors could be compared with.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        captured: Capture,
        forward: Callable[[nn.Module, Any], tuple[Any, Any]],
        repeatable: bool = True,
        attached: Callable[[], Capture] | None = None,
    ) -> None:
        super().__init__(parameters, captured)
        self.model = model
        self.forward = forward
        self.repeatable = repeatable
        self.attached = attached
        self.plan = self._plan()

    def _plan(self) -> Plan:
        known = PLANS.setdefault(self.model, {})
        record = self.captured.record
        key = (
            tuple(id(p) for p in self.parameters.values()),
            self.captured.outputs.shape,
            self.captured.outputs.dtype,
            tuple(record.signature),
            tuple(sorted(record.escaped)),
            self.repeatable,
            self.attached is None,
            record.hooked,
        )
        plan = known.get(key)
        if plan is None:
            plan = self._new_plan()
            if len(known) >= 64:
                known.clear()
            if plan.conclusive and not record.reorders:
                known[key] = plan
        return plan

    def _new_plan(self) -> Plan:
        if self.attached is None:
            self.plan = Plan()
            verify(self)
            self.plan.biases, self.plan.separate = pairs_of_biases(self), is_separate(self)
            return self.plan
        captured = self.attached()
        plan = Backpropagation(self.model, self.parameters, captured, self.forward, self.repeatable).plan
        check_same_pass(self.captured, captured)
        return plan

    # ------------------------------------------------------------------ columns

    def column_bytes(self) -> int:
        """Bytes that one backpropagated column takes in all layers together."""
        total = sum(use.output_shape.numel() for use in self.captured.record.uses)
        uses = self.captured.record.uses
        formed = list(self.plan.fallback)  # parameters whose Jacobian is formed, tied ones of two kinds among them
        for name, indices in self.plan.closed.items():
            if len({(uses[i].transposed, uses[i].use.activation is None) for i in indices}) > 1:
                formed.append(name)
        total += self.captured.samples * sum(self.parameters[name].numel() for name in formed)
        return max(1, total) * self.captured.outputs.element_size()

    def factors(self, columns: Tensor) -> dict[str, Factor]:
        """Factors of every used parameter: ``J[v, n]`` is ``columns[v, n]`` (columns [V, N, *out]) pulled back.

        Parameters that the outputs do not depend on are left out (their Jacobian is zero).
        """
        return self.assemble(self.to_edges(columns) if self.plan.closed else [], columns)

    def assemble(self, derivatives: Sequence[Tensor | None], columns: Tensor | None) -> dict[str, Factor]:
        """Factors from the derivatives [V, *z] at the edges; ``columns`` are needed for the fallback only."""
        found = dict(self.each(derivatives, columns))
        return {name: found[name] for name in self.parameters if name in found}

    def each(
        self, derivatives: Sequence[Tensor | None], columns: Tensor | None, together: bool = False
    ) -> Iterator[tuple[str, Factor]]:
        """The same one by one, so that only one parameter's unfolded input is there at a time.

        Without ``columns`` the parameters with closed rules only. ``together``, for sums over parameters: weights with
        their biases where that is one factor, under the weight's name.
        """
        plan = self.plan
        biases = plan.biases if together else {}
        included = set(biases.values())
        for name, indices in plan.closed.items():
            if name in included:
                continue
            factor = self._dense(name, indices[0], derivatives) if plan.separate else None
            if factor is None:
                with torch.no_grad():
                    factor = self.closed(name, indices, derivatives)
            if factor is None:
                continue
            if name in biases and factor.input is not None:
                factor = factor.with_bias(biases[name], partial(self._with_ones, name, factor))
            yield name, factor
        if plan.fallback and columns is not None:
            yield from self.fallback(columns)

    def _with_ones(self, name: str, factor: Factor) -> Tensor:
        assert factor.a is not None
        found: Tensor = self._cached(("ones", name), partial(with_ones, factor.a))
        return found

    def fallback(self, columns: Tensor) -> Iterator[tuple[str, Factor]]:
        """Factors of the parameters without a trusted rule."""
        wanted = {name: self.parameters[name] for name in self.plan.fallback}
        columns = columns.to(self.captured.outputs.dtype)
        jacobians = per_sample_jacobians(self.model, self.forward, self.captured, wanted, columns)
        for name, J in jacobians.items():
            yield name, Factor(J.to(working_dtype(J.dtype))[:, :, None], None, self.parameters[name].shape)

    def to_edges(self, columns: Tensor) -> Sequence[Tensor | None]:
        """Columns [V, N, *out] pulled back to the recorded layers' outputs, [V, *z] each.

        Not under the caller's autocast: each function is differentiated in the precision in which it ran.
        """
        with without_autocast(columns):
            return self._to_edges(columns)

    def _to_edges(self, columns: Tensor) -> Sequence[Tensor | None]:
        outputs, edges = self.captured.outputs, self.captured.record.edges
        columns = columns.to(outputs.dtype)

        single, by_nodes = columns.shape[0] == 1, self.plan.by_nodes
        keep = not (single and self.once) or bool(self.plan.fallback)  # the graph, else freed on the way

        def backward(vector: Tensor, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                outputs, edges, vector, retain_graph=keep, allow_unused=True, is_grads_batched=batched
            )

        ways: list[Sequence[Tensor | None]] = []
        if (by_nodes or (by_nodes is None and not single)) and not self.captured.record.hooked:
            chained = self._chained(columns)
            nodes = None if by_nodes and chained is not None else pull_back(outputs, edges, columns)
            ways = [way for way in (chained, nodes) if way is not None]
            if ways and by_nodes:
                return ways[0]
        if single:
            return [None if d is None else d.unsqueeze(0) for d in backward(columns[0], False)]
        found = self._batched(backward, columns)
        if ways:  # each, for what goes by a chain here may go node by node where there is one column
            verdicts = [proven(way, found) for way in ways]
            self.plan.by_nodes = False if False in verdicts else verdicts[0]
        return found

    def roots(self, columns: Tensor) -> Sequence[Tensor | None] | None:
        """``sqrt(sum_v g[v]^2)`` [1, *z] at the edges, where this one column has the sums of squares of all of them.

        ``sum_v (g[v] (x) a)^2`` is the square of ``sqrt(sum_v g[v]^2) (x) a``, entry by entry: for parameters that were
        used once, at one position a sample.  None where others were, or where it is no cheaper.
        """
        if not (self.plan.separate and self.plan.by_nodes) or self.captured.record.hooked:
            return None
        return self._chained(columns.to(self.captured.outputs.dtype), True)

    def squared_norms(self, columns: Tensor) -> Tensor | None:
        """[V, N] squared norms of the columns' Jacobians over all parameters together, without any derivative written.

        None where they must be had from the factors: there is no chain of dense layers with one position a sample.
        """
        plan, record = self.plan, self.captured.record
        if not (plan.separate and plan.by_nodes) or record.hooked or True in plan.unchained:
            return None
        inputs: list[Tensor | None] = [None] * len(record.edges)
        ones = [0] * len(record.edges)
        for indices in plan.closed.values():
            recorded = record.uses[indices[0]]
            if recorded.use.activation is None:
                ones[recorded.edge] += 1
            else:
                inputs[recorded.edge] = recorded.use.activation().detach().squeeze(1)
        return chains.squared_norms(
            self.captured.outputs, record.edges, columns.to(self.captured.outputs.dtype), inputs, ones
        )

    def _chained(self, columns: Tensor, roots: bool = False) -> list[Tensor] | None:
        """Columns pulled back through a chain; what was none is not searched for one again."""
        several = len(columns) > 1
        if several in self.plan.unchained:
            return None
        found = chains.pull_back(self.captured.outputs, self.captured.record.edges, columns, roots)
        if found is None and takes_helpers(columns):
            self.plan.unchained.add(several)
        return found

    def _batched(self, backward: Callable[[Tensor, bool], Sequence[Tensor | None]], columns: Tensor) -> Any:
        """All columns in one backward pass, or one pass each where a function of the model cannot."""
        if self.plan.batched:
            try:
                return backward(columns, True)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self.plan.batched = False
        each = [backward(column, False) for column in columns]
        return [None if ds[0] is None else torch.stack(list(ds)) for ds in zip(*each)]
