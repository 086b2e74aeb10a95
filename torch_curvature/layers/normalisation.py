"""Rules of normalisation layers: elementwise affine in the normalised input, ``z = x_hat * weight + bias``.

The Jacobian of a sample is ``sum_s g[s] * x_hat[s]`` for the weight and ``sum_s g[s]`` for the bias: nothing is
gained by an outer product, so both are given directly (a = 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.routing import takes_helpers
from .rules import Use, register_rule, rows

_normalised_sums = torch.ops.torch_curvature.normalised_sums.default._op


def trailing(
    output: Tensor,
    axes: int,
    normalised: Callable[[], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    summed: Callable[[Tensor, int], Tensor | None],
) -> Iterator[Use]:
    """Affine parameters over the last ``axes`` axes (layer and root-mean-square normalisation)."""
    batch_axes = output.dim() - axes
    if weight is not None:
        yield Use(
            weight,
            batch_axes,
            lambda dz: (dz * rows(normalised(), batch_axes).to(dz.dtype)).flatten(2).unsqueeze(2),
            summed=summed,
        )
    if bias is not None:
        yield Use(bias, batch_axes, lambda dz: dz.flatten(2).unsqueeze(2))


def sums_of_rows(
    input: Tensor, shape: Sequence[int], eps: float | None, centred: bool, dz: Tensor, samples: int
) -> Tensor | None:
    """``sum_s dz * x_hat`` [V, N, 1, O] for ``dz [V, R, *shape]``, in one pass of a helper of the CPU."""
    features = torch.Size(shape).numel()
    g, x = dz.reshape(*dz.shape[:2], features), input.detach().reshape(-1, features)
    if not (takes_helpers(g) and takes_helpers(x)) or g.dtype != x.dtype or features == 0:
        return None
    if g.stride(2) != 1 or x.stride(1) != 1 or g.shape[1] != x.shape[0]:
        return None
    found: Tensor = _normalised_sums(g, x, samples, torch.finfo(x.dtype).eps if eps is None else eps, centred)
    return found.unsqueeze(2)


def channelwise(
    output: Tensor, normalised: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None
) -> Iterator[Use]:
    """Affine parameters over axis 1 (group, batch and instance normalisation)."""
    if weight is not None:
        yield Use(weight, 1, lambda dz: (dz * normalised().to(dz.dtype)).reshape(*dz.shape[:3], -1).sum(3).unsqueeze(2))
    if bias is not None:
        yield Use(bias, 1, lambda dz: dz.reshape(*dz.shape[:3], -1).sum(3).unsqueeze(2))


@register_rule(F.layer_norm)
def layer_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Use]:
    shape = list(normalized_shape)
    normalised, summed = partial(F.layer_norm, input, shape, eps=eps), partial(sums_of_rows, input, shape, eps, True)
    return trailing(output, len(shape), normalised, weight, bias, summed)


@register_rule(F.rms_norm)
def rms_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Iterator[Use]:
    shape = list(normalized_shape)
    normalised, summed = partial(F.rms_norm, input, shape, eps=eps), partial(sums_of_rows, input, shape, eps, False)
    return trailing(output, len(shape), normalised, weight, None, summed)


@register_rule(F.group_norm)
def group_norm(
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Iterator[Use]:
    return channelwise(output, lambda: F.group_norm(input, num_groups, None, None, eps), weight, bias)


@register_rule(F.batch_norm)
def batch_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Use]:
    return channelwise(
        output, lambda: F.batch_norm(input, running_mean, running_var, None, None, False, 0.0, eps), weight, bias
    )


@register_rule(F.instance_norm)
def instance_norm(
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterator[Use]:
    if use_input_stats:
        normalised = lambda: F.instance_norm(input, eps=eps)  # noqa: E731
    else:
        normalised = lambda: F.batch_norm(input, running_mean, running_var, None, None, False, 0.0, eps)  # noqa: E731
    return channelwise(output, normalised, weight, bias)
