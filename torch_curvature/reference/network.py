"""Derivatives of a network: `J_N [N, C, P]` and the 3-tensor `H_N [N, C, P, P]`, and of a plain function."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .evaluation import (
    Inputs,
    arguments,
    check,
    differentiable_forward,
    evaluate,
    flatten_outputs,
    parameters,
    run,
)
from .rows import checked_symmetric, hessian_rows, jacobian_rows


@torch.enable_grad()
def jacobian(model: nn.Module, inputs: Inputs, *, only: Iterable[str] | None = None) -> Tensor:
    """`J[n, c, p] = d output_c(sample n) / d w_p`, `[N, C, P]`.

    C counts `outputs.shape[1:]` flattened in C order, P the parameters in the order of `parameters(model,
    only)`.
    """
    point = evaluate(model, inputs, only)
    rows = jacobian_rows(point.flat_outputs.flatten(), list(point.variables.values()))
    return rows.reshape(*point.flat_outputs.shape, -1)


def jacobian_by_name(model: nn.Module, inputs: Inputs, *, only: Iterable[str] | None = None) -> dict[str, Tensor]:
    """`jacobian`, split by parameter: name -> `[N, C, *shape of the parameter]`."""
    return split_by_name(jacobian(model, inputs, only=only), parameters(model, only))


def split_by_name(tensor: Tensor, shapes_of: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """`[..., P]` -> name -> `[..., *shape]`."""
    parts = tensor.split([p.numel() for p in shapes_of.values()], dim=-1)
    return {
        name: part.reshape(*tensor.shape[:-1], *p.shape)
        for (name, p), part in zip(shapes_of.items(), parts, strict=True)
    }


@torch.enable_grad()
def input_jacobian(model: nn.Module, inputs: Inputs, *, argument: int | str | None = None) -> Tensor:
    """`d output_c(sample n) / d input_d(sample n)`, `[N, C, D]`: D is `input.shape[1:]` flattened in C order.

    `argument` says which of several inputs, by position or keyword; it may be left out when there is one.
    """
    positional, keywords = arguments(inputs)
    named: dict[int | str, object] = dict(enumerate(positional))
    named.update(keywords.items())
    if argument is None and len(named) == 1:
        argument = next(iter(named))
    chosen = named.get(argument) if argument is not None else None
    if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
        raise ValueError(f"argument must name one floating point tensor among {list(named)}, got {argument!r}")
    check(model, {}, inputs)
    point = chosen.detach().clone().requires_grad_()
    named[argument] = point  # type: ignore[index]
    outputs = run(model, {}, tuple(named.values()) if positional else {str(k): v for k, v in named.items()})
    samples, size = flatten_outputs(outputs).shape
    if point.shape[:1] != (samples,):
        raise ValueError(
            f"argument {argument!r} has shape {tuple(point.shape)}, but the outputs have {samples} samples"
        )
    total = jacobian_rows(outputs.flatten(), [point]).reshape(samples, size, samples, -1)
    return torch.stack([total[n, :, n] for n in range(samples)])


@torch.enable_grad()
def network_hessian(model: nn.Module, inputs: Inputs, *, only: Iterable[str] | None = None) -> Tensor:
    """`H[n, c, j, k] = d2 output_c(sample n) / d w_j d w_k`, `[N, C, P, P]`: for small networks."""
    point = evaluate(model, inputs, only)
    variables = list(point.variables.values())
    flat = point.flat_outputs
    sizes = [v.numel() for v in variables]
    matrices = [checked_symmetric(hessian_rows(o, variables), list(point.variables), sizes) for o in flat.flatten()]
    return torch.stack(matrices).reshape(*flat.shape, sum(sizes), sum(sizes))


@torch.enable_grad()
def function_jacobian(function: Callable[[Tensor], Tensor], point: Tensor, *, batched: bool = False) -> Tensor:
    """`J[i, j] = d f_i / d x_j` of any function of one tensor, `[o, n]`; a row `[1, n]` of a scalar one.

    `batched` takes the first axis of `point` for a batch of points, one call each: `[N, o, n]`.
    """
    if batched:
        return torch.stack([function_jacobian(function, one) for one in point])
    variable = _leaf(point)
    with differentiable_forward():
        values = function(variable)
    return jacobian_rows(values.flatten(), [variable])


@torch.enable_grad()
def function_hessian(function: Callable[[Tensor], Tensor], point: Tensor, *, batched: bool = False) -> Tensor:
    """`H[i, j, k] = d2 f_i / d x_j d x_k` of any function of one tensor, `[o, n, n]`; each `H[i]` symmetric.

    `batched` takes the first axis of `point` for a batch of points, one call each: `[N, o, n, n]`.
    """
    if batched:
        return torch.stack([function_hessian(function, one) for one in point])
    variable = _leaf(point)
    with differentiable_forward():
        values = function(variable).flatten()
    if values.numel() == 0:
        return values.new_zeros(0, variable.numel(), variable.numel())
    return torch.stack([checked_symmetric(hessian_rows(value, [variable])) for value in values])


def _leaf(point: Tensor) -> Tensor:
    if not point.is_floating_point():
        raise TypeError(f"point must be a floating point tensor, got {point.dtype}")
    return point.detach().clone().requires_grad_()
