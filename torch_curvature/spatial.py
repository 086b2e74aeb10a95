"""Derivatives through convolutions and what stands between them in autograd's graph, for many columns at once.

Every node here treats its samples alike, so that columns and samples are one batch to it: ``[V, N, *features]`` is
``[V N, *features]``. On the CPU columns go through images in the channels-last format, in which torch convolves almost
twice as fast, and in which what arrives at a layer has the normal form ``g [V, N, S, O]`` without a copy.  What the
nodes saved is brought into that format once and kept with them, for the columns to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .node_kinds import input_shape, output_shape, signed, total
from .ops.pages import in_large_pages
from .ops.routing import takes_helpers

aten = torch.ops.aten
_keep_positive = torch.ops.torch_curvature.keep_positive_.default._op


def prefers_channels_last(x: Tensor) -> bool:
    """Images [*, C, H, W] in a precision and on a device in which torch is faster with them."""
    return x.dim() >= 4 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def channels_last(x: Tensor) -> Tensor:
    """The images ``x [R, C, H, W]`` in that format; a copy where they are not."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    R, C, H, W = x.shape
    return in_large_pages(x, R, H, W, C).permute(0, 3, 1, 2).copy_(x)


def kept_channels_last(node: Any, name: str) -> Tensor:
    """Images that a node saved; the copy stays with the node, that is with the graph."""
    kept: Tensor | None = node.metadata.get((__name__, name))
    if kept is None:
        value = getattr(node, name)
        kept = channels_last(value)
        if kept is not value:
            node.metadata[__name__, name] = kept
    return kept


def saved_like(node: Any, name: str, G: Tensor) -> Tensor:
    """What a node saved of its output or input, to be combined with images ``G [*, N, C, H, W]`` entry by entry."""
    value: Tensor = getattr(node, name)
    if value.dim() == 4 and G.dim() >= 4 and G.stride(-3) == 1 and value.stride(-3) != 1 and prefers_channels_last(G):
        return kept_channels_last(node, name)
    return value


def _meet_turned(G: Tensor, result: Tensor) -> bool:
    """Whether images ``G [V, N, C, H, W]`` lie channels last and those of ``result`` do not: what the helper takes."""
    if G.dim() != 5 or G.shape[1:] != result.shape or G.dtype != result.dtype or not takes_helpers(G):
        return False
    C, _, W = result.shape[1:]
    return C > 1 and G.stride()[2:] == (1, W * C, C) and result.is_contiguous()


def relu_in_place(node: Any, G: Tensor) -> Tensor:
    """``G [V, N, *]`` where the ReLU's result is positive, zero elsewhere; in the memory of G.

    Without a copy of the result in the format of G, which would take longer than all else where there are few columns.
    """
    result: Tensor = node._saved_result
    if _meet_turned(G, result):
        _keep_positive(G, result)
        return G
    found: Tensor = aten.threshold_backward.grad_input(G, saved_like(node, "_saved_result", G), 0, grad_input=G)
    return found


def _joined(G: Tensor) -> Tensor:
    """[V, N, *] -> [V N, *], images in the format that suits them."""
    G = G[0] if G.shape[0] == 1 else G.flatten(0, 1)
    return channels_last(G) if G.dim() == 4 and prefers_channels_last(G) else G


def _parted(x: Tensor, G: Tensor) -> Tensor:
    """[V N, *] -> [V, N, *]."""
    return x.unflatten(0, G.shape[:2])


def _unfilled(G: Tensor, shape: Sequence[int]) -> Tensor:
    """Stands for the input where only its shape is asked for: [V N, *]; memory that nobody touches."""
    images = len(shape) == 4 and prefers_channels_last(G)
    rows = G.shape[0] * shape[0]
    form = torch.channels_last if images else torch.contiguous_format
    return torch.empty((rows, *shape[1:]), dtype=G.dtype, device=G.device, memory_format=form)


# ---------------------------------------------------------------------- convolutions


def _weight(node: Any, like: Tensor) -> Tensor:
    weight: Tensor = node._saved_weight
    return channels_last(weight) if weight.dim() == 4 and prefers_channels_last(like) else weight


def _convolution_input(node: Any, like: Tensor) -> Tensor:
    """What was convolved; where it is the result of a ReLU that node's copy serves both."""
    if node._saved_input.dim() != 4 or not prefers_channels_last(like):
        return node._saved_input
    before = node.next_functions[0][0]
    if before is not None and before.name() == "ReluBackward0":
        return kept_channels_last(before, "_saved_result")
    return kept_channels_last(node, "_saved_input")


