"""What the contractions of Jacobians ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]`` share: checks, routes, derivatives.

Every one of them is a quadratic form ``Q(J, J)``. Its kernel never forms ``J``; its plain formula and its derivatives
do: with ``dQ = Q(dJ, J) + Q(J, dJ)`` they are exact to any order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .routing import (
    Route,
    broadcast_batch,
    check_rank,
    check_size,
    check_tensors,
    promoted,
    route,
    wide,
    without_autocast,
)

Operands = tuple[Tensor | None, ...]


def check_jacobian(op: str, g: Tensor, a: Tensor, g_name: str = "g", a_name: str = "a") -> None:
    """``g`` is ``[*, V, N, S, O]`` and ``a`` is ``[*, N, S, I]``."""
    check_rank(op, g_name, g, "V, N, S, O")
    check_rank(op, a_name, a, "N, S, I")
    check_size(op, a_name, a, -3, g_name, g, -3)
    check_size(op, a_name, a, -2, g_name, g, -2)


def check_signed(op: str, g: Tensor, a: Tensor, sign: Tensor | None) -> torch.Size:
    """The leading axes of ``g``, ``a`` and ``sign [*, V, N]``, once their shapes are found to fit."""
    given = {"g": g, "a": a} if sign is None else {"g": g, "a": a, "sign": sign}
    check_tensors(op, **given)
    check_jacobian(op, g, a)
    if sign is not None:
        check_rank(op, "sign", sign, "V, N")
        check_size(op, "sign", sign, -2, "g", g, -4)
        check_size(op, "sign", sign, -1, "g", g, -3)
    return broadcast_batch(op, {"g": 4, "a": 3, "sign": 2}, **given)


def exact(batch: torch.Size) -> None:
    """What the kernels themselves demand: no leading axes."""
    if batch:
        raise RuntimeError(f"the kernel takes no leading axes, got {list(batch)}")


def jacobian(g: Tensor, a: Tensor) -> Tensor:
    """``[*, V, N, S, O], [*, N, S, I] -> [*, V, N, O, I]``."""
    with without_autocast(g):
        return wide(g).mT @ wide(a).unsqueeze(-4)


def pullback(dJ: Tensor, g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative ``dJ [V, N, O, I]`` with respect to the Jacobian, as ones with respect to ``g`` and ``a``."""
    with without_autocast(g):
        dg = wide(a).unsqueeze(-4) @ dJ.mT
        da = (wide(g) @ dJ).sum(-4)
    return dg.to(g.dtype), da.to(a.dtype)


def pushforward(g: Tensor, a: Tensor, dg: Tensor | None, da: Tensor | None) -> Tensor | None:
    """The tangent of the Jacobian."""
    terms = [jacobian(x, y) for x, y in ((dg, a), (g, da)) if x is not None and y is not None]
    return None if not terms else terms[0] if len(terms) == 1 else terms[0] + terms[1]


def contract(
    operands: Operands,
    ranks: tuple[int, ...],
    shape: Callable[..., torch.Size],
    kernel: Callable[..., Tensor],
    function: type[torch.autograd.Function],
    formula: Callable[..., Tensor],
) -> Tensor:
    """The operator by the route that is right here.

    Args:
        operands: the operator's tensors, None where one is left out.
        ranks: how many trailing axes belong to each; the others are leading axes, of which the kernel knows nothing.
        shape: checks the operands and returns their broadcast leading axes.
    """
    given = tuple(t for t in operands if t is not None)
    try:
        way = route(*given)
        if way is Route.KERNEL:
            return kernel(*operands)
    except (RuntimeError, AttributeError, NotImplementedError):
        if (same := promoted(*given)) is not None:
            rest = iter(same)
            operands = tuple(None if t is None else next(rest) for t in operands)
            return contract(operands, ranks, shape, kernel, function, formula)
        batch = shape(*operands)
        if not batch:
            raise
        return _over_batch(operands, ranks, batch, lambda *each: kernel(*each))
    if (same := promoted(*given)) is not None:
        rest = iter(same)
        operands = tuple(None if t is None else next(rest) for t in operands)
    batch = shape(*operands)
    if way is Route.PLAIN:
        return formula(*operands)
    return _over_batch(operands, ranks, batch, function.apply) if batch else function.apply(*operands)


def _over_batch(operands: Operands, ranks: tuple[int, ...], batch: torch.Size, call: Callable[..., Tensor]) -> Tensor:
    """One call for each place of the leading axes."""
    flat = [
        None if t is None else t.expand(*batch, *t.shape[t.dim() - rank :]).reshape(-1, *t.shape[t.dim() - rank :])
        for t, rank in zip(operands, ranks)
    ]
    if batch.numel() == 0:
        single = call(*(None if t is None else t.new_zeros(t.shape[1:]) for t in flat))
        return single.new_empty(*batch, *single.shape)
    # unbind, not indexing: indexing a fake CUDA tensor asks for a CUDA that a CPU-only torch does not have
    each = zip(*([None] * batch.numel() if t is None else t.unbind(0) for t in flat))
    results = torch.stack([call(*place) for place in each])
    return results.reshape(*batch, *results.shape[1:])


def over_mapped_axis(
    axes: tuple[int | None, ...], operands: Operands, call: Callable[..., Tensor]
) -> tuple[Tensor, int]:
    """``vmap`` of an operator without leading axes: the mapped axis becomes a leading one."""
    mapped = (t if t is None or axis is None else t.movedim(axis, 0) for t, axis in zip(operands, axes))
    return call(*mapped), 0
