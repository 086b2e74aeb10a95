"""Running a module at its parameters, with nothing of it touched and nothing of it trusted."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from .written_out import WrittenOut

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Data = tuple[Inputs, Any]


@dataclass(frozen=True)
class Evaluation:
    """The outputs of a module, with a graph to fresh copies of its parameters."""

    outputs: Tensor
    """`[N, *]`, as the module returned them."""
    variables: dict[str, Tensor]
    """name -> leaf tensor, in the order of `parameters(model)`."""

    @property
    def flat_outputs(self) -> Tensor:
        """`[N, C]`: `outputs.shape[1:]` flattened in C order."""
        return flatten_outputs(self.outputs)


def parameters(model: nn.Module, only: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that the matrices of this package are about: name -> parameter.

    Those with `requires_grad`, in the order of `model.named_parameters()`; a tied parameter stands once,
    under its first name. Each is flattened in C order, and all are concatenated to the P axis of a matrix.
    `only` keeps the named ones, still in the order of the model.

    Raises:
        ValueError: a name in `only` that is not a trainable parameter of the model, or no parameter left.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is not initialised yet: run the model once on a batch first")
    if only is not None:
        wanted = [only] if isinstance(only, str) else list(only)
        unknown = [name for name in wanted if name not in found]
        if unknown:
            raise ValueError(
                f"only: {unknown} are not parameters with requires_grad of the model; it has {list(found)} "
                "(a tied parameter goes by its first name)"
            )
        found = {name: p for name, p in found.items() if name in wanted}
    if not found:
        raise ValueError("the model has no parameter with requires_grad: nothing to differentiate with respect to")
    return found


def flatten_outputs(outputs: Tensor) -> Tensor:
    """`[N, *] -> [N, C]` in C order; one output per sample where there is no further axis."""
    return outputs.reshape(outputs.shape[0], outputs.shape[1:].numel())


def split_data(data: Data) -> Data:
    """One batch `(inputs, targets)`, or an error that says so."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"data must be one batch (inputs, targets), got {type(data).__name__}")
    return data[0], data[1]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of `forward`: from a tensor, a tuple or a mapping."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise TypeError(
        "inputs must be a tensor, a tuple (positional arguments) or a mapping (keyword arguments), "
        f"got {type(inputs).__name__}"
    )


@contextlib.contextmanager
def differentiable_forward() -> Iterator[None]:
    """Inside, a forward pass records only functions whose second derivatives are right.

    Attention takes torch's plain kernel and leaves the fused inference path of transformer layers alone;
    functions whose own second derivatives are wrong or missing are written out (see `written_out`).
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), WrittenOut():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def run(model: nn.Module, variables: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """The outputs of the module with `variables` in the place of its parameters; buffers are copies."""
    positional, keywords = arguments(inputs)
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in variables}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    with differentiable_forward():
        outputs = functional_call(model, {**buffers, **frozen, **variables}, positional, keywords)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}, a tensor [N, *] is needed: "
            "wrap it in a module that picks the output"
        )
    if outputs.ndim == 0:
        raise ValueError("the model returned a scalar, outputs of shape [N, *] are needed: one row per sample")
    if not outputs.is_floating_point():
        raise TypeError(f"the model's outputs must be real floating point numbers, got {outputs.dtype}")
    return outputs


def evaluate(model: nn.Module, inputs: Inputs, only: Iterable[str] | None = None) -> Evaluation:
    """Run the model once for differentiation, after checking that derivatives of single samples make sense.

    Raises:
        ValueError: outputs that are random, not a number, or that depend on the other samples of the batch.
    """
    variables = {name: p.detach().clone().requires_grad_() for name, p in parameters(model, only).items()}
    inputs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, inputs)
    return Evaluation(check(model, variables, inputs), variables)


def check(model: nn.Module, variables: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """The outputs, if they are numbers, the same in every run, and each sample's its own; else raises."""
    _refuse_batch_statistics(model)
    devices = {p.device.index or 0 for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        outputs = run(model, variables, inputs)
        if outputs.isnan().any():
            raise ValueError("the model's outputs contain NaN: check the inputs and the parameters")
        _refuse_randomness(outputs, run(model, variables, inputs))
        _refuse_dependent_samples(model, variables, inputs, outputs)
    return outputs


def _refuse_batch_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} ({type(module).__name__}) normalises by the statistics of the batch, "
                "so an output depends on other samples and has no derivative of its own: "
                "call model.eval(), or use running statistics"
            )


def _refuse_randomness(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or not _same(first, second):
        raise ValueError("the model's outputs differ between two runs on the same inputs (dropout?): call model.eval()")


def _refuse_dependent_samples(
    model: nn.Module, variables: Mapping[str, Tensor], inputs: Inputs, outputs: Tensor
) -> None:
    """Give every sample the inputs of sample 0: the outputs of sample 0 must stay the same.

    Every tensor whose first axis has the length of the batch takes part, except that a vector of integers beside
    other inputs may hold offsets or lengths, and stays.
    """
    samples = outputs.shape[0]
    alone = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)) == 1

    def repeat_first(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != samples:
            return leaf
        if leaf.ndim == 1 and not leaf.is_floating_point() and not alone:
            return leaf
        return leaf[:1].expand_as(leaf).clone()

    if samples < 2:
        return
    repeated = run(model, variables, tree_map(repeat_first, inputs))
    if repeated.shape != outputs.shape or not _same(repeated[:1], outputs[:1]):
        raise ValueError(
            "the outputs of sample 0 change with the inputs of other samples, so a derivative per sample "
            "is not defined; the first axis of the outputs "
            f"{tuple(outputs.shape)} must be that of independent samples"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    tolerance = 1e-8 if first.dtype == torch.float64 else 16 * torch.finfo(first.dtype).eps ** 0.75
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance * float(first.detach().abs().max() or 1))
