"""Diagonals of Gauss-Newton blocks, without the blocks and without the Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .jacobian import check_signed, contract, exact, jacobian, over_mapped_axis, pullback, pushforward
from .routing import wide

_kernel = torch.ops.torch_curvature.gauss_newton_diagonal.default._op
_RANKS = (4, 3, 2)


def gauss_newton_diagonal(g: Tensor, a: Tensor, sign: Tensor | None = None) -> Tensor:
    """Diagonal ``sum_vn sign[v, n] J[v, n]^2``, elementwise, of ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]``.

    One position per sample: one matrix product of squares. Several: each tile of ``J`` is squared and added as it
    leaves the registers. Half types are summed in float32.

    Args:
        g: ``[*, V, N, S, O]``, columns of the square root of the loss Hessian, backpropagated to the layer's output.
        a: ``[*, N, S, I]``, the layer's input, of the dtype and on the device of ``g``.
        sign: ``[*, V, N]``, the weight of each column, -1 for those of a direction of negative curvature; 1 if left
            out.

    Returns:
        ``[*, O, I]``, differentiable to any order in every mode of torch.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: axes missing or of different length, or two devices.
    """
    return contract((g, a, sign), _RANKS, _shape, _kernel, _GaussNewtonDiagonal, _formula)


def _shape(g: Tensor, a: Tensor, sign: Tensor | None) -> torch.Size:
    return check_signed("gauss_newton_diagonal", g, a, sign)


def _weighted(J: Tensor, sign: Tensor | None) -> Tensor:
    return J if sign is None else J * wide(sign)[..., None, None]


def _formula(g: Tensor, a: Tensor, sign: Tensor | None) -> Tensor:
    return _weighted(jacobian(g, a).square(), sign).sum((-4, -3)).to(g.dtype)


class _GaussNewtonDiagonal(torch.autograd.Function):
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
        J = jacobian(g, a)
        weighted = wide(gradient) * J
        dsign = None if sign is None else (weighted * J).sum((-2, -1)).to(sign.dtype)
        return *pullback(2 * _weighted(weighted, sign), g, a), dsign

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, da: Tensor | None, dsign: Tensor | None) -> Tensor | None:
        g, a, *rest = ctx.saved_tensors
        J, tangent = jacobian(g, a), pushforward(g, a, dg, da)
        terms = []
        if tangent is not None:
            terms.append(2 * _weighted(J * tangent, rest[0] if rest else None))
        if dsign is not None:
            terms.append(_weighted(J.square(), dsign))
        return sum(term.sum((-4, -3)) for term in terms).to(g.dtype) if terms else None  # type: ignore[union-attr]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], g: Tensor, a: Tensor, sign: Tensor | None) -> tuple[Tensor, int]:
        return over_mapped_axis(axes, (g, a, sign), gauss_newton_diagonal)


@torch.library.register_fake("torch_curvature::gauss_newton_diagonal")
def _fake(g: Tensor, a: Tensor, sign: Tensor | None) -> Tensor:
    exact(_shape(g, a, sign))
    return g.new_empty(g.shape[-1], a.shape[-1])
