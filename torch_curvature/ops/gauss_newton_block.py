"""Blocks of Gauss-Newton matrices from a layer's input and the columns backpropagated to its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .jacobian import check_signed, contract, exact, jacobian, over_mapped_axis, pullback, pushforward
from .routing import check_not_differentiated, check_out, wide, without_autocast

_kernel = torch.ops.torch_curvature.gauss_newton_block.default._op
_kernel_out = torch.ops.torch_curvature.gauss_newton_block_out.default
_RANKS = (4, 3, 2)


def gauss_newton_block(g: Tensor, a: Tensor, sign: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Block ``sum_vn sign[v, n] vec(J[v, n]) vec(J[v, n])^T`` of ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]``.

    The cheaper by counted multiply-adds of two forms, with P = O I:

    * the Kronecker sum over pairs of positions ``sum_n sum_st B[n, s, t] (x) a[n, s] a[n, t]^T`` with ``B[n, s, t] =
      sum_v sign g[v, n, s] g[v, n, t]^T``, whose symmetric and antisymmetric halves are products of packed pairs
      ``o <= p`` by ``i <= j``: ``N S^2 P^2 / 4 + N V S^2 O^2``;
    * a rank-k update with chunks of ``J``: ``V N S P + V N P^2 / 2``.

    With V columns the first costs less up to about ``sqrt(1.4 V)`` positions: 3 for V = 10. (On CUDA with one position
    only; elsewhere the second.) Symmetric to the bit. Half types are summed in float32.

    Args:
        g: ``[*, V, N, S, O]``, columns of the square root of the loss Hessian, backpropagated to the layer's output.
        a: ``[*, N, S, I]``, the layer's input, of the dtype and on the device of ``g``.
        sign: ``[*, V, N]``, the weight of each column, -1 for those of a direction of negative curvature; 1 if left
            out.
        out: contiguous ``[O I, O I]`` to write into (no leading axes then): a large fresh result costs much in page
            faults. Not differentiable.

    Returns:
        ``[*, O I, O I]``, rows ``(o, i)``; differentiable to any order in every mode of torch.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: axes missing or of different length, or two devices.
        RuntimeError: a result that does not fit in memory (its size is named), or an unsuitable ``out``.
    """
    if out is not None:
        check_not_differentiated("gauss_newton_block", g, a, sign)
        _kernel_out(g, a, sign, out)
        return out
    return contract((g, a, sign), _RANKS, _shape, _kernel, _GaussNewtonBlock, _formula)


def _shape(g: Tensor, a: Tensor, sign: Tensor | None) -> torch.Size:
    return check_signed("gauss_newton_block", g, a, sign)


def _rows(g: Tensor, a: Tensor) -> Tensor:
    """``[*, V N, O I]``, the Jacobian as a matrix."""
    J = jacobian(g, a)
    V, N, O, I = J.shape[-4:]
    return J.reshape(*J.shape[:-4], V * N, O * I)


def _weighted(rows: Tensor, sign: Tensor | None) -> Tensor:
    return rows if sign is None else rows * wide(sign).reshape(*sign.shape[:-2], -1, 1)


def _formula(g: Tensor, a: Tensor, sign: Tensor | None) -> Tensor:
    J = _rows(g, a)
    with without_autocast(g):
        block = J.mT @ _weighted(J, sign)
    return ((block + block.mT) / 2).to(g.dtype)


class _GaussNewtonBlock(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, a: Tensor, sign: Tensor | None) -> Tensor:
        return _kernel(g, a, sign)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        saved = tuple(t for t in inputs if t is not None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        g, a, *rest = ctx.saved_tensors
        sign = rest[0] if rest else None
        V, N, _, O = g.shape
        J = _rows(g, a)
        with without_autocast(g):
            dJ = J @ wide(gradient + gradient.mT)
        dsign = None if sign is None else ((J * dJ).sum(-1) / 2).reshape(sign.shape).to(sign.dtype)
        return *pullback(_weighted(dJ, sign).reshape(V, N, O, a.shape[-1]), g, a), dsign

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, da: Tensor | None, dsign: Tensor | None) -> Tensor | None:
        g, a, *rest = ctx.saved_tensors
        J, tangent = _rows(g, a), pushforward(g, a, dg, da)
        terms = []
        with without_autocast(g):
            if tangent is not None:
                half = tangent.reshape(J.shape).mT @ _weighted(J, rest[0] if rest else None)
                terms.append(half + half.mT)
            if dsign is not None:
                terms.append(J.mT @ _weighted(J, dsign))
        return sum(terms).to(g.dtype) if terms else None  # type: ignore[union-attr]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], g: Tensor, a: Tensor, sign: Tensor | None) -> tuple[Tensor, int]:
        return over_mapped_axis(axes, (g, a, sign), gauss_newton_block)


@torch.library.register_fake("torch_curvature::gauss_newton_block")
def _fake(g: Tensor, a: Tensor, sign: Tensor | None) -> Tensor:
    exact(_shape(g, a, sign))
    P = g.shape[-1] * a.shape[-1]
    return g.new_empty(P, P)


@torch.library.register_fake("torch_curvature::gauss_newton_block_out")
def _fake_out(g: Tensor, a: Tensor, sign: Tensor | None, out: Tensor) -> None:
    check_out("gauss_newton_block", out, g, _fake(g, a, sign).shape)
