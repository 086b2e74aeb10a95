"""Matrices that are sums of outer products of columns: ``(1/D) sum_vn sign[v,n] J[v,n] J[v,n]^T``.

Gauss-Newton, Fisher and the gradient second moment differ only in the columns they start from.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from .base import Batch, Matrix
from .blocks import group_matrices
from .dual import frobenius_from_gram, gram_of
from .products import multiply
from .reductions import diagonal_of, kronecker_of, trace_of


class QuadraticMatrix(Matrix):
    """Representations of ``sum_vn sign J J^T``, normalised as the loss's own reduction over all the data."""

    @abc.abstractmethod
    def _output_product(self, batch: Batch, u: Tensor) -> Tensor:
        """The matrix in output space times ``u [K, N, *out]``, unnormalised."""

    def _prefers_columns(self, vectors: int) -> bool:
        """Whether so many vectors are multiplied faster through the columns than one by one; reads one batch."""
        return vectors >= 16

    def dense(self) -> Tensor:
        """The matrix [P, P], parameters in ``named_parameters()`` order, each flattened; symmetric to the bit.

        Raises:
            MemoryError: it cannot fit; nothing has been computed.
        """
        return group_matrices(self, {"": list(self.parameters)}, "dense")[""]

    def blocks(self, by: str = "parameter") -> dict[str, Tensor]:
        """Diagonal blocks, {name: [p, p]}, symmetric to the bit.

        Args:
            by: "parameter", one block each; or "module", the parameters that a module owns directly together
                (weight and bias), in order, under the module's name.

        Raises:
            MemoryError: they cannot fit; nothing has been computed.
        """
        return group_matrices(self, self._groups(by), "blocks")

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal, {name: tensor of the parameter's shape}."""
        return diagonal_of(self)

    def kronecker(self, sharing: str = "expand") -> dict[str, tuple[Tensor, Tensor]]:
        """Kronecker factors ``(A, B)`` of each module: its block is approximated by ``kron(B, A)``.

        A = mean of ``a a^T`` over samples and positions [I, I]; B = ``(1/D) sum g g^T`` over columns, samples and
        positions [O, O]. Where the module has a bias, ``a`` ends with a one: A is [I + 1, I + 1] and ``kron(B, A)``
        the block of the matrix [O, I + 1] whose last column is the bias. Parameters stored as [I, O] (embeddings,
        transposed convolutions): ``kron(A, B)``. A parameter without this structure (normalisation layers, biases of
        other modules, everything by the fallback) has I = 1: A = [[1]], B its exact block, under its own name.

        Args:
            sharing: for layers with several positions per sample, "expand" treats positions as independent samples;
                "reduce" averages ``a`` and sums ``g`` over positions first (exact where ``a`` is constant).
        """
        return kronecker_of(self, sharing)

    def gram(self) -> Tensor:
        """The dual [N V, N V], rows (n, v): inner products of the columns scaled by ``1/sqrt(D)``.

        Its nonzero eigenvalues are those of the matrix.

        Raises:
            ValueError: the loss is not convex in the outputs.
            MemoryError: it cannot fit.
        """
        return gram_of(self)

    def trace(self) -> Tensor:
        """The trace, 0-dim, from the norms of the columns."""
        return trace_of(self)

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, 0-dim: from the dense matrix where parameters are few, else from the dual."""
        if self._size() ** 2 * self.dtype.itemsize <= self.budget.working_bytes() // 8 and self._size() <= 4096:
            return torch.linalg.matrix_norm(self.dense())
        return frobenius_from_gram(self)

    def __matmul__(self, vector: Any) -> Any:
        """Product with a vector [P], vectors [P, K], or a dictionary {name: tensor of the parameter's shape}.

        Returns:
            the same kind as was given.
        """
        return multiply(self, vector)
