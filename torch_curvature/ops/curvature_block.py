"""Blocks between the parameters of two layers, written straight into their places of a large symmetric matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kronecker_sum import kronecker_sum
from .routing import check_not_differentiated, check_tensors, takes_helpers

_kernel = torch.ops.torch_curvature.curvature_block.default
_together = torch.ops.torch_curvature.curvature_blocks.default._op  # a helper of the CPU
KERNELS = ("cpu", "cuda")  # kinds of device that have one


@dataclass(frozen=True, slots=True)
class Places:
    """Where the entries (o, i) of one side of a block are: at ``start + o per_output + i per_input``.

    With ``last`` (not negative) those of the last input are apart, at ``last + o``: a layer's bias, for which ``a``
    ends in a column of ones.
    """

    start: int
    per_output: int
    per_input: int
    last: int = -1

    def numbers(self) -> list[int]:
        return [self.start, self.per_output, self.per_input, self.last]

    def index(self, O: int, I: int, device: torch.device) -> Tensor:
        """[O I] places in the order (o, i)."""
        o, i = torch.arange(O, device=device)[:, None], torch.arange(I, device=device)
        places = self.start + o * self.per_output + i * self.per_input
        if self.last >= 0 and I:
            places[:, -1] = self.last + o[:, 0]
        return places.reshape(-1)


def curvature_block(
    out: Tensor,
    m: Tensor,
    a: Tensor,
    a2: Tensor | None = None,
    *,
    g: Tensor | None = None,
    d: Tensor | None = None,
    rows: Places,
    columns: Places | None = None,
    add: bool = False,
) -> Tensor:
    """The block of second derivatives between the weights of ``z = W a`` and ``z2 = W2 a2``, into ``out``.

    ``value[(o, i), (p, j)] = sum_n (m[n, o, p] a[n, i] + g[n, o] d[n, i, p]) a2[n, j]`` with ``m = d2 L / dz dz2``,
    ``g = dL / dz`` and ``d = da / dz2``: the second term because a change of W2 changes what W is multiplied with. One
    matrix product, ``2 N O I O2 I2`` flops. Without g and d a block of a Gauss-Newton matrix. Every value goes to
    ``out[row, column]`` and to ``out[column, row]``. Without ``a2`` the block of one layer with itself,
    ``sum_n m[n, o, p] a[n, i] a[n, j]``, for a quarter of the flops.

    Args:
        out: [P, P], its last axis contiguous.
        m: [N, O, O2]; where a2 is left out every m[n] is symmetric, and only its upper triangle is read.
        a, a2: [N, I] inputs of the later layer, [N, I2] of the earlier one.
        g, d: [N, O], [N, D, O2] with D <= I: inputs i >= D (a column of ones) do not depend on z2. Both or neither. Of
            a d that is diagonal, as an elementwise function between the layers makes it, only the diagonal [N, O2].
        rows, columns: where the entries (o, i) and (p, j) are in ``out``. The two must not overlap; ``columns`` is
            left out together with ``a2``.
        add: to what ``out`` holds; else it is written over.

    Returns:
        ``out``. Not differentiable. Half types are summed in float32.

    Raises:
        TypeError: dtypes that are not floating or differ.
        ValueError: two devices.
        RuntimeError: axes missing or of different length, places outside ``out``, an unsuitable ``out``, inputs that
            are differentiated.
    """
    given = {"m": m, "a": a, "a2": a2, "g": g, "d": d, "out": out}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_not_differentiated("curvature_block", *tensors.values())
    if (a2 is None) != (columns is None):
        present, absent = ("columns", "a2") if a2 is None else ("a2", "columns")
        raise ValueError(f"curvature_block: '{present}' is given without '{absent}'. Give both, or neither.")
    check_tensors("curvature_block", **tensors)
    if d is not None and d.dim() == 2 and d.device.type != "cpu":
        d = torch.diag_embed(d)
    if m.device.type in KERNELS:
        _kernel(m, a, a2, g, d, rows.numbers(), [] if columns is None else columns.numbers(), add, out)
        return out
    return _by_kronecker_sum(out, m, a, a2, g, d, rows, columns, add)


class CurvatureBlock(NamedTuple):
    """The arguments of :func:`curvature_block`, with its shapes."""

    out: Tensor
    m: Tensor
    a: Tensor
    a2: Tensor | None
    g: Tensor | None
    d: Tensor | None
    rows: Places
    columns: Places | None
    add: bool


def curvature_blocks(blocks: Sequence[CurvatureBlock]) -> None:
    """:func:`curvature_block` of each, in one go where it can be: their threads wait for one another once.

    No two of them may have a place in common.

    Raises:
        As :func:`curvature_block`.
    """
    if not blocks:
        return
    check_not_differentiated("curvature_block", *(t for b in blocks for t in (b.out, b.m, b.a, b.a2, b.g, b.d)))
    if not takes_helpers(blocks[0].m):
        for out, m, a, a2, g, d, rows, columns, add in blocks:
            curvature_block(out, m, a, a2, g=g, d=d, rows=rows, columns=columns, add=add)
        return
    places = [n for b in blocks for side in (b.rows, b.columns or b.rows) for n in side.numbers()]
    _together(
        [b.m for b in blocks],
        [b.a for b in blocks],
        [b.a2 for b in blocks],
        [b.g for b in blocks],
        [b.d for b in blocks],
        places,
        [b.add for b in blocks],
        [b.out for b in blocks],
    )


def _by_kronecker_sum(
    out: Tensor,
    m: Tensor,
    a: Tensor,
    a2: Tensor | None,
    g: Tensor | None,
    d: Tensor | None,
    rows: Places,
    columns: Places | None,
    add: bool,
) -> Tensor:
    """The same through a temporary, where a device has no kernel for it."""
    right = a if a2 is None else a2
    value = kronecker_sum(m, a, a2, symmetric=a2 is None)
    if g is not None and d is not None:
        D = d.shape[1]
        left = (g[:, :, None] * right[:, None, :]).flatten(1)  # [N, O I2]
        cross = (left.T @ d.flatten(1)).view(g.shape[1], right.shape[1], D, m.shape[2])
        value.view(g.shape[1], a.shape[1], m.shape[2], -1)[:, :D] += cross.permute(0, 2, 3, 1)
    row = rows.index(m.shape[1], a.shape[1], out.device)
    column = row if columns is None else columns.index(m.shape[2], right.shape[1], out.device)
    at = row[:, None], column[None, :]
    out[at] = out[at] + value if add else value
    if columns is not None:
        out[at[1].T, at[0].T] = out[at].T
    return out


@torch.library.register_fake("torch_curvature::curvature_block")
def _fake(
    m: Tensor,
    a: Tensor,
    a2: Tensor | None,
    g: Tensor | None,
    d: Tensor | None,
    rows: list[int],
    columns: list[int],
    add: bool,
    out: Tensor,
) -> None:
    return None
