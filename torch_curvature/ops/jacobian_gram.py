"""Gram matrices of Jacobians that are never stored: the dual of a Gauss-Newton matrix, neural tangent kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .jacobian import check_jacobian, contract, exact, jacobian, over_mapped_axis, pullback, pushforward
from .routing import (
    broadcast_batch,
    check_not_differentiated,
    check_out,
    check_size,
    check_tensors,
    wide,
    without_autocast,
)

_kernel = torch.ops.torch_curvature.jacobian_gram.default._op
_kernel_add = torch.ops.torch_curvature.jacobian_gram_add.default
_RANKS = (4, 3, 4, 3)


def jacobian_gram(
    g: Tensor, a: Tensor, g2: Tensor | None = None, a2: Tensor | None = None, *, add_to: Tensor | None = None
) -> Tensor:
    """Inner products ``(J[v, n], J2[w, m])_F`` of ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]`` and ``J2``, of g2 and a2.

    The cheaper by counted cost of ``sum_st (g_s . g2_t)(a_s . a2_t)``, tile by tile, and of ``J`` formed in chunks that
    stay in cache. With ``g2`` and ``a2`` left out half the work, and a result that is symmetric to the bit. Half types
    are summed in float32.

    Args:
        g: ``[*, V, N, S, O]``, derivatives with respect to the layer's output; leading axes broadcast.
        a: ``[*, N, S, I]``, the layer's input, of the dtype and on the device of ``g``.
        g2: ``[*, V2, N2, S2, O]``; ``g`` where left out.
        a2: ``[*, N2, S2, I]``; ``a`` where left out. Given together with ``g2`` or not at all.
        add_to: contiguous ``[V, N, V2, N2]`` to which the products are added, for sums over layers (no leading axes
            then). Not differentiable.

    Returns:
        ``[*, V, N, V2, N2]``, differentiable to any order in every mode of torch; ``add_to`` where it is given.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: axes missing or of different length, one of ``g2`` and ``a2`` alone, or two devices.
        RuntimeError: a result that does not fit in memory (its size is named), or an unsuitable ``add_to``.
    """
    if add_to is not None:
        check_not_differentiated("jacobian_gram", g, a, g2, a2)
        _kernel_add(g, a, g2, a2, add_to)
        return add_to
    return contract((g, a, g2, a2), _RANKS, _shape, _kernel, _JacobianGram, _formula)


def _shape(g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None) -> torch.Size:
    op = "jacobian_gram"
    if g2 is None and a2 is None:
        check_tensors(op, g=g, a=a)
        check_jacobian(op, g, a)
        return broadcast_batch(op, {"g": 4, "a": 3}, g=g, a=a)
    if g2 is None or a2 is None:
        given, other = ("a2", "g2") if g2 is None else ("g2", "a2")
        raise ValueError(
            f"{op}: '{given}' is given without '{other}'. Give both, or leave both out for the Gram matrix of g and a "
            "themselves."
        )
    check_tensors(op, g=g, a=a, g2=g2, a2=a2)
    check_jacobian(op, g, a)
    check_jacobian(op, g2, a2, "g2", "a2")
    check_size(op, "g2", g2, -1, "g", g, -1)
    check_size(op, "a2", a2, -1, "a", a, -1)
    return broadcast_batch(op, {"g": 4, "a": 3, "g2": 4, "a2": 3}, g=g, a=a, g2=g2, a2=a2)


def _products(J: Tensor, J2: Tensor) -> Tensor:
    """``[*, V, N, O, I], [*, V2, N2, O, I] -> [*, V, N, V2, N2]``."""
    (V, N, O, I), (V2, N2) = J.shape[-4:], J2.shape[-4:-2]
    left, right = (x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], O * I) for x in (J, J2))
    with without_autocast(J):
        products = left @ right.mT
    return products.reshape(*products.shape[:-2], V, N, V2, N2)


def _formula(g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None) -> Tensor:
    J = jacobian(g, a)
    J2 = J if g2 is None or a2 is None else jacobian(g2, a2)
    return _products(J, J2).to(g.dtype)


def _combined(weights: Tensor, J: Tensor) -> Tensor:
    """``sum_wm weights[v, n, w, m] J[w, m]``: ``[V, N, V2, N2], [V2, N2, O, I] -> [V, N, O, I]``."""
    V, N, V2, N2 = weights.shape
    O, I = J.shape[-2:]
    with without_autocast(J):
        return (wide(weights).reshape(V * N, V2 * N2) @ J.reshape(V2 * N2, O * I)).reshape(V, N, O, I)


class _JacobianGram(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None) -> Tensor:
        return _kernel(g, a, g2, a2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        saved = tuple(t for t in inputs if t is not None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        g, a, *rest = ctx.saved_tensors
        J, swapped = jacobian(g, a), gradient.permute(2, 3, 0, 1)
        if not rest:
            return *pullback(_combined(gradient + swapped, J), g, a), None, None
        g2, a2 = rest
        J2 = jacobian(g2, a2)
        return *pullback(_combined(gradient, J2), g, a), *pullback(_combined(swapped, J), g2, a2)

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, da: Tensor | None, dg2: Tensor | None, da2: Tensor | None) -> Tensor | None:
        g, a, *rest = ctx.saved_tensors
        J, tangent = jacobian(g, a), pushforward(g, a, dg, da)
        if not rest:
            if tangent is None:
                return None
            half = _products(tangent, J)
            return (half + half.permute(2, 3, 0, 1)).to(g.dtype)
        g2, a2 = rest
        tangent2 = pushforward(g2, a2, dg2, da2)
        terms = [] if tangent is None else [_products(tangent, jacobian(g2, a2))]
        if tangent2 is not None:
            terms.append(_products(J, tangent2))
        return sum(terms).to(g.dtype) if terms else None  # type: ignore[union-attr]

    @staticmethod
    def vmap(
        info: Any, axes: tuple[int | None, ...], g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None
    ) -> tuple[Tensor, int]:
        return over_mapped_axis(axes, (g, a, g2, a2), jacobian_gram)


@torch.library.register_fake("torch_curvature::jacobian_gram")
def _fake(g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None) -> Tensor:
    exact(_shape(g, a, g2, a2))
    other = g if g2 is None else g2
    return g.new_empty(*g.shape[:2], *other.shape[:2])


@torch.library.register_fake("torch_curvature::jacobian_gram_add")
def _fake_add(g: Tensor, a: Tensor, g2: Tensor | None, a2: Tensor | None, out: Tensor) -> None:
    check_out("jacobian_gram", out, g, _fake(g, a, g2, a2).shape)
