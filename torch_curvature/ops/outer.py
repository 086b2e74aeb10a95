"""Outer products ``u (x) v``, batched: ``[*, m], [*, n] -> [*, m, n]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .routing import (
    Route,
    batch_first,
    broadcast_batch,
    check_not_differentiated,
    check_out,
    check_rank,
    check_tensors,
    promoted,
    route,
    without_autocast,
)

_kernel = torch.ops.torch_curvature.outer.default._op  # the C++ entry itself: no Python frame on the way
_kernel_out = torch.ops.torch_curvature.outer_out.default


def outer(u: Tensor, v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Outer product ``(u (x) v)[*, i, j] = u[*, i] v[*, j]``.

    Args:
        u: ``[*, m]``; leading axes broadcast against those of ``v``.
        v: ``[*, n]``, of the dtype and on the device of ``u``.
        out: contiguous tensor ``[*, m, n]`` to write into; a large fresh result costs more in page faults than in
            arithmetic. Not differentiable.

    Returns:
        ``[*, m, n]``, differentiable to any order in every mode of torch.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: leading axes that do not broadcast, an input without axes, inputs on two devices.
        RuntimeError: a result that does not fit in memory (its size is named), or an unsuitable ``out``.
    """
    if out is not None:
        check_not_differentiated("outer", u, v)
        _kernel_out(u, v, out)
        return out
    try:
        way = route(u, v)
        if way is Route.KERNEL:
            return _kernel(u, v)
    except (RuntimeError, AttributeError, NotImplementedError):
        if (same := promoted(u, v)) is not None:
            return outer(*same)
        _shape(u, v)
        raise
    if (same := promoted(u, v)) is not None:
        return outer(*same)
    shape = _shape(u, v)
    return _Outer.apply(u, v) if way is Route.FUNCTION else _formula(u, v, shape)


def _shape(u: Tensor, v: Tensor) -> torch.Size:
    check_tensors("outer", u=u, v=v)
    check_rank("outer", "u", u, "m")
    check_rank("outer", "v", v, "n")
    return torch.Size([*broadcast_batch("outer", {"u": 1, "v": 1}, u=u, v=v), u.shape[-1], v.shape[-1]])


def _formula(u: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    return u.unsqueeze(-1) * v.unsqueeze(-2)


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, v: Tensor) -> Tensor:
        return _kernel(u, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, v = ctx.saved_tensors
        need_u, need_v = ctx.needs_input_grad
        with without_autocast(u):
            du = (gradient @ v.unsqueeze(-1)).squeeze(-1).sum_to_size(u.shape) if need_u else None
            dv = (gradient.mT @ u.unsqueeze(-1)).squeeze(-1).sum_to_size(v.shape) if need_v else None
        return du, dv

    @staticmethod
    def jvp(ctx: Any, du: Tensor | None, dv: Tensor | None) -> Tensor:
        u, v = ctx.saved_tensors
        terms = [outer(du, v) if du is not None else None, outer(u, dv) if dv is not None else None]
        present = [term for term in terms if term is not None]
        return present[0] if len(present) == 1 else present[0] + present[1]

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, int | None], u: Tensor, v: Tensor) -> tuple[Tensor, int]:
        rank = max(u.dim() - (axes[0] is not None), v.dim() - (axes[1] is not None))
        return outer(batch_first(u, axes[0], info.batch_size, rank), batch_first(v, axes[1], info.batch_size, rank)), 0


@torch.library.register_fake("torch_curvature::outer")
def _fake(u: Tensor, v: Tensor) -> Tensor:
    return u.new_empty(_shape(u, v))


@torch.library.register_fake("torch_curvature::outer_out")
def _fake_out(u: Tensor, v: Tensor, out: Tensor) -> None:
    check_out("outer", out, u, _shape(u, v))
