"""What users pass as data: one batch or an iterable of batches, and how a batch goes through the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor, nn

from .formats import in_faster_format

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


def call_model(model: nn.Module, inputs: Any) -> Any:
    """A tensor is the only argument, a tuple or list the positional ones, a mapping the keyword ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(in_faster_format(model, inputs) if isinstance(inputs, Tensor) else inputs)


def pair_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """The usual batch: ``(inputs, targets)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}{length}: pass pairs (several "
            "inputs as a tuple or a dictionary inside the pair), or forward=, a function (model, batch) -> "
            "(outputs, targets)"
        )
    return call_model(model, batch[0]), batch[1]


def inputs_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """For matrices without a loss: ``inputs``, or ``(inputs, targets)`` with the targets ignored."""
    if isinstance(batch, (tuple, list)):
        return call_model(model, pair_of(batch)[0]), None
    return call_model(model, batch), None


def pair_of(batch: Any) -> Any:
    if len(batch) == 1:
        return batch[0], None
    if len(batch) != 2:
        raise TypeError(
            f"a batch must be inputs or a pair (inputs, targets), got a {type(batch).__name__} of length {len(batch)}: "
            "pass several inputs as ((input1, input2, ...), None), or a dictionary"
        )
    return batch


class Batches:
    """Iterates over the data; knows whether there is only one batch, and refuses to read an iterator twice."""

    def __init__(self, data: Any, custom_forward: bool, progress: bool) -> None:
        self.single = _is_one_batch(data, custom_forward)
        self.data = data
        self.progress = progress
        self._consumed = False
        if not self.single and not isinstance(data, Iterable):
            raise TypeError(
                f"data must be one batch (inputs, targets) or an iterable of batches such as a DataLoader, got "
                f"{type(data).__name__}"
            )

    def read(self, what: str) -> Iterator[Any]:
        if self.single:
            yield self.data
            return
        if isinstance(self.data, Iterator):
            if self._consumed:
                raise ValueError(
                    f"{what} needs to read the data again, but it was given as an iterator that can be read only "
                    "once: pass a list of batches or a DataLoader"
                )
            self._consumed = True
        yield from self._reported(self.data, what) if self.progress else self.data

    @staticmethod
    def _reported(data: Iterable[Any], what: str) -> Iterator[Any]:
        total = f"/{len(data)}" if isinstance(data, Sized) else ""
        start = time.monotonic()
        for number, batch in enumerate(data, 1):
            print(
                f"\r{what}: batch {number}{total}, {time.monotonic() - start:.0f} s",
                end="",
                file=sys.stderr,
                flush=True,
            )
            yield batch
        print(f"\r{what}: done in {time.monotonic() - start:.1f} s          ", file=sys.stderr, flush=True)


def _is_one_batch(data: Any, custom_forward: bool) -> bool:
    """A tensor, a mapping or a tuple is one batch; a list only when it is a pair that starts with inputs."""
    if isinstance(data, (Tensor, Mapping)):
        return True
    if isinstance(data, tuple):
        return True
    return isinstance(data, list) and len(data) == 2 and isinstance(data[0], (Tensor, Mapping)) and not custom_forward
