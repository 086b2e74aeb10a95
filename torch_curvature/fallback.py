"""Exact per-sample Jacobians of any parameter of any module, without a rule.

One sample at a time in mathematics; vectorised over the samples with ``torch.func`` where the model allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from .capture import Capture, every_module, observation
from .recorder import Recorder, UnsupportedModelError

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]


def per_sample_jacobians(
    model: nn.Module, forward: Forward, captured: Capture, wanted: dict[str, nn.Parameter], columns: Tensor
) -> dict[str, Tensor]:
    """``columns [V, N, *out]`` pulled back to the wanted parameters: {name: [V, N, p]}."""
    if captured.cache.get("vectorised", True):
        try:
            return _vectorised(model, forward, captured, wanted, columns)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            if isinstance(error, (torch.OutOfMemoryError, UnsupportedModelError)):
                raise
            captured.cache["vectorised"] = False
    if captured.cache.get("divisible", True):
        try:
            return _one_by_one(model, forward, captured, wanted, columns)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, (torch.OutOfMemoryError, UnsupportedModelError)):
                raise
            captured.cache["divisible"] = False
    return _row_by_row(captured, wanted, columns)


def _split(captured: Capture) -> tuple[list[Any], Any, list[bool]]:
    """The batch as a flat list, its structure, and which entries have a leading axis of samples."""
    leaves, structure = pytree.tree_flatten(captured.batch)
    N = captured.samples
    split = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == N for x in leaves]
    if not any(split):
        raise UnsupportedModelError(
            f"the outputs have {N} rows, but no tensor of the batch has {N}: the first axis of the outputs must count "
            "samples. Outputs for each token go [N, classes, tokens], with targets [N, tokens]"
        )
    return leaves, structure, split


def _vectorised(
    model: nn.Module, forward: Forward, captured: Capture, wanted: dict[str, nn.Parameter], columns: Tensor
) -> dict[str, Tensor]:
    leaves, structure, batched = _split(captured)
    samples = [leaf for leaf, split in zip(leaves, batched) if split]
    values = {name: p.detach() for name, p in wanted.items()}

    def one_sample(cotangents: Tensor, *parts: Tensor) -> dict[str, Tensor]:
        remaining = iter(parts)
        batch = pytree.tree_unflatten(
            [next(remaining).unsqueeze(0) if split else leaf for leaf, split in zip(leaves, batched)], structure
        )

        def outputs(replaced: dict[str, Tensor]) -> Tensor:
            with _reparametrize_module(model, replaced, tie_weights=True):
                result: Tensor = forward(model, batch)[0]
            return result.squeeze(0)

        pullback = torch.func.vjp(outputs, values)[1]
        pulled: dict[str, Tensor] = torch.func.vmap(pullback, randomness="error")(cotangents)[0]
        return pulled

    with observation(every_module(model)), Recorder({}):
        pulled = torch.func.vmap(one_sample, in_dims=(1, *[0] * len(samples)), out_dims=1, randomness="error")(
            columns, *samples
        )
    return {name: J.detach().reshape(*J.shape[:2], -1) for name, J in pulled.items()}


def _one_by_one(
    model: nn.Module, forward: Forward, captured: Capture, wanted: dict[str, nn.Parameter], columns: Tensor
) -> dict[str, Tensor]:
    leaves, structure, batched = _split(captured)
    V, N = columns.shape[:2]
    found = {name: columns.new_zeros(V, N, p.numel(), dtype=p.dtype) for name, p in wanted.items()}
    parameters = list(wanted.values())
    with observation(every_module(model)), Recorder({}):
        for n in range(N):
            batch = pytree.tree_unflatten(
                [leaf[n : n + 1] if split else leaf for leaf, split in zip(leaves, batched)], structure
            )
            output = forward(model, batch)[0]
            for v in range(V):
                pulled = torch.autograd.grad(
                    output, parameters, columns[v, n : n + 1], retain_graph=v + 1 < V, allow_unused=True
                )
                for name, value in zip(wanted, pulled):
                    if value is not None:
                        found[name][v, n] = (value.to_dense() if value.is_sparse else value).reshape(-1)
    return found


def _row_by_row(captured: Capture, wanted: dict[str, nn.Parameter], columns: Tensor) -> dict[str, Tensor]:
    """From the graph of the whole batch: for inputs that cannot be cut into samples, such as bags of unequal length."""
    V, N = columns.shape[:2]
    found = {name: columns.new_zeros(V, N, p.numel(), dtype=p.dtype) for name, p in wanted.items()}
    row = torch.zeros_like(captured.outputs)
    for n in range(N):
        for v in range(V):
            row[n] = columns[v, n]
            pulled = torch.autograd.grad(
                captured.outputs, list(wanted.values()), row, retain_graph=True, allow_unused=True
            )
            for name, value in zip(wanted, pulled):
                if value is not None:
                    found[name][v, n] = (value.to_dense() if value.is_sparse else value).reshape(-1)
        row[n] = 0
    return found
