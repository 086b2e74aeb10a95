"""No factor is used before it has been compared with autograd's own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .capture import Capture
from .factors import Factor
from .fallback import Forward, per_sample_jacobians
from .layers.convolution import channels_last, summed_positions
from .layers.linear import positions_last
from .ops.routing import without_autocast
from .plan import TOLERANCE, Layout, Plan, layouts, working_dtype
from .recorder import RecordedUse, UnsupportedModelError


class Pass(Protocol):
    """What is needed of one captured pass (a ``Backpropagation``)."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    captured: Capture
    forward: Forward
    repeatable: bool
    plan: Plan

    def to_edges(self, columns: Tensor) -> Sequence[Tensor | None]: ...

    def closed(self, name: str, indices: list[int], derivatives: Sequence[Tensor | None]) -> Factor | None: ...


def verify(pass_: Pass) -> None:
    """Decide for every parameter, against autograd's own gradient, which of its factors can be trusted.

    Two cotangents: r, random, and w r with an independent random weight w[n] for every sample.  Where samples
    are independent and laid out as assumed, what arrives at a layer for the second is w times what arrives for
    the first; and ``sum_n w[n] J_r[n]`` is autograd's gradient for the second.
    """
    captured, plan = pass_.captured, pass_.plan
    outputs, N = captured.outputs, captured.samples
    generator = torch.Generator().manual_seed(20177)
    r = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
    w = (torch.rand(N, generator=generator, dtype=torch.float64, device="cpu") + 0.5).to(outputs)
    w = w * (1 - 2 * (torch.arange(N, device=w.device) % 2))
    weighted = r * w.view(N, *[1] * (outputs.dim() - 1))
    names = list(pass_.parameters)
    with without_autocast(outputs):
        truth = torch.autograd.grad(
            outputs, list(pass_.parameters.values()), weighted, retain_graph=True, allow_unused=True
        )
    reference = {n: (t.to_dense() if t.is_sparse else t) for n, t in zip(names, truth) if t is not None}
    infinite = [n for n, gradient in reference.items() if not bool(torch.isfinite(gradient).all())]
    if infinite:
        raise ValueError(
            f"the gradients of parameters {infinite} are not finite (NaN or infinity): check inputs and parameters"
        )
    plan.unused = [n for n in names if n not in reference]
    by_name: dict[str, list[int]] = {}
    for index, recorded in enumerate(captured.record.uses):
        by_name.setdefault(recorded.name, []).append(index)
    edges = pass_.to_edges(torch.stack([r, weighted])) if captured.record.edges else []
    for name in reference:
        with torch.no_grad():
            why = _distrust(pass_, name, by_name.get(name, []), edges, w, reference[name])
        if why is None:
            plan.closed[name] = by_name[name]
        else:
            plan.fallback[name] = why
    if plan.fallback and pass_.repeatable:
        _verify_fallback(pass_, r, w, reference)


def is_separate(pass_: Pass) -> bool:
    """Whether ``J[v, n] = g[v, n] (x) a[n]`` with the very derivative at the layer's output, for all parameters."""
    return not pass_.plan.fallback and all(
        len(indices) == 1 and _is_dense(pass_, indices[0]) and pass_.plan.layouts[indices[0]].in_order
        for indices in pass_.plan.closed.values()
    )


def _is_dense(pass_: Pass, index: int) -> bool:
    """A whole parameter of a dense layer with as many rows as there are samples."""
    recorded = pass_.captured.record.uses[index]
    samples = recorded.use.batch_axes == 1 and recorded.output_shape[0] == pass_.captured.samples
    whole = recorded.numel == pass_.parameters[recorded.name].numel()
    return samples and whole and recorded.use.gradient is positions_last and not recorded.use.is_lookup


# How derivatives at one output become g of a weight and that of its bias, which is the same summed over positions.
_OF_WEIGHT_AND_BIAS = ((positions_last, positions_last), (channels_last, summed_positions))


def pairs_of_biases(pass_: Pass) -> dict[str, str]:
    """Weights and biases that one g serves: J of the bias is sum_s g[s], of both together sum_s g[s] (x) (a[s], 1)."""
    uses, plan = pass_.captured.record.uses, pass_.plan
    weights: dict[int, int] = {}
    biases: dict[int, int] = {}
    for name, indices in plan.closed.items():
        recorded = uses[indices[0]]
        whole = recorded.numel == pass_.parameters[name].numel()
        if len(indices) == 1 and whole and not recorded.transposed and not recorded.use.is_lookup:
            (biases if recorded.use.activation is None else weights)[recorded.edge] = indices[0]
    found = {}
    for place, weight in weights.items():
        bias = biases.get(place)
        if bias is None or plan.layouts[weight] != plan.layouts[bias]:
            continue
        one_axis = pass_.parameters[uses[bias].name].dim() == 1  # the shape that sums over parameters give it
        if one_axis and (uses[weight].use.gradient, uses[bias].use.gradient) in _OF_WEIGHT_AND_BIAS:
            found[uses[weight].name] = uses[bias].name
    return found


