"""The Jacobian of the network's outputs with respect to its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tangents import pull_back, push_forward
from .base import Batch, Columns, Matrix
from .dual import between, gather
from .products import as_vectors, checked_tangent


class Jacobian(Matrix):
    """``J[n, c, j] = d output_c(sample n) / d w_j``; outputs flattened in C order of ``outputs.shape[1:]``.

    Args:
        model: the network.
        data: one batch or an iterable of batches. A batch is its inputs (a tensor, or a dictionary of keyword
            arguments) or a pair ``(inputs, targets)`` whose targets are ignored.
        forward: ``(model, batch) -> (outputs, anything)``.
        memory_budget, progress: as :class:`GaussNewton`.
    """

    title = "Jacobian"
    uses_loss = False

    def __init__(self, model: Any, data: Any, **options: Any) -> None:
        super().__init__(model, None, data, **options)

    def _columns(self, batch: Batch, limit: int) -> Columns:
        outputs = batch.captured.outputs
        N, C = outputs.shape[0], outputs[0].numel()
        for start in range(0, C, limit):
            V = min(limit, C - start)
            columns = outputs.new_zeros(V, N, C)
            at = torch.arange(V, device=outputs.device)
            columns[at, :, start + at] = 1
            yield columns.view(V, *outputs.shape), None

    def dense(self) -> Tensor:
        """[N, C, P]."""
        return self._joined({"": list(self.parameters)}, "dense")[""]

    def blocks(self, by: str = "parameter") -> dict[str, Tensor]:
        """{name: [N, C, p]}, by "parameter" or by "module"."""
        return self._joined(self._groups(by), "blocks")

    def _joined(self, groups: dict[str, list[str]], what: str) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {key: [] for key in groups}
        for batch in self._sweep(what):
            outputs = batch.captured.outputs
            N, C = outputs.shape[0], outputs[0].numel()
            self.budget.require(
                N * C * self._size(),
                self.dtype.itemsize,
                f"Jacobian.{what}() of one batch, {N} x {C} x {self._size()},",
                "give smaller batches, use gram() or products with @, or raise memory_budget (GiB)",
            )
            part = {key: self.zeros(N, C, self._size(names)) for key, names in groups.items()}
            first = 0
            for factors, _ in batch.chunks():
                V = 0
                for key, names in groups.items():
                    start = 0
                    for name in names:
                        size = self.parameters[name].numel()
                        if name in factors:
                            J = factors[name].spread(factors[name].jacobian(), (2,))
                            V = J.shape[0]
                            part[key][:, first : first + V, start : start + size] = J.transpose(0, 1)
                        start += size
                first += V
            for key, value in part.items():
                found[key].append(value)
        return {key: values[0] if len(values) == 1 else torch.cat(values) for key, values in found.items()}

    def gram(self) -> Tensor:
        """The neural tangent kernel ``K[n, c, m, d] = sum_j J[n,c,j] J[m,d,j]``, [N, C, N, C]."""
        by_batch = gather(self, "gram")
        C = by_batch[0][0]
        sizes = [N * C for _, N, *_ in by_batch]
        total = sum(sizes)
        self.budget.require(
            total * total,
            self.dtype.itemsize,
            f"Jacobian.gram(): {total} x {total},",
            "give less data, or raise memory_budget (GiB)",
        )
        N = total // C
        if len(by_batch) == 1:
            return between(by_batch[0], by_batch[0]).view(N, C, N, C)
        out = self.zeros(total, total)
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        for i, left in enumerate(by_batch):
            for j in range(i, len(by_batch)):
                part = between(left, by_batch[j])
                out[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = part
                if i != j:
                    out[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = part.T
        return out.view(N, C, N, C)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm over all the data, 0-dim."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self._sweep("frobenius_norm"):
            for norms, _ in batch.squared_norms():
                if norms is not None:
                    total = total + norms.sum(dtype=torch.float64)
        return total.sqrt().to(self.dtype)

    def __matmul__(self, vector: Any) -> Tensor:
        """``J v``: v [P] or a dictionary -> [N, C]; [P, K] -> [N, C, K]."""
        V = as_vectors(self, vector)
        pieces = [{n: v[..., k] for n, v in self.split(V).items()} for k in range(V.shape[1])]
        rows = []
        for batch in self._sweep("__matmul__", pieces[0] if pieces else None):
            each = []
            for k, tangents in enumerate(pieces):
                if k:
                    batch.captured, batch.tangent = push_forward(
                        self.model, self.forward, batch.captured.batch, self.parameters, tangents
                    )
                each.append(checked_tangent(self, batch, tangents, V[:, k]).flatten(1).to(self.dtype))
            rows.append(torch.stack(each, 2))
        out = torch.cat(rows)
        return out if isinstance(vector, Tensor) and vector.dim() == 2 else out[..., 0]

    def transposed_product(self, u: Tensor) -> Tensor:
        """``J^T u``: u [N, C] (or of the outputs' shape) -> [P].

        Raises:
            TypeError: u is no floating tensor.
            ValueError: u does not have one row for each sample of the data, or is on another device.
        """
        if not isinstance(u, Tensor) or not u.is_floating_point():
            got = u.dtype if isinstance(u, Tensor) else type(u).__name__
            raise TypeError(f"u must be a floating tensor [N, C], got {got}")
        if u.device != self.device:
            raise ValueError(f"u is on {u.device}, the model on {self.device}: move one of them")
        total = self.zeros(self._size())
        start = 0
        for batch in self._sweep("transposed_product"):
            outputs = batch.captured.outputs
            part = u[start : start + outputs.shape[0]]
            if part.numel() != outputs.numel():
                raise ValueError(f"u must have the outputs' shape, one row for each sample, got {tuple(u.shape)}")
            start += outputs.shape[0]
            total += pull_back(self.model, batch.captured, self.parameters, part.reshape(outputs.shape), self.dtype)
        if start != u.shape[0]:
            raise ValueError(f"u has {u.shape[0]} rows and the data {start} samples")
        return total

    def _unsupported(self, what: str) -> Any:
        raise TypeError(f"the Jacobian is not a square matrix and has no {what}; see GaussNewton or Fisher")

    def diagonal(self) -> Any:
        return self._unsupported("diagonal")

    def trace(self) -> Any:
        return self._unsupported("trace")

    def kronecker(self) -> Any:
        return self._unsupported("Kronecker factors")
