"""First and second derivatives of composed functions, `C = L o N`.

Scalar outer functions are the usual chain of loss and network; for an outer function with m components,

    (J_C)[m, i]    = sum_k (J_L)[m, k] (J_N)[k, i]
    (H_C)[m, i, j] = sum_kl (H_L)[m, k, l] (J_N)[k, i] (J_N)[l, j]  +  sum_k (J_L)[m, k] (H_N)[k, i, j].

The first term is the Gauss-Newton matrix of each component, positive semi-definite where `H_L[m]` is; the second is the
residual. J_L and H_L are taken at the output of N.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.routing import check_one_device

__all__ = ["ComposedHessian", "Derivatives", "compose", "compose_hessian", "compose_jacobian"]


class ComposedHessian(NamedTuple):
    """The two terms of the Hessian of a composition; `hessian` is their sum."""

    gauss_newton: Tensor
    """`J_N^T H_L J_N`, `[*, n, n]`, or `[*, m, n, n]` for m components."""
    residual: Tensor
    """`sum_k (J_L)_k (H_N)_k`, of the same shape."""

    @property
    def hessian(self) -> Tensor:
        return self.gauss_newton + self.residual


class Derivatives(NamedTuple):
    """Jacobian `[*, o, n]` and Hessian `[*, o, n, n]` of a function at a point; no axis o for a scalar function.

    None stands for a Hessian that is zero (an affine function).
    """

    jacobian: Tensor
    hessian: Tensor | None


def compose_jacobian(outer: Tensor, inner: Tensor) -> Tensor:
    """The Jacobian of `L o N`: `J_C = J_L J_N`, or for a scalar L in vector form `j_C = J_N^T j_L`.

    Args:
        outer: `J_L [*, m, o]`, or `j_L [*, o]` (one axis less than `inner`) for a scalar L.
        inner: `J_N [*, o, n]`, with as many batch axes as `outer`; they broadcast.

    Returns:
        `[*, m, n]`, or `[*, n]` for a scalar L in vector form.

    Raises:
        ValueError: shapes that do not compose, with both of them; two devices.
    """
    check_one_device("compose_jacobian", outer=outer, inner=inner)
    scalar = outer.ndim == inner.ndim - 1
    if inner.ndim < 2 or not (scalar or outer.ndim == inner.ndim) or outer.shape[-1] != inner.shape[-2]:
        raise ValueError(
            f"outer must be [*, m, o] (or [*, o] for a scalar function) and inner [*, o, n], got outer "
            f"{tuple(outer.shape)} and inner {tuple(inner.shape)}"
        )
    _check_batch(outer=outer.shape[: inner.ndim - 2], inner=inner.shape[:-2])
    return (outer.unsqueeze(-2) @ inner).squeeze(-2) if scalar else outer @ inner


def compose_hessian(
    outer_jacobian: Tensor, outer_hessian: Tensor | None, inner_jacobian: Tensor, inner_hessian: Tensor | None
) -> ComposedHessian:
    """The Hessian of `L o N` in its two terms, for a scalar L or one of m components (formula above).

    Symmetric to the bit in its last two axes. A Hessian of None is that of an affine function, and its term zero.
    Only the symmetric part of a Hessian that is given enters: a Hessian is symmetric.

    Args:
        outer_jacobian: `J_L [*, m, o]`, or `[*, o]` for a scalar L.
        outer_hessian: `H_L [*, m, o, o]`, or `[*, o, o]` for a scalar L.
        inner_jacobian: `J_N [*, o, n]`.
        inner_hessian: `H_N [*, o, n, n]`.

    Every `*` has the same number of axes; they broadcast.

    Raises:
        ValueError: shapes that do not compose, with all of them; two devices.
    """
    check_one_device(
        "compose_hessian",
        inner_jacobian=inner_jacobian,
        inner_hessian=inner_hessian,
        outer_jacobian=outer_jacobian,
        outer_hessian=outer_hessian,
    )
    scalar = outer_jacobian.ndim == inner_jacobian.ndim - 1
    _check_hessians(scalar, outer_jacobian, outer_hessian, inner_jacobian, inner_hessian)
    if scalar:
        outer_jacobian = outer_jacobian.unsqueeze(-2)
        outer_hessian = None if outer_hessian is None else outer_hessian.unsqueeze(-3)
    components, parameters = outer_jacobian.shape[-2], inner_jacobian.shape[-1]
    tensors = (outer_jacobian, outer_hessian, inner_jacobian, inner_hessian)
    batch = torch.broadcast_shapes(
        *(t.shape[: t.ndim - rank] for t, rank in zip(tensors, (2, 3, 2, 3), strict=True) if t is not None)
    )
    zero = outer_jacobian.new_zeros(*batch, components, parameters, parameters)
    terms = [zero, zero.clone()]
    if outer_hessian is not None:
        rows = inner_jacobian.unsqueeze(-3)
        terms[0] = _symmetric(rows.mT @ outer_hessian @ rows).expand(zero.shape)
    if inner_hessian is not None:
        combined = outer_jacobian @ inner_hessian.flatten(-2)
        terms[1] = _symmetric(combined.unflatten(-1, (parameters, parameters))).expand(zero.shape)
    return ComposedHessian(*(term.squeeze(-3) if scalar else term for term in terms))


def compose(*functions: tuple[Tensor, Tensor | None]) -> Derivatives:
    """Jacobian and Hessian of a chain `F_1 o F_2 o ... o F_r`, by folding from the inside.

    Args:
        functions: `(jacobian, hessian)` of each, the outermost first, each taken at the output of the next:
            `[*, o, n]` and `[*, o, n, n]` (or None for an affine function); the outermost may be scalar.

    Raises:
        ValueError: no function, or shapes that do not compose, with both of them.
    """
    if not functions:
        raise ValueError("compose needs the derivatives of at least one function")

    def onto(inside: tuple[Tensor, Tensor | None], outside: tuple[Tensor, Tensor | None]) -> Derivatives:
        jacobian = compose_jacobian(outside[0], inside[0])
        if inside[1] is None and outside[1] is None:
            return Derivatives(jacobian, None)
        return Derivatives(jacobian, compose_hessian(*outside, *inside).hessian)

    first, *rest = reversed(functions)
    return functools.reduce(onto, rest, Derivatives(*first))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _check_batch(**shapes: torch.Size) -> None:
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"the batch axes do not broadcast: {listed}") from None


def _check_hessians(scalar: bool, j_l: Tensor, h_l: Tensor | None, j_n: Tensor, h_n: Tensor | None) -> None:
    """Each of the expected rank and sizes, with one error that names all four shapes."""

    def shape(t: Tensor | None) -> tuple[int, ...] | None:
        return None if t is None else tuple(t.shape)

    rank = j_n.ndim - 2
    outer_rank = rank + (0 if scalar else 1)
    ranks_fit = (
        rank >= 0
        and j_l.ndim == outer_rank + 1
        and (h_l is None or h_l.ndim == outer_rank + 2)
        and (h_n is None or h_n.ndim == rank + 3)
    )
    sizes_fit = ranks_fit and (
        j_l.shape[-1] == j_n.shape[-2]
        and (h_l is None or h_l.shape[rank:] == (*j_l.shape[rank:], j_l.shape[-1]))
        and (h_n is None or h_n.shape[rank:] == (*j_n.shape[rank:], j_n.shape[-1]))
    )
    if not sizes_fit:
        raise ValueError(
            "shapes that do not compose: expected outer [*, m, o] and [*, m, o, o] (or [*, o] and [*, o, o] for a "
            f"scalar function), inner [*, o, n] and [*, o, n, n]; got outer {shape(j_l)} and {shape(h_l)}, "
            f"inner {shape(j_n)} and {shape(h_n)}"
        )
    given = {"outer_jacobian": j_l, "outer_hessian": h_l, "inner_jacobian": j_n, "inner_hessian": h_n}
    _check_batch(**{name: t.shape[:rank] for name, t in given.items() if t is not None})
