"""Which way a call of an operator goes, and what all operators check.

Every operator has three routes that compute the same thing:

* the kernel, where nothing is differentiated: the fast path;
* a Python ``autograd.Function`` around the kernel: eager reverse mode, forward mode, ``torch.func.vmap`` and ``grad``;
* the plain formula in differentiable torch operations, wherever torch runs autograd Functions wrongly or not at all:
  under nested forward-mode transforms (``jacfwd`` of ``jacfwd`` loses tangents silently) and while compiling (compiled
  ``jvp`` of an autograd Function is silently wrong).
"""

from __future__ import annotations

import contextlib
import enum
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


class Route(enum.Enum):
    KERNEL = enum.auto()
    FUNCTION = enum.auto()
    PLAIN = enum.auto()


_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled


def route(*tensors: Tensor | None) -> Route:
    """The route that is right for these inputs in the present context, the fastest first."""
    if _is_compiling():
        return Route.PLAIN
    if peek_interpreter_stack() is not None:
        transforms = get_interpreter_stack() or ()
        return Route.PLAIN if any(t.key() == TransformType.Jvp for t in transforms) else Route.FUNCTION
    if forward_ad._current_level >= 0:
        return Route.FUNCTION
    if _is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return Route.FUNCTION
    return Route.KERNEL


def check_tensors(op: str, **tensors: Tensor) -> None:
    """All are tensors of one floating dtype on one device.

    Raises:
        TypeError: an argument is no tensor, or its dtype is none of float32, float64, bfloat16 and float16, or two
            dtypes differ.
        ValueError: two devices differ.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: '{name}' is a {type(tensor).__name__}, but a torch.Tensor is needed.")
        if tensor.dtype not in FLOATING:
            raise TypeError(
                f"{op}: '{name}' is {tensor.dtype}, but this operator takes float32, float64, bfloat16 and float16. "
                f"Convert it, e.g. {name}.float()."
            )
    (first, x), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"{op}: '{first}' is {x.dtype} and '{name}' is {tensor.dtype}. "
                "Convert one of them so that both have one dtype."
            )
    check_one_device(op, **tensors)


def check_one_device(op: str, **tensors: Tensor | None) -> None:
    """All that are given are on one device.

    Raises:
        ValueError: two devices differ.
    """
    (first, x), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(
                f"{op}: '{first}' is on {x.device} and '{name}' on {tensor.device}. Move one of them with .to(device)."
            )


def check_out(op: str, out: Tensor, like: Tensor, shape: torch.Size) -> None:
    """What the kernels check of a tensor to write into, for tensors without data.

    Raises:
        RuntimeError: another dtype, device or shape, or not contiguous.
    """
    if out.dtype != like.dtype:
        raise RuntimeError(
            f"{op}: 'out' is {out.dtype} and 'the inputs' is {like.dtype}. "
            "Convert one of them so that both have one dtype."
        )
    if out.device != like.device:
        raise RuntimeError(f"{op}: 'out' and 'the inputs' are on different devices. Move one of them with .to(device).")
    if out.shape != shape:
        raise RuntimeError(f"{op}: 'out' has shape {list(out.shape)}, but the result has shape {list(shape)}.")
    if not out.is_contiguous():
        raise RuntimeError(f"{op}: 'out' must be contiguous. Pass a contiguous tensor, or leave 'out' away.")


def check_rank(op: str, name: str, tensor: Tensor, axes: str) -> None:
    """``tensor`` has at least the trailing axes named in ``axes``, e.g. "N, O, O2"."""
    rank = len(axes.split(","))
    if tensor.dim() < rank:
        raise ValueError(
            f"{op}: '{name}' has shape {list(tensor.shape)}, but at least {rank} axes are needed: [*, {axes}]."
        )


def check_size(op: str, name: str, tensor: Tensor, axis: int, other: str, expected: Tensor, expected_axis: int) -> None:
    """An axis of ``tensor`` is as long as one of ``expected``."""
    if tensor.shape[axis] != expected.shape[expected_axis]:
        raise ValueError(
            f"{op}: '{name}' has shape {list(tensor.shape)} and '{other}' {list(expected.shape)}, but axis {axis} of "
            f"'{name}' must be as long as axis {expected_axis} of '{other}'."
        )


def broadcast_batch(op: str, core: dict[str, int], **tensors: Tensor) -> torch.Size:
    """The leading axes (all but the last ``core[name]``) of all tensors, broadcast against each other."""
    leading = [t.shape[: t.dim() - core[name]] for name, t in tensors.items()]
    try:
        return torch.broadcast_shapes(*leading)
    except RuntimeError:
        shapes = ", ".join(f"'{name}' {list(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"{op}: the leading axes of {shapes} do not broadcast.") from None


def check_not_differentiated(op: str, *tensors: Tensor | None) -> None:
    """A result written into ``out`` has no history, as everywhere in torch."""
    if route(*tensors) is Route.FUNCTION:
        raise RuntimeError(
            f"{op}: 'out' cannot be combined with differentiation. Leave 'out' away, or detach the inputs."
        )


def _autocast_enabled(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def promoted(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Under autocast, where dtypes mix, the tensors in their common dtype; else nothing."""
    if not all(isinstance(t, Tensor) and t.dtype in FLOATING for t in tensors):
        return None
    if len({t.dtype for t in tensors}) == 1 or not _autocast_enabled(tensors[0].device.type):
        return None
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.to(dtype) for t in tensors)


def takes_helpers(x: Tensor) -> bool:
    """Whether the CPU's helpers, which have no derivatives, take such a tensor here; elsewhere the general way goes."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and route(x) is Route.KERNEL
    )


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operators compute in the precision of their inputs: inside, autocast does not lower a matrix product's."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _autocast_enabled(kind) else contextlib.nullcontext()


def wide(tensor: Tensor) -> Tensor:
    """Half types in float32, the type they accumulate in."""
    return tensor.float() if tensor.dtype in HALF else tensor


def batch_first(tensor: Tensor, axis: int | None, size: int, rank: int) -> Tensor:
    """For ``vmap``: the mapped axis in front and the logical axes padded to ``rank``, so that leading axes align."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
    return tensor.reshape(size, *[1] * (rank - tensor.dim() + 1), *tensor.shape[1:])
