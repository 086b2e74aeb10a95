"""The Hessian ``H = G + R`` and the residual R, exactly."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..layers.twice import TWICE_DIFFERENTIABLE
from ..plan import TOLERANCE, Plan
from ..recorder import Recorder
from ..second_order import SecondOrder
from .activation_space import Contributions
from .base import Batch, Columns, Matrix
from .blocks import normalised
from .products import as_vectors, like_given
from .second_diagonal import add_diagonal
from .symmetric_sum import SymmetricSum
from .symmetry import check_second_derivatives, explained

# Plans with the groups of parameters whose terms between layers agreed with Hessian-vector products.
TRUSTED: weakref.WeakKeyDictionary[nn.Module, list[tuple[Plan, tuple[str, ...], bool]]] = weakref.WeakKeyDictionary()


Method = TypeVar("Method", bound=Callable[..., Any])


def outside_autocast(method: Method) -> Method:
    """Autocast, where the caller has it on, covers the forward passes and nothing else."""

    @functools.wraps(method)
    def wrapped(self: SecondOrderMatrix, *args: Any, **kwargs: Any) -> Any:
        kind = self.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        self._autocast[0] = torch.get_autocast_dtype(kind)
        try:
            with torch.autocast(kind, enabled=False):
                return method(self, *args, **kwargs)
        finally:
            self._autocast[0] = None

    return cast(Method, wrapped)


class SecondOrderMatrix(Matrix):
    """What the Hessian and the residual have in common: they need second derivatives of the network."""

    curved: bool

    def __init__(self, model: Any, loss_fn: Any, data: Any, *, check_symmetry: bool = True, **options: Any) -> None:
        super().__init__(model, loss_fn, data, **options)
        self._to_check, self._probed = check_symmetry, False
        self._distrusted: set[str] = set()
        self._autocast: list[torch.dtype | None] = [None]  # the caller's, while a method runs
        forward, given, kind = self.forward, self._autocast, self.device.type

        def autocast_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
            if given[0] is None:
                return forward(model, batch)
            with torch.autocast(kind, given[0]):
                return forward(model, batch)

        self.forward = autocast_forward

    def _recorder(self) -> Recorder:
        recorder = Recorder(self.parameters)
        recorder.replacements = TWICE_DIFFERENTIABLE
        return recorder

    def _columns(self, batch: Batch, limit: int) -> Columns:
        columns: Columns = batch.bound.columns(max_columns=limit)
        return columns

    def _second_order(self, what: str) -> Iterator[tuple[Batch, SecondOrder]]:
        """Batch after batch; the first is probed for symmetry."""
        for batch in self._sweep(what):
            assert batch.backpropagation is not None
            second = SecondOrder(
                batch.backpropagation,
                batch.bound,
                batch.scale**2,
                self.budget.working_bytes(),
                partial(explained, batch),
            )
            if not self._probed:
                check_second_derivatives(second, self.curved, batch, self._to_check)
                self._probed = True
            yield batch, second

    # ------------------------------------------------------------------ representations

    def dense(self) -> Tensor:
        """The matrix [P, P], parameters in ``named_parameters()`` order, each flattened; symmetric to the bit.

        Raises:
            MemoryError: it cannot fit; nothing has been computed.
        """
        return self._matrices({"": list(self.parameters)}, "dense")[""]

    def blocks(self, by: str = "parameter") -> dict[str, Tensor]:
        """Diagonal blocks, {name: [p, p]}, symmetric to the bit.

        Args:
            by: "parameter", one block each; or "module", the parameters that a module owns directly together
                (weight and bias), in order, under the module's name.

        Raises:
            MemoryError: they cannot fit; nothing has been computed.
        """
        return self._matrices(self._groups(by), "blocks")

    @outside_autocast
    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, {name: tensor of the parameter's shape}, without the blocks where activation space allows."""
        total = {n: self.zeros(*p.shape) for n, p in self.parameters.items()}
        for batch, second in self._second_order("diagonal"):
            add_diagonal(self, batch, second, self.curved, total)
        return normalised(total, self._denominator)

    def trace(self) -> Tensor:
        """The trace, 0-dim."""
        parts = [d.sum(dtype=torch.float64) for d in self.diagonal().values()]
        return torch.stack(parts).sum().to(self.dtype)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, 0-dim: of the dense matrix where parameters are few, else row by row.

        Row by row takes one product with a vector per parameter, and reads the data as often as rows do not fit.
        """
        P = self._size()
        if P <= 4096 and P * P * self.dtype.itemsize <= self.budget.working_bytes() // 8:
            return torch.linalg.matrix_norm(self.dense())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        step = max(1, self.budget.working_bytes() // (4 * P * self.dtype.itemsize))
        for start in range(0, P, step):
            unit = self.zeros(P, min(step, P - start))
            unit.diagonal(-start).fill_(1)
            rows: Tensor = self @ unit
            total = total + rows.square().sum(dtype=torch.float64)
        return total.sqrt().to(self.dtype)

    def kronecker(self, sharing: str = "expand") -> dict[str, tuple[Tensor, Tensor]]:
        """Not defined: a matrix that is not a sum of squares has no Kronecker factors.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.title}.kronecker(): this matrix is no sum of outer products of columns, so that it has no "
            "Kronecker factors; use blocks() or diagonal(), or the factors of GaussNewton or Fisher"
        )

    def gram(self) -> Tensor:
        """Not defined: a matrix that is not a sum of squares has no dual.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{self.title}.gram(): this matrix is no sum of outer products of columns, so that it has no Gram matrix; "
            "use dense(), blocks() or products with @, or GaussNewton(...).gram()"
        )

    @outside_autocast
    def __matmul__(self, vector: Any) -> Any:
        """Product with a vector [P], vectors [P, K], or a dictionary {name: tensor of the parameter's shape}.

        One differentiable backward pass per batch, then one Hessian-vector product for all vectors at once.

        Returns:
            the same kind as was given.
        """
        V = as_vectors(self, vector)
        total = torch.zeros_like(V)
        for _, second in self._second_order("__matmul__"):
            step = second.columns_at_once(3 * self._size())
            for start in range(0, V.shape[1], step):
                chunk = V[:, start : start + step]
                directions = {n: v.movedim(-1, 0) for n, v in self.split(chunk).items()}
                found = second.products(directions, list(self.parameters), self.curved)
                total[:, start : start + step] += torch.cat([found[n] for n in self.parameters], 1).T
        normalised({"": total}, self._denominator)
        return like_given(self, vector, total)

    # ------------------------------------------------------------------ blocks

    @outside_autocast
    def _matrices(self, groups: dict[str, list[str]], what: str) -> dict[str, Tensor]:
        self._require(groups, what)
        sums = self._sums(groups)
        for batch, second in self._second_order(what):
            self._add_blocks(batch, second, self.curved, sums)
        return normalised({key: group.finish() for key, group in sums.items()}, self._denominator)

    def _require(self, groups: dict[str, list[str]], what: str, matrices: int = 1) -> None:
        largest = max(groups, key=lambda g: self._size(groups[g]))
        side = self._size(groups[largest])
        self.budget.require(
            matrices * sum(self._size(names) ** 2 for names in groups.values()),
            self.dtype.itemsize,
            f"{self.title}.{what}(): {matrices * len(groups)} block(s), the largest {side} x {side}"
            + (f" ({largest!r})," if len(groups) > 1 else ","),
            "use diagonal() or products with @, freeze parameters, or raise memory_budget (GiB)",
        )

    def _sums(self, groups: dict[str, list[str]]) -> dict[str, SymmetricSum]:
        like = self.zeros(0)
        return {key: SymmetricSum(names, self.parameters, like) for key, names in groups.items()}

    def _add_blocks(self, batch: Batch, second: SecondOrder, curved: bool, sums: dict[str, SymmetricSum]) -> None:
        contributions = Contributions(second, self.budget, curved, partial(self._loss_columns, batch, second))
        for key, group in sums.items():
            first = not group.started
            terms = contributions.add(group, key in self._distrusted)
            if not (terms and first) or self._is_trusted(second.pass_.plan, group.names, curved):
                continue
            if self._holds(contributions, group):
                if bool(group.norm() > 0):  # where all vanishes nothing was shown
                    known = TRUSTED.setdefault(self.model, [])
                    del known[: max(0, len(known) - 255)]
                    known.append((second.pass_.plan, tuple(group.names), curved))
            else:
                self._distrusted.add(key)
                group.clear()
                contributions.add(group, True)
        contributions.finish()

    def _is_trusted(self, plan: Plan, names: list[str], curved: bool) -> bool:
        """Whether the terms between these parameters were checked before, with this very plan."""
        known = TRUSTED.get(self.model, [])
        return any(p is plan and n == tuple(names) and c == curved for p, n, c in known)

    def _holds(self, contributions: Contributions, group: SymmetricSum) -> bool:
        """Whether the first batch's blocks multiply a vector as a Hessian-vector product does.

        Where the terms of a block cancel, up to rounding of the terms.
        """
        second = contributions.second
        contributions.finish()
        generator = torch.Generator().manual_seed(20261)
        vector = torch.randn(group.size, generator=generator, dtype=torch.float64, device="cpu").to(self.zeros(0))
        pieces = dict(zip(group.names, vector.split([self.parameters[n].numel() for n in group.names])))
        directions = {n: v.view(1, *self.parameters[n].shape) for n, v in pieces.items()}
        found = second.products(directions, group.names, contributions.curved)
        truth = torch.cat([found[n][0] for n in group.names])
        error, tolerance = (group.product(vector) - truth).norm(), TOLERANCE[self._precision(second)]
        if error <= tolerance * truth.norm():
            return True
        measured = SymmetricSum(group.names, self.parameters, self.zeros(0), measured=True)
        contributions.add(measured, False)
        contributions.finish()
        return bool(error <= 1e-2 * tolerance * measured.magnitude)

    def _precision(self, second: SecondOrder) -> torch.dtype:
        """The coarsest dtype that takes part."""
        dtypes = [second.captured.outputs.dtype, *(p.dtype for p in self.parameters.values())]
        dtypes += [dtype for dtype in self._autocast if dtype is not None]
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def _loss_columns(self, batch: Batch, second: SecondOrder) -> list[tuple[Tensor, Tensor | None]] | None:
        """The loss's columns where they are fewer than second-order passes, and can be held; else None."""
        outputs = second.captured.outputs
        passes = sum(second.width(e) for e in second.edges)
        C = outputs[0].numel()
        if 4 * passes < C or C * passes * outputs.shape[0] * outputs.element_size() > second.limit:
            return None
        if batch.bound.num_columns > passes:
            return None
        return [(s * batch.scale, sign) for s, sign in batch.bound.columns()]


class Hessian(SecondOrderMatrix):
    """``H = d2 loss / d w2 = G + R``, exactly: Gauss-Newton matrix plus residual. Indefinite in general.

    A layer ``z = W a`` with one position per sample has the block ``sum_n Hz[n] (x) a[n] a[n]^T``, ``Hz[n]`` the second
    derivative of the loss with respect to z: as many second-order passes as z has entries, for all samples at once.
    Blocks between two layers have a second term, since a change of the earlier weight changes what the later one is
    multiplied with. Where this costs more than a Hessian-vector product per parameter, and for parameters without a
    closed rule, it is the latter.

    Normalised as the loss reduces, whatever the split into batches, as :class:`GaussNewton`. Piecewise-linear
    functions (ReLU, maximum, absolute value) have their almost-everywhere second derivative, zero.

    Args:
        model, loss_fn, data, forward, memory_budget, progress: as :class:`GaussNewton`.
        check_symmetry: compare ``v . H w`` with ``w . H v`` for random v, w on the first batch, once for the same
            functions and shapes: a second derivative that is wrong in torch, or in a user's own backward, mostly shows
            there. What stays symmetric does not: an elementwise function whose own backward detaches what it saved
            silently loses a term. Write such a backward without ``detach``, or mark it ``once_differentiable``: then
            it is refused by name.

    Raises:
        UnsupportedModelError: a function of the model has no second derivative, or a wrong one; the message names
            the module.
    """

    title = "Hessian"
    curved = True


class Residual(SecondOrderMatrix):
    """``R = H - G = sum_k c_k d2 u_k / d w2``: the curvature of the network itself, c the loss's gradient by outputs u.

    It vanishes for a network that is linear in its parameters, and where the fit is perfect under a matching loss
    (c = 0). Its diagonal blocks vanish where every layer is piecewise linear; blocks between layers do not.

    Args, errors: as :class:`Hessian`.
    """

    title = "Residual"
    curved = False
