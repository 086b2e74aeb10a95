"""Closed rules applied: from derivatives at the layers' outputs to the factors of parameters in the normal form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture
from .factors import Factor
from .joining import form, join
from .plan import Plan, working_dtype
from .recorder import RecordedUse
from .unfolding import unfolding_of

# Unfolded inputs that are kept between chunks of columns.
KEEP_BYTES = 1 << 28


class ClosedRules:
    """Factors of the parameters of one captured batch whose rules are trusted.

    Attributes:
        plan: how each parameter is handled.
        once: there is one column, pulled back once: inputs that are large unfolded are so a few samples at a time, and
            neither they nor the graph are kept.
        from_images: norms and diagonals alone are wanted, for which convolutions need no unfolded input.
    """

    plan: Plan

    def __init__(self, parameters: dict[str, nn.Parameter], captured: Capture) -> None:
        self.parameters = parameters
        self.captured = captured
        self._kept, self._kept_bytes, self.once, self.from_images = dict[Any, Any](), 0, False, False

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

    def _rows(self, recorded: RecordedUse, derivative: Tensor) -> Tensor:
        """The derivative at an output by rows, [V, R, *F]."""
        batch_axes = recorded.use.batch_axes
        dz = derivative.to(working_dtype(derivative.dtype))
        return dz if batch_axes == 1 else dz.reshape(dz.shape[0], -1, *dz.shape[1 + batch_axes :])

    def _arranged(self, index: int, dz: Tensor) -> Tensor:
        """g of one use [V, N, S, O], S = 1 where a = 1."""
        recorded, layout, N = self.captured.record.uses[index], self.plan.layouts[index], self.captured.samples
        use = recorded.use
        if use.summed is not None and layout.in_order:
            found = use.summed(dz, N)
            if found is not None:
                return found
        rows = dz.unsqueeze(2) if use.gradient is None else use.gradient(dz)
        g = layout.arrange(rows, recorded.output_shape[: use.batch_axes], N, 1)
        return g.sum(2, keepdim=True) if use.activation is None and g.shape[2] > 1 else g

    def _gradient(self, index: int, derivative: Tensor) -> Tensor:
        """g of one use in the normal form [V, N, S, O], without S where a = 1."""
        recorded = self.captured.record.uses[index]
        g = self._arranged(index, self._rows(recorded, derivative))
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
                if (self.once or self.from_images) and len(indices) == 1 and uses[i].numel == shape.numel():
                    unfolding = unfolding_of(uses[i], self.plan.layouts[i], g, a)
                    if unfolding is not None and (self.once or unfolding.patches is not None):
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
