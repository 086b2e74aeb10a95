"""Rules of convolutions and transposed convolutions in one, two and three dimensions.

A convolution is a dense layer applied to patches: ``a[s]`` is the patch that output position s sees, ``g[s]`` the
derivative there.  A transposed convolution swaps the two: ``a[s]`` is the input at s, and ``g[s]`` the patch of the
output's derivative that it reaches.  With groups the layer is block diagonal; its Jacobian is formed directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.pages import in_large_pages
from ..patches import Patches
from .rules import Use, register_rule


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], out: Sequence[int]
) -> Tensor:
    """[R, channels, *spatial] -> [R, channels, *kernel, *out], a strided view: no copy."""
    spatial = x.stride()[2:]
    kernel_strides = [s * d for s, d in zip(spatial, dilation)]
    out_strides = [s * t for s, t in zip(spatial, stride)]
    return x.as_strided((*x.shape[:2], *kernel, *out), (*x.stride()[:2], *kernel_strides, *out_strides))


# Elements of a few samples that are padded at a time: they stay in cache, and go through the same memory.
PADDED_ELEMENTS = 1 << 19


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


def margins(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Padding of each axis in the order of ``torch.nn.functional.pad`` (last axis first)."""
    flat: list[int] = []
    for axis in reversed(range(len(kernel))):
        if padding == "same":
            total = dilation[axis] * (kernel[axis] - 1)
            flat += [total // 2, total - total // 2]
        elif padding == "valid":
            flat += [0, 0]
        else:
            assert not isinstance(padding, str)
            flat += [per_axis(padding, len(kernel))[axis]] * 2
    return flat


def channels_last(dz: Tensor) -> Tensor:
    """[V, R, O, *out] -> [V, R, L, O]."""
    return dz.flatten(3).transpose(2, 3)


def summed_positions(dz: Tensor) -> Tensor:
    """[V, R, O, *out] -> [V, R, 1, O]: the Jacobian of a bias."""
    return dz.flatten(3).sum(3).unsqueeze(2)


@register_rule(F.conv1d)
@register_rule(F.conv2d)
@register_rule(F.conv3d)
def convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Iterator[Use]:
    axes = weight.dim() - 2
    if output.dim() != axes + 2:
        return
    kernel, spread, step = weight.shape[2:], per_axis(dilation, axes), per_axis(stride, axes)
    flat = margins(padding, kernel, spread)

    def seen(x: Tensor) -> Tensor:  # [rows, channels, *kernel, *out], a view of what has been padded
        return patches(F.pad(x, flat) if any(flat) else x, kernel, step, spread, output.shape[2:])

    def unfolded(rows: slice = slice(None)) -> Tensor:  # [R, channels * kernel, L]
        x = input[rows]
        shape = x.shape[0], x.shape[1] * kernel.numel(), output.shape[2:].numel()
        if torch.is_grad_enabled() and x.requires_grad:
            return seen(x).reshape(shape)
        whole = in_large_pages(x, x.shape[0], x.shape[1], *kernel, *output.shape[2:])
        several = PADDED_ELEMENTS // max(1, x[:1].numel()) if x.device.type == "cpu" else len(x)
        several = max(1, several)
        for start in range(0, len(x), several):
            whole[start : start + several].copy_(seen(x[start : start + several]))
        return whole.view(shape)

    def seen_images() -> Patches:
        images = input if axes == 2 else input.unsqueeze(2)
        before = flat[-2::-2]  # of each axis, first axis first
        numbers = (kernel, 1), (step, 1), (before, 0), (spread, 1), (output.shape[2:], 1)
        return Patches(images, [n for each, missing in numbers for n in (*[missing] * (2 - axes), *each)])

    def grouped(dz: Tensor) -> Tensor:
        V, R = dz.shape[:2]
        a = unfolded().to(dz.dtype).view(R, groups, -1, output.shape[2:].numel())
        g = dz.reshape(V, R, groups, weight.shape[0] // groups, -1)
        return torch.matmul(g, a.transpose(2, 3)).reshape(V, R, 1, -1)

    if groups == 1:
        yield Use(
            weight,
            1,
            channels_last,
            lambda: unfolded().transpose(1, 2),
            part=lambda rows: unfolded(rows).transpose(1, 2),
            patches=seen_images if axes < 3 else None,
        )
    else:
        yield Use(weight, 1, grouped)
    if bias is not None:
        yield Use(bias, 1, summed_positions)


@register_rule(F.conv_transpose1d)
@register_rule(F.conv_transpose2d)
@register_rule(F.conv_transpose3d)
def transposed_convolution(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Iterator[Use]:
    axes = weight.dim() - 2
    if output.dim() != axes + 2:
        return
    kernel, spread, step = weight.shape[2:], per_axis(dilation, axes), per_axis(stride, axes)
    channels = weight.shape[1]  # output channels of one group

    def reached(dz: Tensor) -> Tensor:  # [V * R, output channels, *kernel, *input positions]
        flat = margins(padding, kernel, spread)
        dz = dz.flatten(0, 1)
        # an input next to the far edge may reach beyond the output: pad there, nothing flows through it
        for axis in range(axes):
            far = (input.shape[2 + axis] - 1) * step[axis] + spread[axis] * (kernel[axis] - 1) + 1
            have = dz.shape[2 + axis] + 2 * flat[-1 - 2 * axis]
            flat[-1 - 2 * axis] += max(0, far - have)
        return patches(F.pad(dz, flat) if any(flat) else dz, kernel, step, spread, input.shape[2:])

    def gradient(dz: Tensor) -> Tensor:
        V, R = dz.shape[:2]
        return reached(dz).reshape(V, R, channels * kernel.numel(), -1).transpose(2, 3)

    def grouped(dz: Tensor) -> Tensor:
        V, R = dz.shape[:2]
        g = reached(dz).reshape(V, R, groups, channels * kernel.numel(), -1)
        a = input.to(dz.dtype).reshape(R, groups, weight.shape[0] // groups, -1)
        return torch.matmul(a, g.transpose(3, 4)).reshape(V, R, 1, -1)

    if groups == 1:
        yield Use(weight, 1, gradient, lambda: input.flatten(2).transpose(1, 2), transposed=True)
    else:
        yield Use(weight, 1, grouped)
    if bias is not None:
        yield Use(bias, 1, summed_positions)
