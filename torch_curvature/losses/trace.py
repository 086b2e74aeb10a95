"""A callable that rearranges the outputs and returns one torch loss of them, as that loss in closed form.

`lambda out, y: F.cross_entropy(out.transpose(1, 2), y)`, `F.cross_entropy(out.view(-1, V), y.view(-1))`, shifted
language-model targets, `F.mse_loss(out.squeeze(-1), y)`, `F.nll_loss(out.log_softmax(1), y)`, or a user's module around
`nn.CrossEntropyLoss` are all recognised by what they compute, not by how they are written: the call of the torch loss
is recorded while the user's function runs; its result must be the very tensor that is returned; and its input must be
the outputs rearranged. That last is proved by the vector-Jacobian product of the rearrangement: it carries no graph (so
the map is linear), is 0 or 1 at every output, and says where each element came from; reading the outputs there gives
back the input to the bit. (A view of all outputs says it by its strides.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .call import normalisation_of
from .functional import BY_FUNCTION, ClosedForm, bind_call
from .interface import BoundLoss
from .layout import Layout, strided_layout, traced_layout

_Recorded = tuple[ClosedForm, tuple[Any, ...], dict[str, Any], Tensor]


_LOG_SOFTMAXES = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)


class _Record(TorchFunctionMode):
    """Records the calls of losses that have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Recorded] = []
        self.log_softmaxes: list[tuple[Tensor, Tensor, int | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        form = BY_FUNCTION.get(func) if callable(func) and hasattr(func, "__name__") else None
        if form is not None and isinstance(result, Tensor):
            self.calls.append((form, args, kwargs or {}, result))
        if func in _LOG_SOFTMAXES and args:
            self.log_softmaxes.append((result, args[0], args[1] if len(args) > 1 else (kwargs or {}).get("dim")))
        return result

    def without_log_softmax(self, call: _Recorded) -> _Recorded:
        """Negative log likelihood of a log-softmax over axis 1 is cross entropy: that call, else the call itself."""
        form, args, kwargs, result = call
        if form.function is not F.nll_loss or not args:
            return call
        for log_p, logits, dim in self.log_softmaxes:
            if args[0] is log_p and dim in (1, 1 - logits.dim()) and logits.dtype == log_p.dtype:
                names = dict(zip(form.parameters[1:], args[1:])) | kwargs
                return BY_FUNCTION[F.cross_entropy], (logits,), names, result
        return call


@dataclass(frozen=True)
class Traced:
    """A callable's loss in closed form."""

    bound: BoundLoss
    normalisation: str


def trace(loss_fn: Callable[..., Any], outputs: Tensor, leaf: Tensor, targets: Any) -> tuple[Tensor, Traced | None]:
    """`loss_fn(leaf, targets)`, and its closed form where there is one; `leaf` is a detached copy of outputs.

    The value of the closed form must be that of the loss called plainly: some functions of torch lose arguments when
    they are recorded (`l1_loss` its weight).
    """
    record = _Record()
    with torch.enable_grad():
        with record:
            recorded = loss_fn(leaf, targets)
        found = [call for call in record.calls if call[3] is recorded]
        plain = loss_fn(leaf, targets)
    traced = _closed_form(record.without_log_softmax(found[0]), outputs, leaf) if len(found) == 1 else None
    if traced is not None:
        value = traced.bound.value().detach() / traced.bound.denominator.to(leaf.device, leaf.dtype)
        slack = 4096 * torch.finfo(leaf.dtype).eps
        if not torch.allclose(value, plain.detach().to(value), rtol=slack, atol=slack, equal_nan=True):
            traced = None
    return plain, traced


def _closed_form(call: _Recorded, outputs: Tensor, leaf: Tensor) -> Traced | None:
    """The recorded call on the outputs rearranged, its other arguments constant; else None."""
    form, args, kwargs, _ = call
    arguments = dict(zip(form.parameters, args)) | kwargs
    given, target = arguments.pop(form.parameters[0]), arguments.pop(form.parameters[1])
    constants = [target, *arguments.values()]
    if any(isinstance(c, Tensor) and c.requires_grad for c in constants) or not isinstance(given, Tensor):
        return None
    layout = _layout(given, leaf, form.class_axis(given.dim()))
    if layout is None:
        return None
    arguments = form.arguments(arguments)
    bound = bind_call(form, outputs, given, target, arguments, layout)
    return Traced(bound, normalisation_of(form.name, arguments))


def _layout(given: Tensor, leaf: Tensor, class_axis: bool) -> Layout | None:
    """How `given` rearranges the leaf, or None where it does not."""
    if given.dtype != leaf.dtype or not given.requires_grad or given.numel() == 0:
        return None
    same_storage = given.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
    if same_storage and given.numel() == leaf.numel():
        uses = _transpose_product(given, leaf, torch.ones_like(given))
        layout = strided_layout(leaf.shape, given, class_axis)
        if layout is not None and uses is not None and bool((uses == 1).all()):
            return layout
    places = _places(given, leaf)
    return None if places is None else traced_layout(leaf.shape, places, class_axis)


def _places(given: Tensor, leaf: Tensor) -> Tensor | None:
    """For each element of `given`, the place in the flattened leaf that it was copied from; None if it is no copy."""
    digits = 2 ** (20 if leaf.dtype == torch.float32 else 50)
    number = torch.arange(1, given.numel() + 1, device=leaf.device)
    origin = torch.zeros(leaf.numel(), dtype=torch.long, device=leaf.device)
    for power in range(math.ceil(math.log(given.numel() + 1, digits))):
        cotangent = (number // digits**power % digits).reshape(given.shape).to(given.dtype)
        back = _transpose_product(given, leaf, cotangent)
        if back is None:
            return None
        origin += back.reshape(-1).long() * digits**power
    uses = _transpose_product(given, leaf, torch.ones_like(given))
    if uses is None or bool(((uses != 0) & (uses != 1)).any()) or int(uses.sum(dtype=torch.float64)) != len(number):
        return None
    places = torch.zeros_like(number)
    used = origin > 0
    places[origin[used].clamp(max=len(number)) - 1] = torch.arange(len(origin), device=leaf.device)[used]
    same = leaf.detach().reshape(-1)[places] == given.detach().reshape(-1)
    return places.reshape(given.shape) if bool(same.all()) else None


def _transpose_product(given: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor | None:
    """The vector-Jacobian product, or None where it depends on the outputs (the map is not linear)."""
    (back,) = torch.autograd.grad(given, leaf, cotangent, create_graph=True, allow_unused=True)
    return None if back is None or back.requires_grad else back
