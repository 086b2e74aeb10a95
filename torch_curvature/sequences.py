"""Derivatives through what sequence models are made of beside dense layers: attention's products and softmax,
normalisation of rows and groups, looked-up rows.

What a node saved serves all columns ``[V, *output]``: nothing of it is copied for each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .node_kinds import Kind, axis_of, input_shape, only_ahead, output_shape, scaled, shared, signed, total
from .ops.routing import takes_helpers

aten = torch.ops.aten

_softmax_back = torch.ops.torch_curvature.softmax_back_.default._op
_layer_norm_back = torch.ops.torch_curvature.layer_norm_back_.default._op

# ---------------------------------------------------------------------- products of batches of matrices

# Entries of one column up to which the columns are put next to one another in each matrix, so that there is one call:
# beyond, the copy that this takes is worth more than the calls.
SIDE_BY_SIDE = 1 << 16


def _times(G: Tensor, right: Tensor) -> Tensor:
    """``G[v] right`` for matrices [B, n, m], without a copy of them for every column."""
    V, B, n, _ = G.shape
    if V > 1 and G[0].numel() <= SIDE_BY_SIDE:
        return torch.bmm(G.transpose(0, 1).reshape(B, V * n, -1), right).view(B, V, n, -1).transpose(0, 1)
    found = G.new_empty(V, B, n, right.shape[2])
    for g, out in zip(G, found):
        torch.bmm(g, right, out=out)
    return found


def _before(left: Tensor, G: Tensor) -> Tensor:
    """``left G[v]``."""
    V, B, n, p = G.shape
    if V > 1 and G[0].numel() <= SIDE_BY_SIDE:
        return torch.bmm(left, G.permute(1, 2, 0, 3).reshape(B, n, V * p)).view(B, -1, V, p).permute(2, 0, 1, 3)
    found = G.new_empty(V, B, left.shape[1], p)
    for g, out in zip(G, found):
        torch.bmm(left, g, out=out)
    return found


def _bmm_back(node: Any, G: Tensor, input: int) -> Tensor:
    return _times(G, node._saved_mat2.mT) if input == 0 else _before(node._saved_self.mT, G)


def _bmm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    d1, d2 = tangents
    found = None if d1 is None else torch.bmm(d1, node._saved_mat2)
    if d2 is not None:
        found = torch.bmm(node._saved_self, d2) if found is None else found.baddbmm_(node._saved_self, d2)
    return found


def _baddbmm_back(node: Any, G: Tensor, input: int) -> Tensor:
    if input == 0:
        return shared(scaled(G, node._saved_beta), input_shape(node, 0))
    product = _times(G, node._saved_batch2.mT) if input == 1 else _before(node._saved_batch1.mT, G)
    return scaled(product, node._saved_alpha)


def _baddbmm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    d0, d1, d2 = tangents
    terms = [] if d0 is None else [scaled(d0, node._saved_beta).expand(output_shape(node))]
    if d1 is not None:
        terms.append(scaled(torch.bmm(d1, node._saved_batch2), node._saved_alpha))
    if d2 is not None:
        terms.append(scaled(torch.bmm(node._saved_batch1, d2), node._saved_alpha))
    return total(terms)


# ---------------------------------------------------------------------- softmax


def _is_last(node: Any) -> bool:
    axes = node._saved_result.dim()
    return axes > 0 and axis_of(node, axes) == axes - 1


def _helped(G: Tensor, *saved: Tensor | None) -> bool:
    """Whether the helpers of the CPU take what a node saved."""
    alike = (t is None or (type(t) is Tensor and t.dtype == G.dtype and t.is_contiguous()) for t in saved)
    return takes_helpers(G) and all(alike)


def _softmax(node: Any, G: Tensor, fresh: bool) -> Tensor:
    """In the memory of G where it is ``fresh``, that is, nobody else's."""
    p = node._saved_result
    if _is_last(node) and _helped(G, p):
        found = G if fresh and G.is_contiguous() else G.new_empty(G.shape).copy_(G)
        _softmax_back(found.view(len(G), -1, p.shape[-1]), p)
        return found
    found = G.new_empty(G.shape)  # contiguous: torch writes wrong numbers into any other (2.14)
    for g, out in zip(G, found):
        aten._softmax_backward_data.out(g, p, axis_of(node, p.dim()), p.dtype, grad_input=out)
    return found


def _softmax_ahead(node: Any, x: Tensor) -> Tensor:
    p = node._saved_result
    return p * (x - (p * x).sum(axis_of(node, p.dim()), keepdim=True))


def _log_softmax_back(node: Any, G: Tensor, input: int) -> Tensor:
    p = node._saved_result.exp()
    return G - p * G.sum(1 + axis_of(node, p.dim()), keepdim=True)


def _log_softmax_ahead(node: Any, x: Tensor) -> Tensor:
    p = node._saved_result.exp()
    return x - (p * x).sum(axis_of(node, p.dim()), keepdim=True)


SOFTMAX = Kind(lambda node, G, input: _softmax(node, G, False), only_ahead(_softmax_ahead))

# ---------------------------------------------------------------------- normalisation


def _rows(node: Any) -> tuple[Tensor, list[int]]:
    """The input normalised, and the axes of a row."""
    x, shape = node._saved_input, node._saved_normalized_shape
    return (x - node._saved_result1) * node._saved_result2, list(range(x.dim() - len(shape), x.dim()))


