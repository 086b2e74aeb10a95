"""Sums of Kronecker products ``sum_n b[n] (x) a[n] a2[n]^T``: blocks of Gauss-Newton and Hessian matrices."""

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
    check_size,
    check_tensors,
    promoted,
    route,
    wide,
    without_autocast,
)

_kernel = torch.ops.torch_curvature.kronecker_sum.default._op  # the C++ entry itself: no Python frame on the way
_kernel_out = torch.ops.torch_curvature.kronecker_sum_out.default


def kronecker_sum(
    b: Tensor, a: Tensor, a2: Tensor | None = None, *, symmetric: bool = False, out: Tensor | None = None
) -> Tensor:
    """Sum over samples of Kronecker products: ``G[(o, i), (p, j)] = sum_n b[n, o, p] a[n, i] a2[n, j]``.

    With ``b[n] = sum_v g[v, n] g[v, n]^T`` this is the exact Gauss-Newton block of the weight of ``z = W a``; with the
    Hessian of the loss with respect to ``z`` in place of ``b``, the exact Hessian block. One matrix product of pairs
    ``(o, p)`` by pairs ``(i, j)``. Where ``a2`` is left out only the pairs ``i <= j`` are multiplied, and with
    ``symmetric=True`` only ``o <= p``: a quarter of the flops, and a result that is symmetric to the bit.

    Args:
        b: ``[*, N, O, O2]``; leading axes broadcast.
        a: ``[*, N, I]``, of the dtype and on the device of ``b``.
        a2: ``[*, N, I2]``; ``a`` where left out.
        symmetric: declares that every ``b[n]`` is symmetric; only its upper triangle is read. Needs ``a2`` left out.
        out: contiguous tensor to write into: a large fresh result costs much in page faults. Not differentiable.

    Returns:
        ``[*, O I, O2 I2]``, rows ``(o, i)``, columns ``(p, j)``. Half types are summed in float32. Derivatives are
        those of the formula above, also where ``symmetric`` is declared.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: axes missing or of different length, ``symmetric`` with ``a2`` or with O != O2, two devices.
        RuntimeError: a result that does not fit in memory (its size is named), or an unsuitable ``out``.
    """
    if out is not None:
        check_not_differentiated("kronecker_sum", b, a, a2)
        _kernel_out(b, a, a2, symmetric, out)
        return out
    given = (b, a) if a2 is None else (b, a, a2)
    try:
        way = route(b, a, a2)
        if way is Route.KERNEL:
            return _kernel(b, a, a2, symmetric)
    except (RuntimeError, AttributeError, NotImplementedError):
        if (same := promoted(*given)) is not None:
            return kronecker_sum(*same, symmetric=symmetric)
        _shape(b, a, a2, symmetric)
        raise
    if (same := promoted(*given)) is not None:
        return kronecker_sum(*same, symmetric=symmetric)
    _shape(b, a, a2, symmetric)
    return _KroneckerSum.apply(b, a, a2, symmetric) if way is Route.FUNCTION else _formula(b, a, a2, symmetric)


def _shape(b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool) -> torch.Size:
    op = "kronecker_sum"
    right = a if a2 is None else a2
    check_tensors(op, b=b, a=a, a2=right)
    check_rank(op, "b", b, "N, O, O2")
    check_rank(op, "a", a, "N, I")
    check_rank(op, "a2", right, "N, I2")
    check_size(op, "a", a, -2, "b", b, -3)
    check_size(op, "a2", right, -2, "b", b, -3)
    if symmetric and (a2 is not None or b.shape[-1] != b.shape[-2]):
        raise ValueError(
            f"{op}: symmetric=True says that every b[n] is symmetric and that 'a2' is left out; got 'b' of shape "
            f"{list(b.shape)} and {'no ' if a2 is None else 'an '}'a2'."
        )
    batch = broadcast_batch(op, {"b": 3, "a": 2, "a2": 2}, b=b, a=a, a2=right)
    return torch.Size([*batch, b.shape[-2] * a.shape[-1], b.shape[-1] * right.shape[-1]])


def _pairs(a: Tensor, a2: Tensor) -> Tensor:
    """``[*, N, I], [*, N, I2] -> [*, N, I I2]``."""
    return (a.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2)