def _gradients(node: Any, G: Tensor, input: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = aten.convolution_backward(
        G, input, _weight(node, G), None, node._saved_stride, node._saved_padding, node._saved_dilation,
        node._saved_transposed, node._saved_output_padding, node._saved_groups, wanted,
    )  # fmt: skip
    return found


def convolution_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    if input == 0:
        before = _unfilled(G, input_shape(node, 0))
        found = _gradients(node, _joined(G), before, [True, False, False])[0]
        return None if found is None else _parted(found, G)
    if input == 1:
        wanted = [False, True, False]
        each = (_gradients(node, x, _convolution_input(node, x), wanted)[1] for x in map(_joined, G.split(1)))
        return torch.stack([found for found in each if found is not None])
    return G.flatten(3).sum((1, 3))


def convolution_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    dx, dw, db = tangents

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 4 and prefers_channels_last(x):
            x, weight = channels_last(x), channels_last(weight)
        found: Tensor = aten.convolution(
            x, weight, bias, node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed,
            node._saved_output_padding, node._saved_groups,
        )  # fmt: skip
        return found

    found = None
    if dw is not None:
        found, db = apply(_convolution_input(node, dw), dw, db), None
    if dx is not None:
        part, db = apply(dx, node._saved_weight, db), None
        found = part if found is None else found.add_(part)
    if db is not None:
        found = db.view(-1, *[1] * (len(output_shape(node)) - 2)).expand(output_shape(node))
    return found


# ---------------------------------------------------------------------- pooling


def _pool(node: Any) -> tuple[Any, ...]:
    options = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode)
    return (*options, node._saved_count_include_pad, node._saved_divisor_override)


def average_back(node: Any, G: Tensor, input: int) -> Tensor:
    before = _unfilled(G, input_shape(node, 0))
    return _parted(aten.avg_pool2d_backward(_joined(G), before, *_pool(node)), G)


def average_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    found: Tensor | None = None if tangents[0] is None else aten.avg_pool2d(tangents[0], *_pool(node))
    return found


def adaptive_average_back(node: Any, G: Tensor, input: int) -> Tensor:
    before = _unfilled(G, input_shape(node, 0))
    return _parted(aten._adaptive_avg_pool2d_backward(_joined(G), before), G)


def adaptive_average_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    found: Tensor | None = None
    if tangents[0] is not None:
        found = aten._adaptive_avg_pool2d(tangents[0], output_shape(node)[-2:])
    return found


def largest_back(node: Any, G: Tensor, input: int) -> Tensor:
    before = _unfilled(G, input_shape(node, 0))
    images = before.dim() == 4 and prefers_channels_last(G)
    places = kept_channels_last(node, "_saved_result1") if images else node._saved_result1
    if G.shape[0] > 1:
        places = places.expand(G.shape[0], *places.shape).flatten(0, 1)
    options = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
    found = aten.max_pool2d_with_indices_backward(_joined(G), before, *options, node._saved_ceil_mode, places)
    return _parted(found, G)


def largest_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    if tangents[0] is None:
        return None
    places = node._saved_result1
    return tangents[0].flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)


# ---------------------------------------------------------------------- the rest


def padding_back(node: Any, G: Tensor, input: int) -> Tensor:
    return _parted(F.pad(_joined(G), [-amount for amount in map(signed, node._saved_pad)]), G)


def padding_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    return None if tangents[0] is None else F.pad(tangents[0], [*map(signed, node._saved_pad)])


def _averaged(node: Any, axes: int) -> list[int]:
    return sorted(axis % axes for axis in map(signed, node._saved_dim))


def mean_back(node: Any, G: Tensor, input: int) -> Tensor:
    shape = input_shape(node, 0)
    axes = _averaged(node, len(shape))
    for axis in () if node._saved_keepdim else axes:
        G = G.unsqueeze(1 + axis)
    count = torch.Size([shape[axis] for axis in axes]).numel()
    filled = (G / count).expand(G.shape[0], *shape)
    images = len(shape) == 4 and prefers_channels_last(G)
    return _parted(_joined(filled), G) if images else filled.contiguous()


def mean_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    if tangents[0] is None:
        return None
    return tangents[0].mean(_averaged(node, tangents[0].dim()), keepdim=node._saved_keepdim)


def _per_channel(values: Tensor, axes: int) -> Tensor:
    return values.view(-1, *[1] * (axes - 2))


def _normalised(node: Any, axes: int) -> tuple[Tensor, Tensor]:
    """Of batch normalisation by fixed statistics: what it multiplies with, and the input normalised."""
    spread = (node._saved_running_var + node._saved_eps).rsqrt()
    scale = spread if node._saved_weight is None else spread * node._saved_weight
    return _per_channel(scale, axes), _per_channel(spread, axes)


def normalisation_back(node: Any, G: Tensor, input: int) -> Tensor | None:
    if node._saved_training:
        return None
    axes = G.dim() - 1
    scale, spread = _normalised(node, axes)
    if input == 0:
        return G * scale
    if input == 1:
        G = G * ((node._saved_input - _per_channel(node._saved_running_mean, axes)) * spread)
    return G.sum([axis for axis in range(1, axes + 1) if axis != 2])


def normalisation_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    if node._saved_training:
        raise RuntimeError("batch statistics")
    dx, dw, db = tangents
    axes = len(output_shape(node))
    scale, spread = _normalised(node, axes)
    terms = [] if dx is None else [dx * scale]
    if dw is not None:
        normalised = (node._saved_input - _per_channel(node._saved_running_mean, axes)) * spread
        terms.append(normalised * _per_channel(dw, axes))
    if db is not None:
        terms.append(_per_channel(db, axes).expand(output_shape(node)))
    return total(terms)
