"""From columns at the network's output to the normal form of every parameter.

Columns ``s [V, N, *out]`` are backpropagated to the layers' outputs in one batched backward pass; each rule turns
what arrives into ``g``; uses of one parameter are joined along the positions S, so that cross terms come out right
by themselves.  Parameters without a trusted rule get their Jacobian sample by sample (``fallback.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, RecordedUse, UnsupportedModelError
from .factors import Factor
from .fallback import per_sample_jacobians

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@dataclass(slots=True)
class Layout:
    """Where the samples are among the leading axes of a layer's output.

    ``axis`` is the axis that counts samples; with ``minor``, axis 0 counts positions times samples, samples fastest.
    """

    axis: int
    minor: bool = False

    def arrange(self, rows: Tensor, batch_shape: Sequence[int], samples: int, lead: int) -> Tensor:
        """[*lead, R, s, K] -> [*lead, N, S, K], S = R s / N; ``lead`` axes before (0 or 1)."""
        *front, _, s, K = rows.shape
        if self.minor:
            grid = rows.reshape(*front, -1, samples, rows.shape[lead] // batch_shape[0], s, K)
            return grid.transpose(lead, lead + 1).reshape(*front, samples, -1, K)
        if self.axis == 0:
            return rows.reshape(*front, samples, -1, K)
        grid = rows.reshape(*front, *batch_shape, s, K).movedim(lead + self.axis, lead)
        return grid.reshape(*front, samples, -1, K)


def layouts(batch_shape: Sequence[int], samples: int) -> list[Layout]:
    """Every way in which ``samples`` samples can be laid out, the usual first."""
    found = []
    if batch_shape and batch_shape[0] % samples == 0:
        found.append(Layout(0))
    found += [Layout(axis) for axis in range(1, len(batch_shape)) if batch_shape[axis] == samples]
    if batch_shape and batch_shape[0] % samples == 0 and batch_shape[0] != samples:
        found.append(Layout(0, minor=True))
    return found


@dataclass(slots=True)
class Plan:
    """How the parameters of one model are handled; made once per signature, on evidence.

    Attributes:
        layouts: of each recorded use that is trusted (by its index).
        closed: names of parameters with trusted uses, and the indices of these.
        fallback: names of parameters without, and why.
        unused: names of parameters that the outputs do not depend on.
    """

    layouts: dict[int, Layout] = field(default_factory=dict)
    closed: dict[str, list[int]] = field(default_factory=dict)
    fallback: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    conclusive: bool = True  # nothing vanished in the check, so that it need not be made again
    batched: bool = True  # one backward pass for all columns; False where a function of the model cannot


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
            self.plan = Plan()
            self._verify()
            plan = self.plan
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
        return self.assemble(self._to_edges(columns) if self.plan.closed else [], columns)

    def assemble(self, derivatives: Sequence[Tensor | None], columns: Tensor | None) -> dict[str, Factor]:
        """Factors from the derivatives [V, *z] at the edges; ``columns`` are needed for the fallback only."""
        plan = self.plan
        found: dict[str, Factor] = {}
        with torch.no_grad():
            for name, indices in plan.closed.items():
                factor = self._closed(name, indices, derivatives)
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

    def _to_edges(self, columns: Tensor) -> Sequence[Tensor | None]:
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

    def _closed(self, name: str, indices: list[int], derivatives: Sequence[Tensor | None]) -> Factor | None:
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

    # ------------------------------------------------------------------ trust

    def _verify(self) -> None:
        """Decide for every parameter, against autograd's own gradient, which of its factors can be trusted.

        Two cotangents: r, random, and w r with an independent random weight w[n] for every sample.  Where samples
        are independent and laid out as assumed, what arrives at a layer for the second is w times what arrives for
        the first; and ``sum_n w[n] J_r[n]`` is autograd's gradient for the second.
        """
        captured, plan = self.captured, self.plan
        outputs, N = captured.outputs, captured.samples
        generator = torch.Generator().manual_seed(20177)
        r = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        w = (torch.rand(N, generator=generator, dtype=torch.float64) + 0.5).to(outputs)
        w = w * (1 - 2 * (torch.arange(N, device=w.device) % 2))
        weighted = r * w.view(N, *[1] * (outputs.dim() - 1))
        names = list(self.parameters)
        truth = torch.autograd.grad(
            outputs, list(self.parameters.values()), weighted, retain_graph=True, allow_unused=True
        )
        reference = {n: (t.to_dense() if t.is_sparse else t) for n, t in zip(names, truth) if t is not None}
        plan.unused = [n for n in names if n not in reference]
        by_name: dict[str, list[int]] = {}
        for index, recorded in enumerate(captured.record.uses):
            by_name.setdefault(recorded.name, []).append(index)
        edges = self._to_edges(torch.stack([r, weighted])) if captured.record.edges else []
        for name in reference:
            with torch.no_grad():
                why = self._distrust(name, by_name.get(name, []), edges, w, reference[name])
            if why is None:
                plan.closed[name] = by_name[name]
            else:
                plan.fallback[name] = why
        if plan.fallback and self.repeatable:
            self._verify_fallback(r, w, reference)

    def _distrust(
        self, name: str, indices: list[int], edges: Sequence[Tensor | None], w: Tensor, reference: Tensor
    ) -> str | None:
        """Why the closed factors of one parameter cannot be used, None where they can."""
        uses, N = self.captured.record.uses, self.captured.samples
        if name in self.captured.record.escaped:
            return "used by a function without a rule"
        if not indices:
            return "no use of it was seen"
        scale = reference.norm()
        for index in indices:
            derivative = edges[uses[index].edge]
            if derivative is None:
                continue
            rows = self._rows(uses[index], derivative)
            chosen = self._layout_of(uses[index], rows, w, N)
            if chosen is None:
                return "its uses have no axis that counts samples, or samples are not independent there"
            self.plan.layouts[index] = chosen
            size = rows[1].norm()
            if not size > 0:
                self.plan.conclusive = False
            scale = scale + size
        indices[:] = [i for i in indices if i in self.plan.layouts]
        if not indices:
            return "no use of it reaches the output"
        factor = self._closed(name, indices, [None if d is None else d[:1] for d in edges])
        assert factor is not None
        ours = factor.apply_transposed(w.to(factor.g.dtype)[None, :, None]).reshape(reference.shape)
        tolerance = TOLERANCE[self._precision(reference)]
        magnitude = scale * (1 if factor.a is None else factor.a.abs().amax().clamp(max=1e4))
        if (ours - reference).norm() <= tolerance * torch.maximum(reference.norm(), 1e-2 * magnitude):
            return None
        return "the rule's gradient differs from autograd's"

    def _layout_of(self, recorded: RecordedUse, rows: Tensor, w: Tensor, N: int) -> Layout | None:
        tolerance = TOLERANCE[self._precision(self.parameters[recorded.name])]
        batch_shape = recorded.output_shape[: recorded.use.batch_axes]
        for candidate in layouts(batch_shape, N):
            g = candidate.arrange(rows, batch_shape, N, 1)
            expected = g[0] * w.to(g.dtype)[:, None, None]
            if (g[1] - expected).norm() <= tolerance * g[1].norm():
                return candidate
        return None

    def _precision(self, tensor: Tensor) -> torch.dtype:
        """The coarsest dtype that took part."""
        dtypes = {tensor.dtype, self.captured.outputs.dtype}
        if torch.is_autocast_enabled(self.captured.outputs.device.type):
            dtypes.add(torch.get_autocast_dtype(self.captured.outputs.device.type))
        return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.0))

    def _verify_fallback(self, r: Tensor, w: Tensor, reference: dict[str, Tensor]) -> None:
        wanted = {name: self.parameters[name] for name in self.plan.fallback}
        jacobians = per_sample_jacobians(self.model, self.forward, self.captured, wanted, r.unsqueeze(0))
        for name, J in jacobians.items():
            dtype = working_dtype(J.dtype)
            ours = (J[0].to(dtype) * w.to(dtype)[:, None]).sum(0).reshape(reference[name].shape)
            error = (ours - reference[name]).norm()
            if not error <= TOLERANCE[self._precision(reference[name])] * (
                reference[name].norm() + J[0].to(dtype).norm()
            ):
                raise UnsupportedModelError(
                    f"parameter {name!r}: the gradients of single samples do not add up to the gradient of the batch "
                    f"(relative error {float(error / reference[name].norm()):.1e}). The model mixes the samples of a "
                    "batch, or is not deterministic, or its output's first axis does not count samples; it has no "
                    "per-sample derivatives as it stands"
                )


def one_hot(index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, S] rows of a table -> (a [N, S, I] over the I rows in use, rows [I]); negative entries use no row."""
    rows, place = torch.unique(index, return_inverse=True)
    a = torch.zeros(*index.shape, rows.numel(), dtype=dtype, device=index.device)
    a.scatter_(2, place.unsqueeze(-1), 1)
    if rows.numel() and rows[0] < 0:
        rows, a = rows[1:], a[:, :, 1:]
    return a, rows


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are kept in float32 or better."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