def _exchange(matrix: Tensor, first: int, second: int, third: int, fourth: int) -> Tensor:
    """``[*, (first, second), (third, fourth)] -> [*, (first, third), (second, fourth)]``, its own inverse."""
    leading = matrix.shape[:-2]
    exchanged = matrix.reshape(*leading, first, second, third, fourth).transpose(-3, -2)
    return exchanged.reshape(*leading, first * third, second * fourth)


def _formula(b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool) -> Tensor:
    O, O2 = b.shape[-2:]
    wide_b, left = wide(b), wide(a)
    right = left if a2 is None else wide(a2)
    with without_autocast(b):
        product = wide_b.flatten(-2).mT @ _pairs(left, right)  # [*, O O2, I I2]
    result = _exchange(product, O, O2, a.shape[-1], right.shape[-1])
    if symmetric:
        result = (result + result.mT) / 2
    return result.to(b.dtype)


class _KroneckerSum(torch.autograd.Function):
    @staticmethod
    def forward(b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool) -> Tensor:
        return _kernel(b, a, a2, symmetric)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
        b, a, a2, ctx.symmetric = inputs
        ctx.has_a2 = a2 is not None
        saved = (b, a) if a2 is None else (b, a, a2)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        b, a, *rest = ctx.saved_tensors
        a2 = rest[0] if ctx.has_a2 else a
        if ctx.symmetric:
            gradient = (gradient + gradient.mT) / 2
        (O, O2), I, I2 = b.shape[-2:], a.shape[-1], a2.shape[-1]
        by_pairs = wide(_exchange(gradient, O, I, O2, I2))  # rows (o, p), columns (i, j), as in the forward product
        need_b, need_a, need_a2, _ = ctx.needs_input_grad
        db = da = da2 = None
        with without_autocast(b):
            if need_b:
                db = _pairs(wide(a), wide(a2)) @ by_pairs.mT
                db = db.reshape(*db.shape[:-1], O, O2)
            if need_a or need_a2:
                folded = wide(b).flatten(-2) @ by_pairs
                folded = folded.reshape(*folded.shape[:-1], I, I2)  # [*, N, I, I2]
                da = (folded @ wide(a2).unsqueeze(-1)).squeeze(-1)
                da2 = (folded.mT @ wide(a).unsqueeze(-1)).squeeze(-1)
        if not ctx.has_a2 and da is not None and da2 is not None:
            da, da2 = da + da2, None
        pairs = ((db, b), (da if need_a else None, a), (da2 if need_a2 else None, a2))
        db, da, da2 = (None if d is None else d.sum_to_size(x.shape).to(x.dtype) for d, x in pairs)
        return db, da, da2, None

    @staticmethod
    def jvp(ctx: Any, db: Tensor | None, da: Tensor | None, da2: Tensor | None, _: None) -> Tensor:
        b, a, *rest = ctx.saved_tensors
        a2 = rest[0] if ctx.has_a2 else None
        terms = []
        if db is not None:
            terms.append(kronecker_sum(db, a, a2, symmetric=ctx.symmetric))
        if da is not None:
            terms.append(kronecker_sum(b, da, a if a2 is None else a2))
        right = da if a2 is None else da2
        if right is not None:
            terms.append(kronecker_sum(b, a, right))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    @staticmethod
    def vmap(
        info: Any, axes: tuple[int | None, ...], b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool
    ) -> tuple[Tensor, int]:
        core = ((b, axes[0], 3), (a, axes[1], 2), *(() if a2 is None else ((a2, axes[2], 2),)))
        leading = max(t.dim() - (axis is not None) - rank for t, axis, rank in core)
        b, a, *rest = (batch_first(t, axis, info.batch_size, leading + rank) for t, axis, rank in core)
        return kronecker_sum(b, a, rest[0] if rest else None, symmetric=symmetric), 0


@torch.library.register_fake("torch_curvature::kronecker_sum")
def _fake(b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool) -> Tensor:
    return b.new_empty(_shape(b, a, a2, symmetric))


@torch.library.register_fake("torch_curvature::kronecker_sum_out")
def _fake_out(b: Tensor, a: Tensor, a2: Tensor | None, symmetric: bool, out: Tensor) -> None:
    check_out("kronecker_sum", out, b, _shape(b, a, a2, symmetric))
