"""Inputs of layers that take far more memory unfolded than as they are, formed for a few samples at a time.

The patches that a convolution of 3 x 3 sees are nine times its input. Formed all at once they go through fresh memory,
which costs several times what is written to it; a few samples at a time go through one block that stays in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .patches import Patches

# Bytes of the patches of a few samples: less than what is asked for in large pages.
PART_BYTES = (1 << 22) - 1
# Bytes of blocks that go back to the system when they are freed, so that every one of them is fresh.
LARGE_BYTES = 1 << 25


@dataclass(slots=True)
class Unfolding:
    """``a [N, S, I]`` that is not there yet.

    Attributes:
        shape: [N, S, I].
        part: gives a of samples start..stop-1.
        whole: gives all of it.
        itemsize: bytes of an entry.
        patches: the images of which it is the patches, where it need not be unfolded to be met with derivatives.
    """

    shape: torch.Size
    part: Callable[[int, int], Tensor]
    whole: Callable[[], Tensor]
    itemsize: int
    patches: Patches | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.shape.numel() * self.itemsize

    def samples(self, start: int, stop: int) -> Unfolding | Tensor:
        """The same for samples start..stop-1: formed, but for images, which need not be."""
        if self.patches is None:
            return self.part(start, stop)
        _, S, inputs = self.shape
        patches = Patches(self.patches.images[start:stop], self.patches.geometry)
        whole = partial(self.part, start, stop)

        def part(first: int, last: int) -> Tensor:
            return self.part(start + first, start + last)

        return Unfolding(torch.Size((stop - start, S, inputs)), part, whole, self.itemsize, patches)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """First sample and the one after the last of each part; enough samples in each for all threads."""
        N = self.shape[0]
        step = max(PART_BYTES * N // max(1, self.size), 2 * torch.get_num_threads(), 1)
        for start in range(0, N, step):
            yield start, min(N, start + step)


def in_parts(factor: Any) -> Iterator[tuple[slice, Any]]:
    """A factor itself, or factors of a few samples each where its input is still to be unfolded."""
    if not isinstance(factor.input, Unfolding):
        yield slice(None), factor
        return
    for start, stop in factor.input.ranges():
        yield slice(start, stop), replace(factor, g=factor.g[:, start:stop], input=factor.input.part(start, stop))


def smaller_formed(factor: Any) -> bool:
    """Whether a factor's Jacobian takes less memory than its input, which is not unfolded yet and takes a lot, or need
    not be unfolded for it."""
    V, _, S, O = factor.g.shape
    if isinstance(factor.input, Unfolding) and factor.input.patches is not None:
        return V * O <= 2 * S
    return isinstance(factor.input, Unfolding) and V * O < S and factor.input.size >= LARGE_BYTES


def unfolding_of(recorded: Any, layout: Any, g: Tensor, whole: Callable[[], Tensor]) -> Unfolding | None:
    """What a recorded use meets ``g [V, N, S, O]`` with, where it can and should be formed a few samples at a time."""
    use, (_, N, S, O) = recorded.use, g.shape
    rows = recorded.output_shape[: use.batch_axes].numel()
    in_order = layout.axis == 0 and not layout.minor
    if use.part is None or recorded.transposed or not in_order or g.device.type != "cpu" or g.numel() == 0:
        return None
    each, inputs = rows // N, recorded.numel // O

    def part(start: int, stop: int) -> Tensor:
        found: Tensor = use.part(slice(start * each, stop * each))
        return found.detach().to(g.dtype).reshape(stop - start, S, inputs)

    found = Unfolding(torch.Size((N, S, inputs)), part, whole, g.element_size())
    if use.patches is not None and each == 1:
        patches = use.patches()
        patches.images = patches.images.detach()
        found.patches = patches if patches.suit(g) else None
    return found if found.size > PART_BYTES else None
