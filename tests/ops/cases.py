"""Every operator, once: the public function, the same in plain torch operations, and inputs to try.

A new operator is one entry here; tests/ops/test_*.py run the whole list of checks on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import torch_curvature as tc

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Operator:
    """An operator as the tests see it: a function of tensors alone (keywords bound)."""

    name: str
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[Shapes, ...]  # one tuple of input shapes per example; the first is small, for derivatives
    symmetric: bool = False  # the result must be symmetric to the bit
    prepare: Callable[..., tuple[Tensor, ...]] = field(default=lambda *t: t)  # makes valid inputs of random ones
    raw: str = ""  # name of the registered operator
    raw_arguments: Callable[..., tuple] = field(default=lambda *t: t)

    def inputs(self, shapes: Shapes, dtype: torch.dtype = torch.float64, seed: int | None = None) -> tuple[Tensor, ...]:
        """Fresh random inputs on the device under test; drawn on the CPU, so that they do not depend on it."""
        generator = torch.Generator("cpu").manual_seed(torch.seed() % 2**31 if seed is None else seed)
        device = torch.get_default_device()
        draw = (torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes)
        return self.prepare(*(t.to(device, dtype) for t in draw))


def _outer(u: Tensor, v: Tensor) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


def _frobenius_inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def _kronecker_sum(b: Tensor, a: Tensor, a2: Tensor | None = None) -> Tensor:
    a2 = a if a2 is None else a2
    terms = (
        b[..., :, None, :, None] * a[..., None, :, None, None] * a2[..., None, None, None, :]
    )  # [*, N, O, I, O2, I2]
    return terms.sum(-5).flatten(-2).flatten(-3, -2)


def _symmetrised(b: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return (b + b.mT) / 2, *rest


def _jacobian(g: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("...vnso,...nsi->...vnoi", g, a)


def _weighted(values: Tensor, sign: Tensor | None) -> Tensor:
    return values if sign is None else values * sign[..., None, None]


def _jacobian_norms(g: Tensor, a: Tensor) -> Tensor:
    return (_jacobian(g, a) ** 2).sum((-2, -1))


def _gauss_newton_diagonal(g: Tensor, a: Tensor, sign: Tensor | None = None) -> Tensor:
    return _weighted(_jacobian(g, a) ** 2, sign).sum((-4, -3))


def _gauss_newton_block(g: Tensor, a: Tensor, sign: Tensor | None = None) -> Tensor:
    J = _jacobian(g, a)
    return torch.einsum("...vnoi,...vnpj->...oipj", _weighted(J, sign), J).flatten(-2).flatten(-3, -2)


def _jacobian_gram(g: Tensor, a: Tensor, g2: Tensor | None = None, a2: Tensor | None = None) -> Tensor:
    J = _jacobian(g, a)
    return torch.einsum("...vnoi,...wmoi->...vnwm", J, J if g2 is None else _jacobian(g2, a2))


def _as_matrix(gram: Tensor) -> Tensor:
    return gram.flatten(-2).flatten(-3, -2)


OPERATORS = [
    Operator(
        "outer",
        tc.ops.outer,
        _outer,
        (
            ((2, 3), (2, 4)),
            ((5,), (7,)),
            ((3, 1, 4), (2, 5)),
            ((1000, 3), (1000, 3)),
            ((33, 65), (33, 129)),
            ((0, 3), (0, 4)),
            ((4, 0), (4, 3)),
            ((4, 3), (4, 0)),
            ((1, 1), (1, 1)),
        ),
        raw="outer",
    ),
    Operator(
        "frobenius_inner",
        tc.ops.frobenius_inner,
        _frobenius_inner,
        (
            ((2, 3, 4), (2, 3, 4)),
            ((5, 7), (5, 7)),
            ((3, 1, 4, 5), (2, 4, 5)),
            ((1, 300, 301), (1, 300, 301)),
            ((700, 3, 3), (700, 3, 3)),
            ((3, 135, 264), (3, 135, 264)),
            ((0, 3, 4), (0, 3, 4)),
            ((3, 0, 4), (3, 0, 4)),
            ((3, 4, 0), (3, 4, 0)),
        ),
        raw="frobenius_inner",
    ),
    Operator(
        "kronecker_sum",
        tc.ops.kronecker_sum,
        _kronecker_sum,
        (
            ((3, 2, 2), (3, 3)),
            ((5, 4, 3), (5, 6)),
            ((2, 3, 2, 2), (3, 3)),
            ((600, 5, 5), (600, 7)),
            ((40, 3, 2), (40, 70)),
            ((0, 3, 2), (0, 4)),
            ((3, 0, 2), (3, 4)),
            ((3, 2, 2), (3, 0)),
        ),
        raw="kronecker_sum",
        raw_arguments=lambda b, a: (b, a, None, False),
    ),
    Operator(
        "kronecker_sum(a2)",
        tc.ops.kronecker_sum,
        _kronecker_sum,
        (
            ((3, 2, 3), (3, 2), (3, 4)),
            ((5, 4, 3), (5, 6), (5, 2)),
            ((3, 2, 2), (2, 3, 3), (4, 1, 3, 2)),
            ((600, 5, 3), (600, 35), (600, 34)),
            ((3, 2, 2), (3, 2), (3, 0)),
        ),
        raw="kronecker_sum",
        raw_arguments=lambda b, a, a2: (b, a, a2, False),
    ),
    Operator(
        "kronecker_sum(symmetric)",
        lambda b, a: tc.ops.kronecker_sum(b, a, symmetric=True),
        _kronecker_sum,
        (
            ((3, 2, 2), (3, 3)),
            ((5, 4, 4), (5, 6)),
            ((2, 3, 2, 2), (3, 3)),
            ((1100, 5, 5), (1100, 37)),
            ((30, 25, 25), (30, 67)),
            ((0, 3, 3), (0, 4)),
            ((3, 0, 0), (3, 4)),
        ),
        symmetric=True,
        prepare=_symmetrised,
        raw="kronecker_sum",
        raw_arguments=lambda b, a: (b, a, None, True),
    ),
    Operator(
        "jacobian_norms",
        tc.ops.jacobian_norms,
        _jacobian_norms,
        (
            ((2, 2, 3, 2), (2, 3, 2)),
            ((2, 3, 1, 4), (3, 1, 5)),
            ((1, 2, 5, 2), (2, 5, 3)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2)),
            ((3, 40, 1, 33), (40, 1, 65)),
            ((2, 5, 9, 40), (5, 9, 37)),
            ((2, 3, 70, 9), (3, 70, 10)),
            ((1, 17, 33, 20), (17, 33, 40)),
            ((3, 5, 6, 32), (5, 6, 64)),
            ((7, 2, 9, 48), (2, 9, 65)),
            ((2, 90, 3, 16), (90, 3, 17)),
            ((0, 3, 2, 2), (3, 2, 2)),
            ((2, 0, 2, 2), (0, 2, 2)),
            ((2, 3, 0, 2), (3, 0, 2)),
            ((2, 3, 2, 0), (3, 2, 2)),
            ((2, 3, 2, 2), (3, 2, 0)),
        ),
        raw="jacobian_norms",
    ),
    Operator(
        "jacobian_gram",
        lambda g, a: _as_matrix(tc.ops.jacobian_gram(g, a)),
        lambda g, a: _as_matrix(_jacobian_gram(g, a)),
        (
            ((2, 2, 3, 2), (2, 3, 2)),
            ((2, 3, 1, 4), (3, 1, 5)),
            ((1, 2, 5, 2), (2, 5, 3)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2)),
            ((3, 40, 1, 33), (40, 1, 65)),
            ((2, 20, 9, 130), (20, 9, 40)),
            ((2, 3, 70, 9), (3, 70, 10)),
            ((1, 6, 50, 3), (6, 50, 250)),
            ((2, 3, 24, 5), (3, 24, 300)),
            ((1, 40, 10, 20), (40, 10, 200)),
            ((3, 45, 2, 4), (45, 2, 3)),
            ((0, 3, 2, 2), (3, 2, 2)),
            ((2, 0, 2, 2), (0, 2, 2)),
            ((2, 3, 0, 2), (3, 0, 2)),
            ((2, 3, 2, 0), (3, 2, 2)),
        ),
        symmetric=True,
        raw="jacobian_gram",
        raw_arguments=lambda g, a: (g, a, None, None),
    ),
    Operator(
        "jacobian_gram(g2, a2)",
        tc.ops.jacobian_gram,
        _jacobian_gram,
        (
            ((2, 2, 1, 2), (2, 1, 2), (1, 2, 2, 2), (2, 2, 2)),
            ((1, 2, 3, 2), (2, 3, 2), (2, 1, 1, 2), (1, 1, 2)),
            ((2, 2, 1, 3), (2, 1, 2), (2, 2, 1, 3), (2, 1, 2)),
            ((2, 1, 2, 1, 4), (2, 1, 2), (3, 1, 1, 2, 3, 4), (2, 3, 2)),
            ((3, 40, 1, 33), (40, 1, 65), (2, 35, 1, 33), (35, 1, 65)),
            ((2, 20, 9, 30), (20, 9, 40), (1, 7, 50, 30), (7, 50, 40)),
            ((2, 3, 2, 2), (3, 2, 2), (2, 0, 2, 2), (0, 2, 2)),
        ),
        raw="jacobian_gram",
    ),
    Operator(
        "gauss_newton_diagonal",
        tc.ops.gauss_newton_diagonal,
        _gauss_newton_diagonal,
        (
            ((2, 2, 3, 2), (2, 3, 2)),
            ((2, 3, 1, 4), (3, 1, 5)),
            ((1, 2, 5, 2), (2, 5, 3)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2)),
            ((3, 300, 1, 33), (300, 1, 65)),
            ((2, 35, 9, 40), (35, 9, 37)),
            ((2, 3, 70, 9), (3, 70, 10)),
            ((0, 3, 2, 2), (3, 2, 2)),
            ((2, 0, 2, 2), (0, 2, 2)),
            ((2, 3, 0, 2), (3, 0, 2)),
            ((2, 3, 2, 0), (3, 2, 2)),
        ),
        raw="gauss_newton_diagonal",
        raw_arguments=lambda g, a: (g, a, None),
    ),
    Operator(
        "gauss_newton_diagonal(sign)",
        tc.ops.gauss_newton_diagonal,
        _gauss_newton_diagonal,
        (
            ((2, 2, 3, 2), (2, 3, 2), (2, 2)),
            ((2, 3, 1, 4), (3, 1, 5), (2, 3)),
            ((1, 2, 2, 2), (2, 2, 3), (1, 2)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2), (2, 1, 2)),
            ((3, 300, 1, 33), (300, 1, 65), (3, 300)),
            ((2, 35, 9, 40), (35, 9, 37), (2, 35)),
        ),
        raw="gauss_newton_diagonal",
    ),
    Operator(
        "gauss_newton_block",
        tc.ops.gauss_newton_block,
        _gauss_newton_block,
        (
            ((2, 2, 3, 2), (2, 3, 2)),
            ((2, 3, 1, 4), (3, 1, 5)),
            ((1, 2, 5, 2), (2, 5, 3)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2)),
            ((3, 600, 1, 9), (600, 1, 35)),
            ((3, 600, 1, 40), (600, 1, 1)),
            ((90, 20, 1, 70), (20, 1, 1)),
            ((2, 300, 3, 6), (300, 3, 11)),
            ((10, 20, 2, 17), (20, 2, 40)),
            ((9, 300, 3, 5), (300, 3, 16)),
            ((60, 7, 4, 16), (7, 4, 19)),
            ((2, 35, 9, 12), (35, 9, 17)),
            ((2, 3, 70, 9), (3, 70, 10)),
            ((0, 3, 2, 2), (3, 2, 2)),
            ((2, 0, 2, 2), (0, 2, 2)),
            ((2, 3, 0, 2), (3, 0, 2)),
            ((2, 3, 2, 0), (3, 2, 2)),
        ),
        symmetric=True,
        raw="gauss_newton_block",
        raw_arguments=lambda g, a: (g, a, None),
    ),
    Operator(
        "gauss_newton_block(sign)",
        tc.ops.gauss_newton_block,
        _gauss_newton_block,
        (
            ((2, 2, 3, 2), (2, 3, 2), (2, 2)),
            ((2, 3, 1, 4), (3, 1, 5), (2, 3)),
            ((1, 2, 2, 2), (2, 2, 3), (1, 2)),
            ((2, 1, 2, 3, 4), (3, 1, 2, 3, 2), (2, 1, 2)),
            ((3, 600, 1, 9), (600, 1, 35), (3, 600)),
            ((90, 20, 1, 39), (20, 1, 1), (90, 20)),
            ((10, 20, 2, 17), (20, 2, 40), (10, 20)),
            ((2, 35, 9, 12), (35, 9, 17), (2, 35)),
        ),
        symmetric=True,
        raw="gauss_newton_block",
    ),
]
