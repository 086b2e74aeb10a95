"""A layer's factors g and a, and the checks of the operators that contract its Jacobians."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import FORMATS, Check, bounded, poisoned, randn, storage
from .emulation import Case


@dataclass
class Layer:
    """g [V, N, S, O], a [N, S, I] with their last axes contiguous, and the Jacobians they stand for."""

    g: torch.Tensor
    a: torch.Tensor

    @property
    def integers(self) -> list[int]:
        (V, N, S, O), I = self.g.shape, self.a.shape[2]
        return [V, N, S, O, I, *self.g.stride()[:3], *self.a.stride()[:2]]

    @property
    def jacobian(self) -> torch.Tensor:  # [V, N, O I]
        return torch.einsum("vnso,nsi->vnoi", self.g.double(), self.a.double()).flatten(2)

    @property
    def squares(self) -> torch.Tensor:  # of the terms of each sum over s, summed
        return torch.einsum("vnso,nsi->vnoi", self.g.double() ** 2, self.a.double() ** 2).flatten(2)


def layer(g: torch.Generator, V: int, N: int, S: int, O: int, I: int, dtype: torch.dtype, pad: int = 0) -> Layer:
    """`pad`: rows are that much longer in memory, so that no two are aligned alike."""
    return Layer(randn(g, V, N, S, O + pad, dtype=dtype)[..., :O], randn(g, N, S, I + pad, dtype=dtype)[..., :I])


def norms_check(x: Layer) -> Check:
    dtype = x.g.dtype
    want = x.jacobian.square().sum(2)
    # J is off by at most its own rounding, twice; what is left is a sum of squares.
    slack = (x.squares.sum(2) * x.jacobian.square().sum(2)).sqrt() + x.squares.sum(2)
    terms = x.g.shape[2] + x.g.shape[3] * x.a.shape[2]
    buffers = [storage(x.g), storage(x.a), poisoned(want.numel(), dtype)]
    return bounded(Case("jacobian_norms", FORMATS[dtype], x.integers, buffers), 2, want, slack, terms)


def mirrored(want: torch.Tensor) -> torch.Tensor:
    return torch.arange(want.numel()).reshape(want.shape).mT.flatten()


def gram_check(x: Layer, y: Layer | None, add: bool, generator: torch.Generator) -> Check:
    right, dtype = (x if y is None else y), x.g.dtype
    left_rows, right_rows = x.jacobian.flatten(0, 1), right.jacobian.flatten(0, 1)
    want = left_rows @ right_rows.T
    # Cauchy-Schwarz over o, i of the terms' squares
    slack = x.squares.sum(2).flatten()[:, None].sqrt() * right.squares.sum(2).flatten()[None, :].sqrt()
    start = poisoned(want.numel(), dtype)
    if add:
        start = randn(generator, *want.shape, dtype=dtype)
        start = (start + start.T).flatten() if y is None else start.flatten()
        want, slack = want + start.double().reshape(want.shape), slack + start.double().reshape(want.shape).abs()
    terms = x.g.shape[2] * right.g.shape[2] + x.g.shape[3] * x.a.shape[2]
    buffers = [storage(x.g), storage(x.a), storage(right.g), storage(right.a), start]
    case = Case("jacobian_gram", FORMATS[dtype], [*x.integers, *right.integers, int(y is None), int(add)], buffers)
    return bounded(case, 4, want, slack, terms, split=True, exact=mirrored(want) if y is None else None)


def draw_signs(g: torch.Generator, x: Layer) -> torch.Tensor:
    return torch.randint(0, 2, x.g.shape[:2], generator=g).mul(2).sub(1).to(x.g.dtype)


def block_check(x: Layer, sign: torch.Tensor | None) -> Check:
    dtype, J = x.g.dtype, x.jacobian.flatten(0, 1)
    weights = torch.ones(J.shape[0], dtype=torch.float64) if sign is None else sign.double().flatten()
    want = (J * weights[:, None]).T @ J
    root = x.squares.sqrt().flatten(0, 1) + J.abs()
    slack = (root.square().T @ root.square()).sqrt()
    V, N, S = x.g.shape[:3]
    buffers = [storage(x.g), storage(x.a), poisoned(1, dtype) if sign is None else sign.flatten()]
    buffers.append(poisoned(want.numel(), dtype))
    case = Case("gauss_newton_block", FORMATS[dtype], [*x.integers, int(sign is not None)], buffers)
    return bounded(case, 3, want, slack, V * N + S, split=True, exact=mirrored(want))


def diagonal_check(x: Layer, sign: torch.Tensor | None) -> Check:
    dtype, J = x.g.dtype, x.jacobian
    weights = torch.ones(J.shape[:2], dtype=torch.float64) if sign is None else sign.double()
    want = torch.einsum("vn,vnk->k", weights, J.square())
    root = x.squares.sqrt() + J.abs()
    slack = root.pow(4).sum((0, 1)).sqrt()
    V, N, S = x.g.shape[:3]
    buffers = [storage(x.g), storage(x.a), poisoned(1, dtype) if sign is None else sign.flatten()]
    buffers.append(poisoned(want.numel(), dtype))
    case = Case("gauss_newton_diagonal", FORMATS[dtype], [*x.integers, int(sign is not None)], buffers)
    return bounded(case, 3, want, slack, V * N + S, split=True)
