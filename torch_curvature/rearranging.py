"""Derivatives through what only moves, repeats or adds up numbers, or multiplies them entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .node_kinds import Kind, alike, axis_of, input_shape, only_ahead, output_shape, scaled, shared, signed, total

aten = torch.ops.aten

# ---------------------------------------------------------------------- axes


def _reshaped_back(node: Any, G: Tensor, input: int) -> Tensor:
    return G.reshape(G.shape[0], *input_shape(node, 0))


def _swapped(node: Any, x: Tensor, lead: int) -> Tensor:
    axes = x.dim() - lead
    return x.transpose(lead + axis_of(node, axes, "_saved_dim0"), lead + axis_of(node, axes, "_saved_dim1"))


def _order(node: Any) -> list[int]:
    return [signed(axis) % len(node._saved_dims) for axis in node._saved_dims]


def _permuted_back(node: Any, G: Tensor, input: int) -> Tensor:
    order = _order(node)
    return G.permute(0, *(1 + order.index(axis) for axis in range(len(order))))


RESHAPED = Kind(_reshaped_back, only_ahead(lambda node, x: x.reshape(output_shape(node))))
SWAPPED = Kind(lambda node, G, input: _swapped(node, G, 1), only_ahead(lambda node, x: _swapped(node, x, 0)))
PERMUTED = Kind(_permuted_back, only_ahead(lambda node, x: x.permute(_order(node))))
EXPANDED = Kind(
    lambda node, G, input: shared(G, input_shape(node, 0)), only_ahead(lambda node, x: x.expand(output_shape(node)))
)

# ---------------------------------------------------------------------- parts and wholes


def _selected(node: Any, x: Tensor, lead: int) -> Tensor:
    return x.select(lead + axis_of(node, x.dim() - lead), signed(node._saved_index))


def _sliced(node: Any, x: Tensor, lead: int) -> Tensor:
    axis = lead + axis_of(node, x.dim() - lead)
    found: Tensor = aten.slice(x, axis, signed(node._saved_start), signed(node._saved_end), node._saved_step)
    return found


# Parts of what a node was given: (node, [V, *input] or [*input], axes before) -> a view.
PARTS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {"SelectBackward0": _selected, "SliceBackward0": _sliced}


def _part(view: Callable[[Any, Tensor, int], Tensor]) -> Kind:
    def back(node: Any, G: Tensor, input: int) -> Tensor:
        full = G.new_zeros(G.shape[0], *input_shape(node, 0))
        view(node, full, 1).copy_(G)
        return full

    return Kind(back, only_ahead(lambda node, x: view(node, x, 0)))


def _parts(node: Any, Gs: list[Tensor | None]) -> list[Tensor]:
    """Zeros where nothing arrived."""
    some = next(G for G in Gs if G is not None)
    shapes = (meta.shape for meta in node._input_metadata)
    return [some.new_zeros(some.shape[0], *shape) if G is None else G for G, shape in zip(Gs, shapes)]


def _split_back(node: Any, Gs: list[Tensor | None], input: int) -> Tensor:
    return torch.cat(_parts(node, Gs), 1 + axis_of(node, len(input_shape(node, 0))))


def _split_ahead(node: Any, x: Tensor) -> list[Tensor]:
    axis = axis_of(node, x.dim())
    return list(x.split([meta.shape[axis] for meta in node._input_metadata], axis))


def _joined_back(node: Any, G: Tensor, input: int) -> Tensor:
    axis = axis_of(node, G.dim() - 1)
    shapes = [() if before is None else input_shape(node, k) for k, (before, _) in enumerate(node.next_functions)]
    sizes = [shape[axis] if axis < len(shape) else 0 for shape in shapes]
    if 0 in sizes[:input]:  # of what has no gradient the size is not known
        sizes = _completed(sizes, G.shape[1 + axis])
    return G.narrow(1 + axis, sum(sizes[:input]), sizes[input])


def _completed(sizes: list[int], whole: int) -> list[int]:
    """Sizes of all parts, where one of them is not known (0)."""
    if sizes.count(0) > 1:
        raise RuntimeError("left to autograd: parts of unknown sizes")
    return [whole - sum(sizes) if size == 0 else size for size in sizes]


def _joined_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    some = next((t for t in tangents if t is not None), None)
    if some is None:
        return None
    if any(before is None for before, _ in node.next_functions):
        raise RuntimeError("left to autograd: parts of unknown sizes")
    shapes = (input_shape(node, k) for k in range(len(tangents)))
    parts = [some.new_zeros(shape) if t is None else t for t, shape in zip(tangents, shapes)]
    return torch.cat(parts, axis_of(node, some.dim()))


def _stacked_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    some = next((t for t in tangents if t is not None), None)
    if some is None:
        return None
    parts = [torch.zeros_like(some) if t is None else t for t in tangents]
    return torch.stack(parts, axis_of(node, some.dim() + 1))


SPLIT = Kind(_split_back, only_ahead(_split_ahead))

# ---------------------------------------------------------------------- sums and terms


def _summed(node: Any) -> list[int]:
    axes = len(node._saved_self_sym_sizes)
    return [signed(axis) % axes for axis in node._saved_dim] or list(range(axes))


def _summed_back(node: Any, G: Tensor, input: int) -> Tensor:
    if not node._saved_keepdim:
        for axis in sorted(_summed(node)):
            G = G.unsqueeze(1 + axis)
    return G.expand(G.shape[0], *input_shape(node, 0)).contiguous()


def _total_back(node: Any, G: Tensor, input: int) -> Tensor:
    shape = input_shape(node, 0)
    return G.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()


def _averaged_back(node: Any, G: Tensor, input: int) -> Tensor:
    return _total_back(node, G / input_shape(node, 0).numel(), input)


def _terms(node: Any, tangents: list[Tensor | None], scales: tuple[float, float]) -> Tensor | None:
    found = [scaled(t, scale) for t, scale in zip(tangents, scales) if t is not None]
    terms = total(found)
    return None if terms is None else terms.expand(output_shape(node))


def _added_back(node: Any, G: Tensor, input: int) -> Tensor:
    return shared(scaled(G, node._saved_alpha) if input == 1 else G, input_shape(node, input))


def _subtracted_back(node: Any, G: Tensor, input: int) -> Tensor:
    return shared(G * -node._saved_alpha if input == 1 else G, input_shape(node, input))


# ---------------------------------------------------------------------- entry by entry


def _factor(node: Any, input: int) -> Tensor:
    """What the input was multiplied with."""
    factor: Tensor = node._saved_other if input == 0 else node._saved_self
    return factor


def _multiplied_back(node: Any, G: Tensor, input: int) -> Tensor:
    return shared(G * _factor(node, input), input_shape(node, input))


def multiplied_in_place(node: Any, G: Tensor, input: int) -> Tensor:
    return shared(G.mul_(_factor(node, input)), input_shape(node, input))


def _multiplied_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    terms = [None if t is None else t * _factor(node, k) for k, t in enumerate(tangents)]
    return _terms(node, terms, (1, 1))


def _divisor(node: Any, x: Tensor, input: int) -> Tensor:
    """The derivative of a quotient by either, times x."""
    quotient: Tensor = x / node._saved_other
    return quotient if input == 0 else quotient * (-node._saved_self / node._saved_other)


def _divided_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    terms = [None if t is None else _divisor(node, t, k) for k, t in enumerate(tangents)]
    return _terms(node, terms, (1, 1))


def _chosen(node: Any, x: Tensor, input: int) -> Tensor:
    condition = node._saved_condition
    return torch.where(condition, x, 0) if input == 0 else torch.where(condition, 0, x)


def _chosen_ahead(node: Any, tangents: list[Tensor | None]) -> Tensor | None:
    return _terms(node, [None if t is None else _chosen(node, t, k) for k, t in enumerate(tangents)], (1, 1))


ADDED = Kind(_added_back, lambda node, tangents: _terms(node, tangents, (1, node._saved_alpha)))
SEVERAL_OUTPUTS: dict[str, Kind] = {
    **{f"{name}Backward0": SPLIT for name in ("Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes")},
    "UnbindBackward0": Kind(
        lambda node, Gs, input: torch.stack(_parts(node, Gs), 1 + axis_of(node, len(input_shape(node, 0)))),
        only_ahead(lambda node, x: list(x.unbind(axis_of(node, x.dim())))),
    ),
}
REARRANGING: dict[str, Kind] = {
    **{f"{name}Backward0": RESHAPED for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze")},
    "SqueezeBackward1": RESHAPED,
    "SqueezeBackward2": RESHAPED,
    "TBackward0": alike(lambda node, x: x.mT),
    "TransposeBackward0": SWAPPED,
    "PermuteBackward0": PERMUTED,
    "ExpandBackward0": EXPANDED,
    **{name: _part(view) for name, view in PARTS.items()},
    **SEVERAL_OUTPUTS,
    "CatBackward0": Kind(_joined_back, _joined_ahead),
    "StackBackward0": Kind(lambda node, G, input: G.select(1 + axis_of(node, G.dim() - 1), input), _stacked_ahead),
    "SumBackward0": Kind(_total_back, only_ahead(lambda node, x: x.sum())),
    "SumBackward1": Kind(_summed_back, only_ahead(lambda node, x: x.sum(_summed(node), keepdim=node._saved_keepdim))),
    "MeanBackward0": Kind(_averaged_back, only_ahead(lambda node, x: x.mean())),
    "AddBackward0": ADDED,
    "SubBackward0": Kind(_subtracted_back, lambda node, tangents: _terms(node, tangents, (1, -node._saved_alpha))),
    "RsubBackward1": alike(lambda node, x: x * -node._saved_alpha),
    "NegBackward0": alike(lambda node, x: -x),
    "MulBackward0": Kind(_multiplied_back, _multiplied_ahead),
    "MulBackward1": alike(lambda node, x: x * node._saved_other),
    "DivBackward0": Kind(
        lambda node, G, input: shared(_divisor(node, G, input), input_shape(node, input)), _divided_ahead
    ),
    "WhereBackward0": Kind(
        lambda node, G, input: shared(_chosen(node, G, input), input_shape(node, input)), _chosen_ahead
    ),
    "MaskedFillBackward0": alike(lambda node, x: x.masked_fill(node._saved_mask, 0)),
}
# Where what arrives is needed nowhere else, and meets one input only.
IN_PLACE: dict[str, Any] = {
    "MulBackward0": multiplied_in_place,
    "MulBackward1": lambda node, G, input: G.mul_(node._saved_other),
    "MaskedFillBackward0": lambda node, G, input: G.masked_fill_(node._saved_mask, 0),
    "NegBackward0": lambda node, G, input: G.neg_(),
}
