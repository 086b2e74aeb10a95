"""One observed forward pass: the state it must leave alone, and the models it must refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .recorder import Record, Recorder, UnsupportedModelError


@dataclass(slots=True)
class Capture:
    """One observed forward pass.

    Attributes:
        outputs: [N, ...] of the model, attached to the graph.
        targets: what the loss compares them with.
        record: the uses and edges.
        samples: N.
    """

    outputs: Tensor
    targets: Any
    record: Record
    samples: int
    batch: Any = None
    cache: dict[Any, Any] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind torch.compile, DataParallel and DistributedDataParallel wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def every_module(model: nn.Module) -> dict[nn.Module, str]:
    """Modules by their names, as ``named_modules()`` gives them, without a generator inside a generator for each level:
    that takes as long as a small layer."""
    found: dict[nn.Module, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        if module not in found:
            found[module] = name
            for key, child in module._modules.items():
                if child is not None:
                    visit(child, f"{name}.{key}" if name else key)

    visit(model, "")
    return found


def _named_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """``model.named_parameters()``: asked for it where a class has its own."""
    modules = every_module(model)
    if any(type(m).named_parameters is not _OF_MODULES or type(m).named_modules is not _MODULES_OF for m in modules):
        return model.named_parameters()
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for module, place in modules.items():
        for key, p in module._parameters.items():
            if p is not None and id(p) not in named:
                named[id(p)] = f"{place}.{key}" if place else key, p
    return named.values()


_OF_MODULES, _MODULES_OF = nn.Module.named_parameters, nn.Module.named_modules


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` in ``named_parameters()`` order, a shared one once under its first name.

    Raises:
        ValueError: they are on several devices, or on the meta device.
    """
    parameters = {name: p for name, p in _named_parameters(model) if p.requires_grad}
    if len({p.device for p in parameters.values()}) > 1:
        places = {p.device: name for name, p in parameters.items()}
        listed = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(f"the model's trainable parameters are on several devices ({listed}): move all to one")
    if any(p.is_meta for p in parameters.values()):
        raise ValueError(
            "the model's parameters are on the meta device and have no values: load them first, e.g. by "
            "model.to_empty(device=...) and model.load_state_dict(...)"
        )
    return parameters


def observation(modules: Iterable[nn.Module]) -> contextlib.AbstractContextManager[Any]:
    """Gradients on and compiled ones of these modules run as plain Python, whatever the caller's context; all restored
    on exit."""
    eager, inference = force_eager(modules), torch.is_inference_mode_enabled()
    if torch.is_grad_enabled() and not inference:
        return eager
    return _with_gradients(eager, torch.inference_mode(False) if inference else contextlib.nullcontext())


@contextlib.contextmanager
def _with_gradients(
    eager: contextlib.AbstractContextManager[Any], outside: contextlib.AbstractContextManager[Any]
) -> Iterator[None]:
    with outside, torch.enable_grad(), eager:
        yield


def force_eager(modules: Iterable[nn.Module]) -> contextlib.AbstractContextManager[Any]:
    """Run compiled ones of these modules as plain Python."""
    for module in modules:
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
    return contextlib.nullcontext()


class RandomState:
    """The random generators a model could draw from; says whether it did, and puts them back."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.device = device
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def changed(self) -> bool:
        if not torch.equal(self.cpu, torch.get_rng_state()):
            return True
        return self.cuda is not None and not torch.equal(self.cuda, torch.cuda.get_rng_state(self.device))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def capture(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], tuple[Any, Any]],
    batch: Any,
    parameters: dict[str, nn.Parameter],
    recorder: Recorder | None = None,
) -> Capture:
    """Run ``forward(model, batch)`` once and record every use of the parameters.

    Raises:
        ValueError: the data, or the outputs, are on another device than the model; there is no sample.
        UnsupportedModelError: the forward pass draws random numbers, changes buffers or parameters, normalises with
            batch statistics, or returns something else than a tensor of at least one axis.
    """
    if not parameters:
        raise ValueError("model has no parameter with requires_grad=True: there is nothing to differentiate")
    device = next(iter(parameters.values())).device
    recorder = Recorder(parameters) if recorder is None else recorder
    random = RandomState(device)
    modules = every_module(model)
    has_buffers = any(module._buffers for module in modules)
    buffers = [(name, b, b._version) for name, b in model.named_buffers()] if has_buffers else []
    kept = [b.clone() for _, b, _ in buffers] if model.training else []
    handles = recorder.module_hooks(modules)
    try:
        with observation(modules), recorder:
            outputs, targets = forward(model, batch)
    except RuntimeError as error:
        clearer = _explained(error, batch, device)
        if clearer is None:
            raise
        raise clearer from error
    finally:
        for handle in handles:
            handle.remove()
        drew = random.changed()
        if drew:
            random.restore()
        altered = [name for name, b, version in buffers if b._version != version]
        if altered and kept:
            with torch.no_grad():
                for (_, b, version), old in zip(buffers, kept):
                    if b._version != version:
                        b.copy_(old)
    if drew:
        raise UnsupportedModelError(_random_message(model))
    if altered:
        raise UnsupportedModelError(
            f"the forward pass changes the buffers {altered}: call model.eval(), so that the model is a function"
        )
    if not isinstance(outputs, Tensor):
        raise UnsupportedModelError(
            f"the model returned {type(outputs).__name__}, a tensor [N, ...] is needed: pass forward=, a function "
            "(model, batch) -> (outputs, targets) that picks it"
        )
    if outputs.dim() == 0:
        raise UnsupportedModelError("the model's output has no batch axis: outputs must be [N, ...]")
    if outputs.shape[0] == 0:
        raise ValueError("the batch holds no sample: outputs are empty")
    if outputs.device != device:
        raise ValueError(
            f"the model's outputs are on {outputs.device} and its parameters on {device}: give the data on {device}, "
            "and return the outputs there"
        )
    if not outputs.requires_grad:
        raise UnsupportedModelError(
            "the model's output depends on no parameter with requires_grad=True (is part of it under torch.no_grad?)"
        )
    return Capture(outputs, targets, recorder.record, outputs.shape[0], batch)


def _explained(error: RuntimeError, batch: Any, device: torch.device) -> Exception | None:
    """What to do about torch's complaint of two devices in a forward pass; None for any other error."""
    text = (str(error).splitlines() or [""])[0]
    if type(error) is not RuntimeError or not ("device" in text or "weight type" in text):
        return None
    elsewhere = {str(x.device) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.device != device}
    if not elsewhere:
        return None
    return ValueError(
        f"the batch holds tensors on {', '.join(sorted(elsewhere))} and the model is on {device}: move one of them, "
        f"or pass forward=, a function (model, batch) -> (outputs, targets) that does it. torch says: {text}"
    )


def _random_message(model: nn.Module) -> str:
    drawing = [
        n for n, m in model.named_modules() if "Dropout" in type(m).__name__ and m.training and getattr(m, "p", 1)
    ]
    where = f" (active: {', '.join(drawing)})" if drawing else ""
    return (
        f"the forward pass draws random numbers{where}, so that the model is not one function: call model.eval() to "
        "switch dropout off, or pass noise in with the inputs"
    )
