"""What all matrices have in common: the data, the passes over it, normalisation, and the representations."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..backprop import Backpropagation
from ..capture import Capture, capture, trainable_parameters, unwrapped
from ..factors import Factor
from ..norms import total_squared_norms
from ..plan import coverage, working_dtype
from ..recorder import Recorder
from ..tangents import push_forward
from .data import Batches, Forward, inputs_forward, pair_forward
from .memory import Budget

Columns = Iterator[tuple[Tensor, "Tensor | None"]]

# glibc returns freed blocks from this size on to the system, and fresh pages cost as much as the arithmetic on them
# (measured: 0.2 ms for a MiB): derivatives of a few columns at a time go through memory that is there already.
RETURNED_BYTES = 1 << 25


@dataclass(slots=True)
class Batch:
    """One batch on its way: the captured pass, the loss bound to it, and its columns pulled back chunk by chunk.

    ``scale`` multiplies the columns; it carries the normalisation where the data is a single batch.
    """

    matrix: Matrix
    captured: Capture
    bound: Any
    scale: float
    backpropagation: Backpropagation | None
    tangent: Tensor | None

    def pieces(self, squares: bool = False) -> Iterator[tuple[Iterator[tuple[str, Factor]], Tensor | None]]:
        """As :meth:`chunks` of few columns, the factors one after the other: for what takes one parameter at a time.

        With ``squares``, for sums over the columns of squares of entries of J, one column may stand for all, and
        convolutions come without unfolded inputs.
        """
        assert self.backpropagation is not None
        self.backpropagation.from_images, self.backpropagation.once = squares, self.matrix.one_column
        for columns, sign in self._scaled_columns(few=True):
            yield self._each(columns, self.backpropagation.roots(columns) if squares and sign is None else None), sign

    def squared_norms(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """[V, N] squared norms over all parameters together of a few columns at a time, and their signs.

        None for the norms where no parameter takes part.
        """
        assert self.backpropagation is not None
        self.backpropagation.from_images, self.backpropagation.once = True, self.matrix.one_column
        for columns, sign in self._scaled_columns(few=True):
            norms = self.backpropagation.squared_norms(columns)
            if norms is None:
                norms = total_squared_norms(f for _, f in self._each(columns))
            yield None if norms is None else norms.to(self.matrix.dtype), sign

    def _each(self, columns: Tensor, derivatives: Any = None) -> Iterator[tuple[str, Factor]]:
        """The factors of some columns, from their derivatives at the edges where these are known."""
        backpropagation = self.backpropagation
        assert backpropagation is not None
        if derivatives is None:
            derivatives = backpropagation.to_edges(columns) if backpropagation.plan.closed else []
        return ((n, self._cast(f)) for n, f in backpropagation.each(derivatives, columns, True))

    def chunks(self, few: bool = False) -> Iterator[tuple[dict[str, Factor], Tensor | None]]:
        """Pairs (factors by parameter name, sign [V, N] or None).

        With ``few`` columns at a time, where that is faster: for what does not do more work for more chunks.
        """
        assert self.backpropagation is not None
        for columns, sign in self._scaled_columns(few):
            yield {n: self._cast(f) for n, f in self.backpropagation.factors(columns).items()}, sign

    def _cast(self, factor: Factor) -> Factor:
        """In the matrix's dtype, where the parameters have several."""
        dtype = self.matrix.dtype
        if factor.g.dtype != dtype:
            factor.g, factor.input = factor.g.to(dtype), None if factor.a is None else factor.a.to(dtype)
        return factor

    def _scaled_columns(self, few: bool) -> Columns:
        assert self.backpropagation is not None
        limit = 1
        if not self.matrix.one_column:
            limit = max(1, self.matrix.budget.working_bytes() // (4 * self.backpropagation.column_bytes()))
            if few:
                limit = min(limit, self._columns_in_place() or limit)
        for columns, sign in self.matrix._columns(self, limit):
            yield columns if self.scale == 1.0 else columns * self.scale, sign

    def _columns_in_place(self) -> int:
        """Columns whose derivatives at layers with several positions per sample fit in blocks that are used again.

        0 where not even one does, or where it makes no difference.
        """
        outputs = self.captured.outputs
        if outputs.device.type != "cpu":
            return 0
        several = (
            use.output_shape.numel()
            for use in self.captured.record.uses
            if use.use.gradient is not None or use.output_shape[: use.use.batch_axes].numel() > self.captured.samples
        )
        return (RETURNED_BYTES - 1) // (max(several, default=RETURNED_BYTES) * outputs.element_size())


class Matrix(abc.ABC):
    """A curvature matrix of ``model`` and ``loss_fn`` on ``data``; nothing is computed before a method is called.

    Rows and columns are the parameters with ``requires_grad`` in ``model.named_parameters()`` order, each flattened.
    """

    title: str
    uses_loss = True
    one_column = False  # of each batch: neither unfolded inputs nor the graph need be kept for others

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        *,
        forward: Forward | None = None,
        memory_budget: float | None = None,
        progress: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = unwrapped(model)
        self.parameters = trainable_parameters(self.model)
        if not self.parameters:
            raise ValueError("model has no parameter with requires_grad=True: there is nothing to differentiate")
        for name, p in self.parameters.items():
            if type(p) is not nn.Parameter and nn.parameter.is_lazy(p):
                raise ValueError(f"parameter {name!r} is not initialised yet: run the model once on a batch first")
            if not p.is_floating_point():
                raise TypeError(f"parameter {name!r} has dtype {p.dtype}: real floating parameters are needed")
        self.loss = losses.interpret(loss_fn) if self.uses_loss else None
        self.forward: Forward = forward or (pair_forward if self.uses_loss else inputs_forward)
        self.batches = Batches(data, forward is not None, progress)
        first = next(iter(self.parameters.values()))
        self.device = first.device
        self.budget = Budget(memory_budget, self.device)
        self.dtype = working_dtype(max((p.dtype for p in self.parameters.values()), key=lambda d: d.itemsize))
        self._plans: list[Any] = []

    # ------------------------------------------------------------------ passes

    @abc.abstractmethod
    def _columns(self, batch: Batch, limit: int) -> Columns:
        """Columns of one batch, at most ``limit`` at once."""

    def _recorder(self) -> Recorder:
        """What observes a pass."""
        return Recorder(self.parameters)

    def _sweep(self, what: str, tangents: dict[str, Tensor] | None = None) -> Iterator[Batch]:
        """Observe batch after batch; after the last, ``self._denominator`` is what results must be divided by.

        With ``tangents`` the pass is a forward-mode one: ``batch.tangent`` is the product of the Jacobian with them,
        and no factors are prepared.
        """
        denominators: list[Tensor] = []
        self._denominator = 1.0
        count = 0
        for batch in self.batches.read(f"{self.title}.{what}"):
            backpropagation, tangent = None, None
            if tangents is None:
                captured = capture(self.model, self.forward, batch, self.parameters, self._recorder())
                backpropagation = Backpropagation(self.model, self.parameters, captured, self.forward)
                if backpropagation.plan not in self._plans:
                    self._plans.append(backpropagation.plan)
            else:
                captured, tangent = push_forward(self.model, self.forward, batch, self.parameters, tangents)
            bound, scale = None, 1.0
            if self.loss is not None:
                bound = self.loss.bind(captured.outputs.detach(), captured.targets)
                if self.batches.single:
                    scale = float(self.loss.combine([bound.denominator])) ** -0.5
                else:
                    denominators.append(bound.denominator)
            count += 1
            yield Batch(self, captured, bound, scale, backpropagation, tangent)
        if count == 0:
            raise ValueError("data holds no batch")
        if self.loss is not None and denominators:
            self._denominator = float(self.loss.combine(denominators))

    # ------------------------------------------------------------------ what happened

    def coverage(self) -> dict[str, str]:
        """For each parameter of the model how it is handled.

        Returns:
            {name: "closed rule" | "fallback: why" | "unused" | "frozen"}. Unused parameters do not influence the
            outputs: their part of every matrix is zero. Frozen ones (requires_grad=False) are left out. Reads one
            batch if no method has been called yet.
        """
        if not self._plans:
            next(self._sweep("coverage"))
        return coverage(self.model, self._plans)

    def _groups(self, by: str) -> dict[str, list[str]]:
        """Parameters joined into blocks."""
        if by == "parameter":
            return {name: [name] for name in self.parameters}
        if by != "module":
            raise ValueError(f"by must be 'parameter' or 'module', got {by!r}")
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        return groups

    def _size(self, names: list[str] | None = None) -> int:
        return sum(self.parameters[n].numel() for n in (self.parameters if names is None else names))

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """[P, ...] -> {name: [*shape, ...]}."""
        pieces = vector.split([p.numel() for p in self.parameters.values()])
        return {n: v.reshape((*p.shape, *vector.shape[1:])) for (n, p), v in zip(self.parameters.items(), pieces)}

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)
