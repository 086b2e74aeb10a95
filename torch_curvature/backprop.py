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
from .factors import Factor
from .fallback import per_sample_jacobians
from .joining import form, join, with_ones
from .nodes import pull_back
from .ops.routing import without_autocast
from .plan import Plan, working_dtype
from .recorder import RecordedUse
from .trust import check_same_pass, is_separate, pairs_of_biases, proven, verify
from .unfolding import unfolding_of

# Unfolded inputs that are kept between chunks of columns.
KEEP_BYTES = 1 << 28

PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


class Backpropagation:
    """Turns columns into factors for one captured batch.

    Args:
        repeatable: the forward pass can be run again sample by sample.
        attached: where the pass was made without the parameters in its graph, makes it once more with them: there is
            nothing else that its factors could be compared with.

    Attributes:
        plan: how each parameter is handled.
        once: there is one column: inputs that are large unfolded are so a few samples at a time, and are not kept.
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
        self.model = model
        self.parameters = parameters
        self.captured = captured
        self.forward = forward
        self.repeatable = repeatable
        self.attached = attached
        self._kept, self._kept_bytes, self.once = dict[Any, Any](), 0, False
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
            if name in biases and factor.a is not None:
                factor = factor.with_bias(
                    biases[name], partial(self._cached, ("ones", name), partial(with_ones, factor.a))
                )
            yield name, factor
        if plan.fallback and columns is not None:
            yield from self.fallback(columns)

    def _dense(self, name: str, index: int, derivatives: Sequence[Tensor | None]) -> Factor | None:
        """:meth:`closed` where the plan is separate: nothing is to be arranged; None where it must be converted."""
        recorded = self.captured.record.uses[index]
        g = derivatives[recorded.edge]
        if g is None or g.dtype != working_dtype(g.dtype):
            return None
        a = self._kept.get(index)
        if a is None and recorded.use.activation is not None:
            a = recorded.use.activation().detach()
            if a.dtype != g.dtype:
                return None
            self._kept[index] = a  # a view of what the layer was given
        return Factor(g.unsqueeze(2), a, self.parameters[name].shape, recorded.transposed)

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

        def backward(vector: Tensor, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                outputs, edges, vector, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        single, by_nodes = columns.shape[0] == 1, self.plan.by_nodes
        known = None
        if (by_nodes or (by_nodes is None and not single)) and not self.captured.record.hooked:
            known = chains.pull_back(outputs, edges, columns)
            if known is None:
                known = pull_back(outputs, edges, columns)
            if known is not None and by_nodes:
                return known
        if single:
            return [None if d is None else d.unsqueeze(0) for d in backward(columns[0], False)]
        found = self._batched(backward, columns)
        if known is not None:
            self.plan.by_nodes = proven(known, found)
        return found

    def roots(self, columns: Tensor) -> Sequence[Tensor | None] | None:
        """``sqrt(sum_v g[v]^2)`` [1, *z] at the edges, where this one column has the sums of squares of all of them.

        ``sum_v (g[v] (x) a)^2`` is the square of ``sqrt(sum_v g[v]^2) (x) a``, entry by entry: for parameters that were
        used once, at one position a sample.  None where others were, or where it is no cheaper.
        """
        if not (self.plan.separate and self.plan.by_nodes) or self.captured.record.hooked:
            return None
        outputs = self.captured.outputs
        return chains.pull_back(outputs, self.captured.record.edges, columns.to(outputs.dtype), True)

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

    # ------------------------------------------------------------------ closed rules

    def _rows(self, recorded: RecordedUse, derivative: Tensor) -> Tensor:
        """g of one use, [V, R, s, O]."""
        batch_axes = recorded.use.batch_axes
        dz = derivative.to(working_dtype(derivative.dtype))
        if batch_axes != 1:
            dz = dz.reshape(dz.shape[0], -1, *dz.shape[1 + batch_axes :])
        return dz.unsqueeze(2) if recorded.use.gradient is None else recorded.use.gradient(dz)

    def _gradient(self, index: int, derivative: Tensor) -> Tensor:
        """g of one use in the normal form [V, N, S, O], without S where a = 1."""
        recorded = self.captured.record.uses[index]
        batch_shape = recorded.output_shape[: recorded.use.batch_axes]
        g = self.plan.layouts[index].arrange(self._rows(recorded, derivative), batch_shape, self.captured.samples, 1)
        if recorded.use.activation is None and g.shape[2] > 1:
            g = g.sum(2, keepdim=True)
        inputs = 1
        if recorded.use.activation is not None:
            inputs = recorded.numel // g.shape[3]
        total = self.parameters[recorded.name].numel()
        if recorded.numel != total and not recorded.transposed:  # some rows of the parameter
            first = recorded.start // inputs
            g = nn.functional.pad(g, (first, total // inputs - first - g.shape[3]))
        return g

    def _activation(self, index: int) -> Tensor | None:
        recorded = self.captured.record.uses[index]
        if recorded.use.activation is None:
            return None
        a = recorded.use.activation().detach()
        if not a.is_floating_point():
            a = a.unsqueeze(-1)
        else:
            a = a.to(working_dtype(a.dtype))
        batch_shape = recorded.output_shape[: recorded.use.batch_axes]
        return self.plan.layouts[index].arrange(a, batch_shape, self.captured.samples, 0)

    def closed(self, name: str, indices: list[int], derivatives: Sequence[Tensor | None]) -> Factor | None:
        """Factor of one parameter from the uses with these indices; None where nothing arrived at any of them."""
        uses = self.captured.record.uses
        shape = self.parameters[name].shape
        parts: list[tuple[int, Tensor, Tensor | None]] = []
        for i in indices:
            derivative = derivatives[uses[i].edge]
            if derivative is not None:
                g, a = self._gradient(i, derivative), partial(self._cached, i, partial(self._activation, i))
                alone = self.once and len(indices) == 1 and uses[i].numel == shape.numel()
                if alone and (unfolding := unfolding_of(uses[i], self.plan.layouts[i], g, a)) is not None:
                    return Factor(g, unfolding, shape)
                parts.append((i, g, a()))
        if not parts:
            return None
        if len(parts) == 1 or len({(uses[i].transposed, form(a)) for i, _, a in parts}) == 1:
            return self._joined(name, parts, shape)
        total = None
        for part in parts:
            factor = self._joined(part[0], [part], shape)
            J = factor.spread(factor.jacobian(), (2,))
            total = J if total is None else total + J
        assert total is not None
        return Factor(total[:, :, None], None, shape)

    def _cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What does not depend on the columns is kept for the next chunk of them, up to a limit."""
        if key in self._kept:
            return self._kept[key]
        value = compute()
        size = sum(
            t.numel() * t.element_size() for t in (value if isinstance(value, tuple) else (value,)) if t is not None
        )
        if self._kept_bytes + size <= KEEP_BYTES:
            self._kept[key] = value
            self._kept_bytes += size
        return value

    def _joined(self, key: Any, parts: list[tuple[int, Tensor, Tensor | None]], shape: torch.Size) -> Factor:
        """One factor of uses of the same form, joined along S."""
        first, g, a = parts[0]
        if a is None:
            return Factor(sum((p[1] for p in parts[1:]), start=g), None, shape)
        rows = None
        if len(parts) > 1:
            g = torch.cat([p[1] for p in parts], 2)
        if len(parts) > 1 or not a.is_floating_point():
            several = [p[2] for p in parts if p[2] is not None]
            a, rows = self._cached(("joined", key), lambda: join(several, g.dtype))
        if a.dtype != g.dtype:
            a = a.to(g.dtype)
        return Factor(g, a, shape, self.captured.record.uses[first].transposed, rows)
