"""The format in memory in which images go through models that cannot tell the difference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from ..ops.routing import takes_helpers

# What computes the same whatever the format, and hands it on.
INDIFFERENT = frozenset({
    nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus,
    nn.Sigmoid, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d,
})  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = tuple(getattr(of_all_modules, f"_global{kind}") for kind in _HOOKS)


def in_faster_format(model: nn.Module, images: Tensor) -> Tensor:
    """The images [N, C, H, W] channels last, the format in which a CPU convolves faster, where only modules of torch
    see them that compute the same in any format: in an ``nn.Sequential`` that begins with a convolution, up to its
    ``nn.Flatten``. Code of others might view their memory, and gets them as they are.
    """
    if images.dim() != 4 or images.dtype != torch.float32 or not takes_helpers(images) or not is_indifferent(model):
        return images
    N, C, H, W = images.shape
    if C == 1 and images.is_contiguous():  # both formats at once: strides must say which is meant
        return images.reshape(N, H, W, 1).permute(0, 3, 1, 2)
    return images.to(memory_format=torch.channels_last)


def is_indifferent(model: nn.Module) -> bool:
    """Whether nothing can tell the format of the images that go into this model."""
    if type(model) is not nn.Sequential or any(_EVERYWHERE):
        return False
    first = True
    for module in _in_order(model):
        if type(module) is nn.Flatten:
            return not first and module.start_dim == 1 and module.end_dim in (-1, 3)
        if type(module) not in (INDIFFERENT if not first else (nn.Conv2d,)):
            return False
        first = False
    return False


def _in_order(module: nn.Module) -> Iterator[nn.Module | None]:
    """The modules that a sequence runs, one by one; None for one with hooks, or a forward, of the user's own."""
    if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__:
        yield None
    elif type(module) is nn.Sequential:
        for child in module._modules.values():
            if child is not None:
                yield from _in_order(child)
    else:
        yield module
