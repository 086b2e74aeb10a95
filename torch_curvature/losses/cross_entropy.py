"""`torch.nn.functional.cross_entropy` with all its options, as a `SoftmaxLoss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, rows_of_input
from .checks import check_class_weight, check_tensor, raise_if
from .small_batches import softmax_targets, subtract_targets
from .softmax import SoftmaxLoss


def cross_entropy(call: Call) -> SoftmaxLoss:
    """Class indices (with `ignore_index`) or class probabilities; `weight` and `label_smoothing` in both.

    The mean's denominator is torch's: the sum of the weights of the valid targets for class indices, the number of
    positions for probabilities.
    """
    check_class_axis(call)
    target = check_tensor(call.name, "target", call.target, call.input)
    weight = check_class_weight(call.name, call.arguments["weight"], call.input, call.layout.classes)
    smoothing = call.arguments["label_smoothing"]
    if not 0.0 <= smoothing <= 1.0:
        raise ValueError(f"{call.name}: label_smoothing must lie in [0, 1], got {smoothing}.")
    if target.shape == call.input.shape and target.is_floating_point():
        return _from_probabilities(call, target, weight, smoothing)
    return _from_indices(call, target, weight, smoothing)


def check_class_axis(call: Call) -> None:
    if call.input.dim() < 2:
        raise ValueError(
            f"{call.name}: its input must be [N, C, ...] with the samples first, got {list(call.input.shape)}."
        )


def class_indices(call: Call) -> Tensor:
    """Targets `[N, D]` as given, as int64."""
    target, name = check_tensor(call.name, "target", call.target, call.input), call.name
    expected = [call.input.shape[0], *call.input.shape[2:]]
    if target.is_floating_point() or target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"{name}: target must hold class indices of dtype int64 and shape {expected}"
            + (f" or probabilities of shape {list(call.input.shape)}" if name == "cross_entropy" else "")
            + f"; got dtype {target.dtype} and shape {list(target.shape)}."
        )
    if list(target.shape) != expected:
        raise ValueError(
            f"{name}: target of class indices must have shape {expected} for an input of shape "
            f"{list(call.input.shape)} (classes on axis 1), got {list(target.shape)}."
        )
    return call.layout.rows(target.reshape(-1).long())


def _outside(call: Call) -> str:
    return (
        f"{call.name}: target holds a class index outside [0, {call.layout.classes - 1}] that is not "
        f"ignore_index={call.arguments['ignore_index']}."
    )


def _not_a_number(call: Call) -> str:
    return f"{call.name}: outputs hold NaN or +infinity (or only -infinity at a position)."


def read_class_indices(call: Call) -> tuple[Tensor, Tensor, list[tuple[Tensor, str]]]:
    """Targets `[N, D]` with ignored ones and padding set to class 0, `valid [N, D]`, and the checks to make."""
    y = class_indices(call)
    valid = y != call.arguments["ignore_index"]
    if call.layout.mask is not None:
        valid = valid & call.layout.mask
    outside = (valid & ((y < 0) | (y >= call.layout.classes))).any()
    return torch.where(valid, y, 0), valid, [(outside, _outside(call))]


def _logits(call: Call) -> Tensor:
    return call.layout.read(call.outputs.detach().to(call.input.dtype))


def _softmax(call: Call) -> tuple[Tensor, tuple[Tensor, str]]:
    p = _logits(call).softmax(-1)
    return p, (p.isnan().any(), _not_a_number(call))


def _from_plain_indices(call: Call) -> SoftmaxLoss | None:
    """Without weights and smoothing, in one pass; None where :func:`_from_indices` must do it."""
    if call.layout.mask is not None:
        return None
    y, ignored, classes = class_indices(call), call.arguments["ignore_index"], call.layout.classes
    found = softmax_targets(_logits(call), y, ignored)
    if found is None:
        return None
    if found.outside or found.nan:
        raise ValueError(_outside(call) if found.outside else _not_a_number(call))
    valid = found.valid

    def sum_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, classes), y.reshape(-1), ignore_index=ignored, reduction="sum")

    return SoftmaxLoss(
        call.name,
        call.outputs,
        call.layout,
        call.denominator(found.total),
        probabilities=found.p,
        mass=valid,
        subtract_target=lambda g: subtract_targets(g, y, valid),
        sum_of=sum_of,
        unweighted=found.every,
    )


def _from_indices(call: Call, target: Tensor, weight: Tensor | None, smoothing: float) -> SoftmaxLoss:
    if weight is None and not smoothing:
        plain = _from_plain_indices(call)
        if plain is not None:
            return plain
    y, valid, checks = read_class_indices(call)
    p, finite = _softmax(call)
    classes, ignored = call.layout.classes, call.arguments["ignore_index"]
    raise_if([*checks, finite, *_weight_checks(call.name, weight)])
    of_target = valid.to(p.dtype) if weight is None else weight[y] * valid
    smooth, mass = None, of_target
    if smoothing:
        smooth = p.new_full((), smoothing) * (p.new_ones(classes) if weight is None else weight) / classes
        mass = (1 - smoothing) * of_target + smooth.sum() * valid

    def subtract_target(g: Tensor) -> Tensor:
        g.scatter_add_(-1, y.unsqueeze(-1), (-(1 - smoothing) * of_target).unsqueeze(-1))
        return g if smooth is None else g - smooth * valid.unsqueeze(-1)

    def sum_of(logits: Tensor) -> Tensor:
        # Padding carries no weight: it is given to torch as an ignored target.
        given = torch.where(valid, y, ignored).reshape(-1)
        return F.cross_entropy(
            logits.reshape(-1, classes), given, weight, ignore_index=ignored, reduction="sum", label_smoothing=smoothing
        )

    double = of_target.sum() if of_target.device.type == "mps" else of_target.sum(dtype=torch.float64)
    return SoftmaxLoss(
        call.name,
        call.outputs,
        call.layout,
        call.denominator(double),
        probabilities=p,
        mass=mass,
        subtract_target=subtract_target,
        sum_of=sum_of,
    )


def _from_probabilities(call: Call, target: Tensor, weight: Tensor | None, smoothing: float) -> SoftmaxLoss:
    if call.arguments["ignore_index"] >= 0:
        raise ValueError(
            f"{call.name}: ignore_index={call.arguments['ignore_index']} has no meaning for probability targets; "
            "zero the probabilities of a position to leave it out of a sum."
        )
    rows = call.layout.rows(rows_of_input(target.detach().to(call.input.dtype), class_axis=True))
    p, finite = _softmax(call)
    bad_target = ~rows.isfinite().all(), f"{call.name}: target probabilities hold NaN or infinity."
    raise_if([finite, bad_target, *_weight_checks(call.name, weight)])
    q = rows * (1 - smoothing) + smoothing / call.layout.classes if smoothing else rows
    t = q if weight is None else q * weight
    if call.layout.mask is not None:
        t, rows = t * call.layout.mask.unsqueeze(-1), rows * call.layout.mask.unsqueeze(-1)

    def sum_of(logits: Tensor) -> Tensor:
        return -(t * logits.log_softmax(-1)).sum()

    return SoftmaxLoss(
        call.name,
        call.outputs,
        call.layout,
        call.denominator(float(call.input.numel() // call.layout.classes)),
        probabilities=p,
        mass=t.sum(-1),
        subtract_target=lambda g: g - t,
        sum_of=sum_of,
    )


def _weight_checks(name: str, weight: Tensor | None) -> list[tuple[Tensor, str]]:
    return [] if weight is None else [(~weight.isfinite().all(), f"{name}: weight holds NaN or infinity.")]