def _layer_norm(node: Any, G: Tensor, input: int, fresh: bool) -> Tensor:
    if input > 0:
        return shared(G * _rows(node)[0] if input == 1 else G, input_shape(node, input))
    saved, weight = (node._saved_input, node._saved_result1, node._saved_result2), node._saved_weight
    weight = None if weight is None else weight.detach()
    if _helped(G, *saved, weight):
        found = G if fresh and G.is_contiguous() else G.new_empty(G.shape).copy_(G)
        row = torch.Size(node._saved_normalized_shape).numel()
        _layer_norm_back(found.view(len(G), -1, row), *saved, weight)
        return found
    found = G.new_empty(G.shape)
    x, mean, scale = saved
    for g, out in zip(G, found):
        wanted = [True, False, False]
        out.copy_(
            aten.native_layer_norm_backward(g, x, node._saved_normalized_shape, mean, scale, weight, None, wanted)[0]
        )
    return found


def _layer_norm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    dx, dw, db = tangents
    normalised, axes = _rows(node)
    terms = []
    if dx is not None:
        moved = dx - dx.mean(axes, keepdim=True) - normalised * (normalised * dx).mean(axes, keepdim=True)
        moved = moved * node._saved_result2
        terms.append(moved if node._saved_weight is None else moved * node._saved_weight)
    if dw is not None:
        terms.append(normalised * dw)
    if db is not None:
        terms.append(db.expand(output_shape(node)))
    return total(terms)


def _groups(node: Any, x: Tensor) -> Tensor:
    """[*, N, C, *place] -> [*, N, groups, entries]."""
    lead = x.dim() - node._saved_input.dim()
    return x.reshape(*x.shape[: lead + 1], node._saved_group, -1)


def _less_projections(node: Any, x: Tensor) -> Tensor:
    """Groups [*, N, groups, entries] without their mean and their part along the input, scaled: what the symmetric
    derivative of the normalisation makes of them."""
    normalised = _normalised_groups(node)
    along = (normalised * x).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True) - normalised * along) * node._saved_result2.unsqueeze(-1)


def _normalised_groups(node: Any) -> Tensor:
    normalised: Tensor = _groups(node, node._saved_input) - node._saved_result1.unsqueeze(-1)
    return normalised * node._saved_result2.unsqueeze(-1)


def _by_channel(values: Tensor, node: Any) -> Tensor:
    return values.view(-1, *[1] * (node._saved_input.dim() - 2))


def _group_norm_back(node: Any, G: Tensor, input: int) -> Tensor:
    if input > 0:
        G = G * _normalised_groups(node).view(node._saved_input.shape) if input == 1 else G
        return G.sum([axis for axis in range(1, G.dim()) if axis != 2])
    weight = node._saved_weight
    rows = _groups(node, G if weight is None else G * _by_channel(weight.detach(), node))
    saved = _groups(node, node._saved_input), node._saved_result1, node._saved_result2
    if not _helped(rows, *saved):
        return _less_projections(node, rows).view(G.shape)
    if weight is None or not rows.is_contiguous():
        rows = rows.new_empty(rows.shape).copy_(rows)
    _layer_norm_back(rows.view(len(G), -1, rows.shape[-1]), *saved, None)
    return rows.view(G.shape)


def _group_norm_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    dx, dw, db = tangents
    shape, terms = output_shape(node), []
    if dx is not None:
        moved = _less_projections(node, _groups(node, dx)).view(shape)
        terms.append(moved if node._saved_weight is None else moved * _by_channel(node._saved_weight, node))
    if dw is not None:
        terms.append(_normalised_groups(node).view(shape) * _by_channel(dw, node))
    if db is not None:
        terms.append(_by_channel(db, node).expand(shape))
    return total(terms)


# ---------------------------------------------------------------------- rows of a table


def _looked_up_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    return None  # sums over samples are for the rules of layers to make


def _looked_up_ahead(node: Any, table: Tensor) -> Tensor:
    if node._saved_scale_grad_by_freq or signed(node._saved_padding_idx) >= 0:
        raise RuntimeError("left to forward mode: rows without gradient")
    return F.embedding(node._saved_indices, table)


SEQUENCES: dict[str, Kind] = {
    "BmmBackward0": Kind(_bmm_back, _bmm_ahead),
    "BaddbmmBackward0": Kind(_baddbmm_back, _baddbmm_ahead),
    "SoftmaxBackward0": SOFTMAX,
    "SafeSoftmaxBackward0": SOFTMAX,
    "LogSoftmaxBackward0": Kind(_log_softmax_back, only_ahead(_log_softmax_ahead)),
    "NativeLayerNormBackward0": Kind(lambda node, G, input: _layer_norm(node, G, input, False), _layer_norm_ahead),
    "NativeGroupNormBackward0": Kind(_group_norm_back, _group_norm_ahead),
    "EmbeddingBackward0": Kind(_looked_up_back, only_ahead(_looked_up_ahead)),
}
IN_PLACE: dict[str, Any] = {
    **{f"{name}Backward0": lambda node, G, input: _softmax(node, G, True) for name in ("Softmax", "SafeSoftmax")},
    "NativeLayerNormBackward0": lambda node, G, input: _layer_norm(node, G, input, True),
}
