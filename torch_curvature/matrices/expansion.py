"""From second derivatives in activation space to blocks between parameters.

For two uses ``z_l = W_l a_l`` and, later, ``z_m = W_m a_m``, with ``M = d2 L / dz_m dz_l``, ``g = dL/dz_m`` and
``D = d a_m / d z_l`` (zero where l is not before m),

    H[(p, j), (o, i)] = sum_n  M[n][p, o] a_m[n, j] a_l[n, i]  +  g[n, p] D[n][j, o] a_l[n, i]

and sums over the positions s, t of a sample where there are several.  The first term because z is linear in W, the
second because a change of ``W_l`` changes what ``W_m`` is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..factors import CACHE_ELEMENTS, mirror_upper, samples_per_chunk
from ..ops import kronecker_sum
from ..second_order import Node

Cross = tuple[Tensor, Tensor]  # g [N, S, O] of the later use, D [N, (t, j), (s, o)]
Scratch = Callable[[int, int, torch.dtype], "Tensor | None"]


def _fresh(rows: int, columns: int, dtype: torch.dtype) -> None:
    return None


def pair_block(
    later: Node, earlier: Node, M: Tensor | None, cross: Cross | None, scratch: Scratch = _fresh
) -> Tensor | None:
    """Block [O_m I_m, O_l I_l] between two uses, rows of the later one; None where it vanishes identically.

    Args:
        M: [N, (t, p), (s, o)], second derivatives that have gone through both rules.
        scratch: gives memory [rows, columns] for the result; None for fresh memory.
    """
    if M is None and cross is None:
        return None
    if later is earlier and M is not None and later.a is not None and later.a.shape[1] == 1:
        side = M.shape[1] * later.a.shape[2]
        return kronecker_sum(M, later.a[:, 0], symmetric=True, out=scratch(side, side, M.dtype))
    positions = [1 if node.a is None else node.a.shape[1] for node in (later, earlier)]
    if positions == [1, 1]:
        block = None if M is None else _one_position(later.a, earlier.a, M, scratch)
        if cross is not None:
            block = _add_cross(block, later, earlier.a, *cross)
    else:
        block = _many_positions(later, earlier, positions, M, cross)
    return mirror_upper(block) if later is earlier and block is not None else block


def _one_position(a: Tensor | None, a2: Tensor | None, M: Tensor, scratch: Scratch) -> Tensor:
    N, O, O2 = M.shape
    if a is not None and a2 is not None:
        out = scratch(O * a.shape[2], O2 * a2.shape[2], M.dtype)
        return kronecker_sum(M, a[:, 0], a2[:, 0], out=out)
    if a2 is not None:
        return (M.reshape(N, -1).T @ a2[:, 0]).view(O, -1)
    if a is not None:
        return (M.mT.reshape(N, -1).T @ a[:, 0]).view(O2, O, -1).permute(1, 2, 0).reshape(-1, O2)
    return M.sum(0)


def _add_cross(block: Tensor | None, later: Node, a2: Tensor | None, g: Tensor, D: Tensor) -> Tensor:
    """``block += sum_n g[n, p] D[n][j, o] a2[n, i]``; pairs (j, o) that no sample connects cost nothing."""
    assert later.a is not None
    N, O, J, O2 = g.shape[0], g.shape[2], later.a.shape[2], D.shape[2]
    left = g[:, 0] if a2 is None else (g[:, 0, :, None] * a2[:, 0, None, :]).reshape(N, -1)
    I2 = 1 if a2 is None else a2.shape[2]
    if block is None:
        block = g.new_zeros(O * J, O2 * I2)
    target = block.view(O, J, O2, I2)
    connected = D.abs().amax(0).ne(0)  # also where some entry is no number
    j, o = connected.nonzero(as_tuple=True)
    if 4 * len(j) > 3 * J * O2:
        target += (left.T @ D.reshape(N, -1)).view(O, I2, J, O2).permute(0, 2, 3, 1)
    elif len(j):
        target[:, j, o] += (left.T @ D[:, j, o]).view(O, I2, -1).transpose(1, 2)
    return block


def _many_positions(
    later: Node, earlier: Node, positions: Sequence[int], M: Tensor | None, cross: Cross | None
) -> Tensor:
    T, S = positions
    some = M if M is not None else cross[1] if cross is not None else None
    assert some is not None
    N, K2 = some.shape[0], some.shape[2]
    O2 = K2 // S
    I, I2 = (1 if node.a is None else node.a.shape[2] for node in (later, earlier))
    O = M.shape[1] // T if M is not None else cross[0].shape[2] if cross is not None else 0
    total = some.new_zeros(O * I * O2, I2)
    step = samples_per_chunk(O * I * K2, 4 * CACHE_ELEMENTS)
    for start in range(0, N, step):
        chunk = slice(start, min(N, start + step))
        n = chunk.stop - start
        spread: Tensor | None = None  # [n, p, j, (s, o)]
        if M is not None:
            Mn = M[chunk].reshape(n, T, O * K2)
            if later.a is None:
                spread = Mn.view(n, O, 1, K2)
            else:
                spread = torch.matmul(later.a[chunk].mT.to(Mn.dtype), Mn).view(n, I, O, K2).transpose(1, 2)
        if cross is not None:
            g, D = cross
            part = torch.matmul(g[chunk].mT, D[chunk].reshape(n, T, I * K2)).view(n, O, I, K2)
            spread = part if spread is None else spread + part
        assert spread is not None
        columns = spread.reshape(n, O * I, S, O2).permute(1, 3, 0, 2).reshape(O * I * O2, n * S)
        if earlier.a is None:
            total += columns.sum(1, keepdim=True)
        else:
            total += columns @ earlier.a[chunk].reshape(n * S, I2).to(columns.dtype)
    return total.view(O * I, O2 * I2)


def pair_diagonal(node: Node, M: Tensor) -> Tensor:
    """Diagonal [O, I] of a use's block with itself: ``sum_n sum_st a[n,s,i] M[n][(s,o),(t,o)] a[n,t,i]``."""
    S = 1 if node.a is None else node.a.shape[1]
    N, O = M.shape[0], M.shape[1] // S
    own = M.view(N, S, O, S, O).diagonal(dim1=2, dim2=4)  # [N, S, S, O]
    if node.a is None:
        return own.reshape(N, O).sum(0).unsqueeze(1)
    if S == 1:
        return own.reshape(N, O).T @ node.a[:, 0].square()
    I = node.a.shape[2]
    total = M.new_zeros(O, I)
    step = samples_per_chunk(S * O * I, 4 * CACHE_ELEMENTS)
    for start in range(0, N, step):
        a = node.a[start : start + step]
        n = a.shape[0]
        moved = torch.matmul(own[start : start + step].permute(0, 1, 3, 2).reshape(n, S * O, S), a)
        total += (moved.view(n, S, O, I) * a.unsqueeze(2)).sum((0, 1))
    return total
