"""Squared Frobenius norms of Jacobians that are never formed: gradient norms per sample, and traces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .jacobian import check_signed, contract, exact, jacobian, over_mapped_axis, pullback, pushforward

_kernel = torch.ops.torch_curvature.jacobian_norms.default._op
_RANKS = (4, 3)


def jacobian_norms(g: Tensor, a: Tensor) -> Tensor:
    """Squared norms ``(J[v, n], J[v, n])_F`` of ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]``.

    The cheapest by counted cost of ``|g|^2 |a|^2`` (one position), ``sum_st (g_s . g_t)(a_s . a_t)`` pair by pair, and
    ``J`` tile by tile, each squared and summed as it leaves the registers. Half types are summed in float32.

    Args:
        g: ``[*, V, N, S, O]``, derivatives with respect to the layer's output; leading axes broadcast.
        a: ``[*, N, S, I]``, the layer's input, of the dtype and on the device of ``g``.

    Returns:
        ``[*, V, N]``, differentiable to any order in every mode of torch.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: axes missing or of different length, or two devices.
    """
    return contract((g, a), _RANKS, _shape, _kernel, _JacobianNorms, _formula)


def _shape(g: Tensor, a: Tensor) -> torch.Size:
    return check_signed("jacobian_norms", g, a, None)


def _formula(g: Tensor, a: Tensor) -> Tensor:
    return jacobian(g, a).square().sum((-2, -1)).to(g.dtype)


class _JacobianNorms(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, a: Tensor) -> Tensor:
        return _kernel(g, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        g, a = ctx.saved_tensors
        return pullback(2 * gradient[..., None, None] * jacobian(g, a), g, a)

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, da: Tensor | None) -> Tensor | None:
        g, a = ctx.saved_tensors
        tangent = pushforward(g, a, dg, da)
        return None if tangent is None else 2 * (jacobian(g, a) * tangent).sum((-2, -1)).to(g.dtype)

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], g: Tensor, a: Tensor) -> tuple[Tensor, int]:
        return over_mapped_axis(axes, (g, a), jacobian_norms)


@torch.library.register_fake("torch_curvature::jacobian_norms")
def _fake(g: Tensor, a: Tensor) -> Tensor:
    exact(_shape(g, a))
    return g.new_empty(g.shape[:2])
