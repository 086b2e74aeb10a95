"""How the positions of a loss lie in the outputs of the network.

A loss sees positions, each with K classes (K = 1 for an elementwise loss): softmax cross entropy on `[N, K, T]` has T
positions a sample. Inside this package a loss always works on `[N, D, K]`: sample, position, class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The map between outputs `[N, *out]` and positions `[N, D, K]`.

    Without `index` it is a view: `class_axis` of the outputs holds the classes (None: the outputs are only reshaped).
    Else `index [N, D, K]` is the place of each element in the sample's flattened outputs; where samples have unequal
    numbers of positions, `mask [N, D]` is False on the padding.
    """

    shape: torch.Size
    positions: int
    classes: int
    class_axis: int | None = None
    index: Tensor | None = None
    table: Tensor | None = None
    mask: Tensor | None = None

    def read(self, outputs: Tensor) -> Tensor:
        """`[..., N, *out]` to `[..., N, D, K]`."""
        lead = outputs.shape[: outputs.dim() - len(self.shape)]
        size = (*lead, self.shape[0], self.positions, self.classes)
        if self.index is None:
            if self.class_axis is not None and self.class_axis != len(self.shape) - 1:
                outputs = outputs.movedim(len(lead) + self.class_axis, -1)
            return outputs.reshape(size)
        flat = outputs.reshape(*lead, self.shape[0], math.prod(self.shape[1:]))
        index = self.index.reshape(self.shape[0], -1).expand(*lead, -1, -1)
        return flat.gather(-1, index).reshape(size)

    def write(self, x: Tensor) -> Tensor:
        """`[..., N, D, K]` to `[..., N, *out]`; outputs that no position reads are zero."""
        lead = x.shape[:-3]
        if self.index is None:
            if self.class_axis is None or self.class_axis == len(self.shape) - 1:
                return x.reshape(*lead, *self.shape)
            rest = [size for axis, size in enumerate(self.shape) if axis != self.class_axis]
            return x.reshape(*lead, *rest, self.classes).movedim(-1, len(lead) + self.class_axis)
        if self.mask is not None:
            x = x * self.mask.unsqueeze(-1)
        flat = x.new_zeros(*lead, self.shape[0], math.prod(self.shape[1:]))
        index = self.index.reshape(self.shape[0], -1).expand(*lead, -1, -1)
        flat.scatter_add_(-1, index, x.reshape(*lead, self.shape[0], -1))
        return flat.reshape(*lead, *self.shape)

    def rows(self, per_row: Tensor) -> Tensor:
        """`[R, ...]`, one row for each position in the order in which the loss sees them, to `[N, D, ...]`."""
        if self.table is None:
            return per_row.reshape(self.shape[0], self.positions, *per_row.shape[1:])
        return per_row[self.table]


def direct_layout(shape: torch.Size, class_axis: bool) -> Layout:
    """The loss is applied to the outputs themselves: classes on axis 1 (torch's convention), or elementwise."""
    if not class_axis:
        return Layout(shape, math.prod(shape[1:]), 1)
    return Layout(shape, math.prod(shape[2:]), shape[1], class_axis=1)


def traced_layout(shape: torch.Size, places: Tensor, class_axis: bool) -> Layout | None:
    """The loss is applied to a rearrangement of the outputs.

    `places` has the shape of what the loss is applied to, and holds the place of each of its elements in the
    flattened outputs `[N * C]`. None where a position takes its classes from more than one sample.
    """
    samples, width = shape[0], math.prod(shape[1:])
    rows = places.movedim(1, -1).reshape(-1, places.shape[1]) if class_axis else places.reshape(-1, 1)
    owner = rows // width
    if bool((owner != owner[:, :1]).any()):
        return None
    owner, classes = owner[:, 0], rows.shape[1]
    counts = torch.bincount(owner, minlength=samples)
    positions = int(counts.max())
    within = rows % width
    if bool((counts == positions).all()) and bool((owner[1:] >= owner[:-1]).all()):
        index = within.reshape(samples, positions, classes)
        return _as_view(shape, index) or Layout(shape, positions, classes, index=index)
    order = owner.argsort(stable=True)
    slot = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[owner[order]]
    table = owner.new_zeros(samples, positions)
    mask = torch.zeros(samples, positions, dtype=torch.bool, device=order.device)
    table[owner[order], slot] = order
    mask[owner[order], slot] = True
    return Layout(shape, positions, classes, index=within[table], table=table, mask=mask)


def strided_layout(shape: torch.Size, view: Tensor, class_axis: bool) -> Layout | None:
    """As `traced_layout`, for a view of all of the (contiguous) outputs, from its strides alone.

    None where the outputs are rearranged otherwise than by moving one axis to the classes and reshaping.
    """
    whole = torch.empty(shape, device="meta").stride()
    if not class_axis:
        return Layout(shape, math.prod(shape[1:]), 1) if view.is_contiguous() else None
    classes = view.shape[1]
    rows = _bases([view.shape[0], *view.shape[2:]], [view.stride(0), *view.stride()[2:]], view.device)
    for axis in range(1, len(shape)):
        if shape[axis] == classes and whole[axis] == view.stride(1):
            rest = [a for a in range(len(shape)) if a != axis]
            expected = _bases([shape[a] for a in rest], [whole[a] for a in rest], view.device)
            if torch.equal(rows, expected):
                return Layout(shape, math.prod(shape[1:]) // classes, classes, class_axis=axis)
    return None


def _bases(sizes: list[int], strides: list[int], device: torch.device) -> Tensor:
    """The flattened places `sum_a strides[a] i_a`, in C order of the indices i."""
    place = torch.zeros((), dtype=torch.long, device=device)
    for size, stride in zip(sizes, strides):
        place = place.unsqueeze(-1) + stride * torch.arange(size, device=device)
    return place.reshape(-1)


def permuted_layout(shape: torch.Size, free: list[int], coupled: list[int], device: torch.device) -> Layout:
    """Positions run over the axes `free` of the outputs, classes over the axes `coupled`."""
    places = math.prod(shape[a] for a in free)
    width = math.prod(shape[a] for a in coupled)
    order = torch.arange(places * width, device=device).reshape(shape[1:])
    index = order.permute([a - 1 for a in (*free, *coupled)]).reshape(1, places, width).expand(shape[0], -1, -1)
    return _as_view(shape, index) or Layout(shape, places, width, index=index)


def _as_view(shape: torch.Size, index: Tensor) -> Layout | None:
    """The same layout without an index, where the outputs are only reshaped, or one axis of them moved."""
    _, positions, classes = index.shape
    if positions * classes != math.prod(shape[1:]):
        return None
    order = torch.arange(positions * classes, device=index.device).reshape(shape[1:])
    if bool((index == order.reshape(positions, classes)).all()):
        return Layout(shape, positions, classes)
    for axis in range(1, len(shape)):
        if shape[axis] == classes and bool((index == order.movedim(axis - 1, -1).reshape(-1, classes)).all()):
            return Layout(shape, positions, classes, class_axis=axis)
    return None