def same_derivatives(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """Whether two ways to compute the same tensors agree up to rounding."""
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or not (a - b).norm() <= TOLERANCE[a.dtype] * b.norm():
            return False
    return True


def proven(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool | None:
    """:func:`same_derivatives`, where that shows something; None where all of them vanish."""
    if not same_derivatives(ours, theirs):
        return False
    return True if any(bool(b.any()) for b in theirs if b is not None) else None


def check_same_pass(detached: Capture, attached: Capture) -> None:
    """A pass made without the parameters in its graph must be the one with them, forwards and backwards.

    Raises:
        UnsupportedModelError: other layers were called, or other outputs or derivatives came out.
    """
    ours, theirs = detached.record, attached.record
    same = ours.signature == theirs.signature and ours.escaped == theirs.escaped
    if same:
        generator = torch.Generator().manual_seed(20177)
        r = torch.randn(detached.outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            detached.outputs
        )
        pulled = [
            torch.autograd.grad(c.outputs, c.record.edges or c.outputs, r, retain_graph=True, allow_unused=True)
            for c in (detached, attached)
        ]
        same = same_derivatives([detached.outputs], [attached.outputs]) and same_derivatives(*pulled)
    if not same:
        raise UnsupportedModelError(
            "the model did something else when its forward pass was made again with the parameters in the graph, as is "
            "needed once to check the layers' derivatives (does it change its inputs or buffers, or is it not "
            "deterministic?): call model.eval(), or leave parameter_gradients=True"
        )


def _distrust(
    pass_: Pass, name: str, indices: list[int], edges: Sequence[Tensor | None], w: Tensor, reference: Tensor
) -> str | None:
    """Why the closed factors of one parameter cannot be used, None where they can."""
    uses, N = pass_.captured.record.uses, pass_.captured.samples
    if name in pass_.captured.record.escaped:
        return "used by a function without a rule"
    if not indices:
        return "no use of it was seen"
    scale = reference.norm()
    for index in indices:
        derivative = edges[uses[index].edge]
        if derivative is None:
            continue
        chosen = _layout_of(pass_, uses[index], derivative, w, N)
        if chosen is None:
            return "its uses have no axis that counts samples, or samples are not independent there"
        pass_.plan.layouts[index] = chosen
        size = derivative[1].norm().to(scale.dtype)
        if not size > 0:
            pass_.plan.conclusive = False
        scale = scale + size
    indices[:] = [i for i in indices if i in pass_.plan.layouts]
    if not indices:
        return "no use of it reaches the output"
    factor = pass_.closed(name, indices, [None if d is None else d[:1] for d in edges])
    assert factor is not None
    ours = factor.apply_transposed(w.to(factor.g.dtype)[None, :, None]).reshape(reference.shape)
    tolerance = TOLERANCE[_precision(pass_, reference)]
    magnitude = scale * (1 if factor.a is None else factor.a.abs().amax().clamp(max=1e4))
    if (ours - reference).norm() <= tolerance * torch.maximum(reference.norm(), 1e-2 * magnitude):
        return None
    return "the rule's gradient differs from autograd's"


def _layout_of(pass_: Pass, recorded: RecordedUse, derivative: Tensor, w: Tensor, N: int) -> Layout | None:
    """The arrangement in which what arrived for w r is w times what arrived for r."""
    tolerance = TOLERANCE[_precision(pass_, pass_.parameters[recorded.name])]
    batch_shape = recorded.output_shape[: recorded.use.batch_axes]
    rows = derivative.reshape(2, batch_shape.numel(), 1, -1)
    for candidate in layouts(batch_shape, N):
        dz = candidate.arrange(rows, batch_shape, N, 1)
        if (dz[1] - dz[0] * w[:, None, None]).norm() <= tolerance * dz[1].norm():
            return candidate
    return None


def _precision(pass_: Pass, tensor: Tensor) -> torch.dtype:
    """The coarsest dtype that took part."""
    dtypes = {tensor.dtype, pass_.captured.outputs.dtype}
    if torch.is_autocast_enabled(pass_.captured.outputs.device.type):
        dtypes.add(torch.get_autocast_dtype(pass_.captured.outputs.device.type))
    return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.0))


def _verify_fallback(pass_: Pass, r: Tensor, w: Tensor, reference: dict[str, Tensor]) -> None:
    wanted = {name: pass_.parameters[name] for name in pass_.plan.fallback}
    jacobians = per_sample_jacobians(pass_.model, pass_.forward, pass_.captured, wanted, r.unsqueeze(0))
    largest = max(float(gradient.norm()) for gradient in reference.values())
    for name, J in jacobians.items():
        dtype = working_dtype(J.dtype)
        ours = (J[0].to(dtype) * w.to(dtype)[:, None]).sum(0).reshape(reference[name].shape)
        error = (ours - reference[name]).norm()
        # a gradient that vanishes identically is noise, of the size that rounding has in the others
        size = reference[name].norm() + J[0].to(dtype).norm() + 1e-3 * largest
        if not error <= TOLERANCE[_precision(pass_, reference[name])] * size:
            raise UnsupportedModelError(
                f"parameter {name!r}: the gradients of single samples do not add up to the gradient of the batch "
                f"(relative error {float(error / reference[name].norm()):.1e}). The model mixes the samples of a "
                "batch, or is not deterministic, or its output's first axis does not count samples; it has no "
                "per-sample derivatives as it stands"
            )
