"""From columns at the network's output to the normal form of every parameter.

Columns ``s [V, N, *out]`` are backpropagated to the layers' outputs in one batched backward pass; each rule turns
what arrives into ``g``; uses of one parameter are joined along the positions S, so that cross terms come out right
by themselves.  Parameters without a trusted rule get their Jacobian sample by sample (``fallback.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .factors import Factor
from .fallback import per_sample_jacobians
from .plan import Plan, working_dtype
from .recorder import RecordedUse
from .trust import verify

PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


class Backpropagation:
    """Turns columns into factors for one captured batch.

    Attributes:
        plan: how each parameter is handled.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        captured: Capture,
        forward: Callable[[nn.Module, Any], tuple[Any, Any]],
        repeatable: bool = True,
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.captured = captured
        self.forward = forward
        self.repeatable = repeatable
        self._activations: dict[str, Any] = {}
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
        )
        plan = known.get(key)
        if plan is None:
            plan = self.plan = Plan()
            verify(self)
            if len(known) >= 64:
                known.clear()
            if plan.conclusive:
                known[key] = plan
        return plan

    # ------------------------------------------------------------------ columns

    def column_bytes(self) -> int:
        """Bytes that one backpropagated column takes in all layers together."""
        total = sum(use.output_shape.numel() for use in self.captured.record.uses)
        total += self.captured.samples * sum(self.parameters[name].numel() for name in self.plan.fallback)
        return max(1, total) * self.captured.outputs.element_size()

    def factors(self, columns: Tensor) -> dict[str, Factor]:
        """Factors of every used parameter: ``J[v, n]`` is ``columns[v, n]`` (columns [V, N, *out]) pulled back.

        Parameters that the outputs do not depend on are left out (their Jacobian is zero).
        """
        return self.assemble(self.to_edges(columns) if self.plan.closed else [], columns)

    def assemble(self, derivatives: Sequence[Tensor | None], columns: Tensor | None) -> dict[str, Factor]:
        """Factors from the derivatives [V, *z] at the edges; ``columns`` are needed for the fallback only."""
        plan = self.plan
        found: dict[str, Factor] = {}
        with torch.no_grad():
            for name, indices in plan.closed.items():
                factor = self.closed(name, indices, derivatives)
                if factor is not None:
                    found[name] = factor
        if plan.fallback:
            assert columns is not None
            columns = columns.to(self.captured.outputs.dtype)
            wanted = {name: self.parameters[name] for name in plan.fallback}
            jacobians = per_sample_jacobians(self.model, self.forward, self.captured, wanted, columns)
            for name, J in jacobians.items():
                J = J.to(working_dtype(J.dtype))
                found[name] = Factor(J[:, :, None], None, self.parameters[name].shape)
        return {name: found[name] for name in self.parameters if name in found}

    def to_edges(self, columns: Tensor) -> Sequence[Tensor | None]:
        """Columns [V, N, *out] pulled back to the recorded layers' outputs, [V, *z] each."""
        outputs, edges = self.captured.outputs, self.captured.record.edges
        columns = columns.to(outputs.dtype)

        def backward(vector: Tensor, batched: bool) -> Sequence[Tensor | None]:
            return torch.autograd.grad(
                outputs, edges, vector, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        if columns.shape[0] == 1:
            return [None if d is None else d.unsqueeze(0) for d in backward(columns[0], False)]
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
        reached = [i for i in indices if derivatives[uses[i].edge] is not None]
        parts = []
        for i in reached:
            derivative = derivatives[uses[i].edge]
            assert derivative is not None
            parts.append((i, self._gradient(i, derivative)))
        if not parts:
            return None
        forms = {self._form(i) for i in reached}
        if len(forms) == 1:
            return self._joined(name, parts)
        total = None
        for i, g in parts:
            factor = self._joined(f"{name}@{i}", [(i, g)], shape)
            J = factor.spread(factor.jacobian(), (2,))
            total = J if total is None else total + J
        assert total is not None
        return Factor(total[:, :, None], None, shape)

    def _form(self, index: int) -> tuple[Any, ...]:
        """Uses with the same form can be joined along S."""
        recorded = self.captured.record.uses[index]
        activation = self._cached_activation(index)
        if activation is None:
            return ("direct",)
        return (recorded.transposed, activation.is_floating_point(), activation.shape[-1])

    def _cached_activation(self, index: int) -> Tensor | None:
        key = f"#{index}"
        if key not in self._activations:
            self._activations[key] = self._activation(index)
        cached: Tensor | None = self._activations[key]
        return cached

    def _joined(self, key: str, parts: list[tuple[int, Tensor]], shape: torch.Size | None = None) -> Factor:
        """One factor of uses of the same form."""
        shape = self.parameters[key].shape if shape is None else shape
        g = parts[0][1] if len(parts) == 1 else None
        first = self._cached_activation(parts[0][0])
        if first is None:
            return Factor(sum((p[1] for p in parts[1:]), start=parts[0][1]), None, shape)
        if g is None:
            g = torch.cat([p[1] for p in parts], 2)
        if key not in self._activations:
            activations = [self._cached_activation(i) for i, _ in parts]
            a = first if len(parts) == 1 else torch.cat([x for x in activations if x is not None], 1)
            self._activations[key] = (a, None) if a.is_floating_point() else one_hot(a[..., 0], g.dtype)
        a, rows = self._activations[key]
        if a.dtype != g.dtype:
            a = a.to(g.dtype)
        transposed = self.captured.record.uses[parts[0][0]].transposed
        return Factor(g, a, shape, transposed, rows)


def one_hot(index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, S] rows of a table -> (a [N, S, I] over the I rows in use, rows [I]); negative entries use no row."""
    rows, place = torch.unique(index, return_inverse=True)
    a = torch.zeros(*index.shape, rows.numel(), dtype=dtype, device=index.device)
    a.scatter_(2, place.unsqueeze(-1), 1)
    if rows.numel() and rows[0] < 0:
        rows, a = rows[1:], a[:, :, 1:]
    return a, rows
