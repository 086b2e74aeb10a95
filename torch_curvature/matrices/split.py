"""The Hessian and its two parts from one pass over the data: ``H = G + R``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import diagonal
from .blocks import Group, normalised
from .hessian import SecondOrderMatrix, outside_autocast
from .second_diagonal import add_diagonal

Representation = Any  # Tensor [P, P], or {name: Tensor}


@dataclass(frozen=True)
class HessianSplit:
    """Gauss-Newton matrix and residual in one representation, with their Frobenius norms.

    Attributes:
        gauss_newton, residual: [P, P] (dense); {name: [p, p]} (blocks); {name: tensor of the parameter's shape}
            (diagonal).
        gauss_newton_norm, residual_norm: 0-dim; {name: 0-dim} for blocks and diagonal.
    """

    gauss_newton: Representation
    residual: Representation
    gauss_newton_norm: Any
    residual_norm: Any

    @property
    def hessian(self) -> Representation:
        """The sum of both."""
        if isinstance(self.gauss_newton, dict):
            return {name: part + self.residual[name] for name, part in self.gauss_newton.items()}
        return self.gauss_newton + self.residual


def hessian_split(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    representation: str = "dense",
    *,
    by: str = "parameter",
    **options: Any,
) -> HessianSplit:
    """Gauss-Newton matrix G and residual R of the loss from one capture of each batch; the Hessian is ``G + R``.

    Schraudolph, Neural Computation 14, 2002: ``h_C = J_N^T h_L J_N + sum_k (J_L)_k H_{N_k}``.

    Args:
        model, loss_fn, data: as :class:`Hessian`.
        representation: "dense", "blocks" or "diagonal".
        by: for blocks, "parameter" or "module".
        options: ``forward``, ``memory_budget``, ``progress``, ``check_symmetry``, as :class:`Hessian`.

    Raises:
        ValueError: another representation.
        MemoryError: the two parts cannot fit; nothing has been computed.
        UnsupportedModelError: as :class:`Hessian`.
    """
    matrix = _Split(model, loss_fn, data, **options)
    if representation == "dense":
        G, R = (part[""] for part in matrix.split_blocks({"": list(matrix.parameters)}))
        return HessianSplit(G, R, torch.linalg.matrix_norm(G), torch.linalg.matrix_norm(R))
    if representation == "blocks":
        parts = matrix.split_blocks(matrix._groups(by))
    elif representation == "diagonal":
        parts = matrix.split_diagonal()
    else:
        raise ValueError(f"representation must be 'dense', 'blocks' or 'diagonal', got {representation!r}")
    norms = [{name: torch.linalg.vector_norm(part) for name, part in side.items()} for side in parts]
    return HessianSplit(*parts, *norms)


class _Split(SecondOrderMatrix):
    title = "hessian_split"
    curved = True

    @outside_autocast
    def split_blocks(self, groups: dict[str, list[str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._require(groups, "blocks", matrices=2)
        sizes = {name: p.numel() for name, p in self.parameters.items()}
        first = {key: Group(names, sizes, self.zeros(0)) for key, names in groups.items()}
        second = self._sums(groups)
        elements = max(1, self.budget.working_bytes() // (4 * self.dtype.itemsize))
        for batch, passes in self._second_order("blocks"):
            for factors, sign in batch.chunks():
                for group in first.values():
                    group.add(factors, sign, elements)
            for group in first.values():
                group.flush()
            self._add_blocks(batch, passes, False, second)
        G = {key: group.finish() for key, group in first.items()}
        R = {key: total.finish() for key, total in second.items()}
        return normalised(G, self._denominator), normalised(R, self._denominator)

    @outside_autocast
    def split_diagonal(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        G, R = ({n: self.zeros(*p.shape) for n, p in self.parameters.items()} for _ in range(2))
        for batch, passes in self._second_order("diagonal"):
            for factors, sign in batch.chunks():
                for name, factor in factors.items():
                    G[name] += diagonal(factor, sign)
            add_diagonal(self, batch, passes, False, R)
        return normalised(G, self._denominator), normalised(R, self._denominator)
