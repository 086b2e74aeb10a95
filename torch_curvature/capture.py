"""Observing one forward pass: which parameters are used where, and the graph edges of the layers' outputs.

One mechanism for all models: a thread-local ``torch.overrides.TorchFunctionMode`` that is active only inside a call
of the package.  It sees every torch function wherever it is written and matches parameters by identity, so that
modules, functional calls, tied weights and repeated use need no cases of their own, and nothing is left on the
user's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .layers import FUNCTION_RULES, MODULE_RULES, WRITTEN_OUT, Use


class UnsupportedModelError(RuntimeError):
    """The model has no well-defined per-sample derivatives as it stands; the message says what to change."""


@dataclass(slots=True)
class RecordedUse:
    """A rule's Use, with the edge of the graph at which the layer's output entered it."""

    use: Use
    name: str  # of the parameter
    edge: int  # index into Recorder.edges
    output_shape: torch.Size
    transposed: bool
    start: int  # first entry, in the flattened parameter, of the view that was used
    numel: int  # entries of that view


@dataclass(slots=True)
class Record:
    """What was observed in one pass.

    Attributes:
        uses: what the rules recognised, in order of execution.
        edges: gradient edges of the recorded layer outputs (they survive in-place activations).
        escaped: names of parameters that went into a function without a rule.
        signature: what was called on what, hashable; the same signature means the same plan.
    """

    uses: list[RecordedUse] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    escaped: set[str] = field(default_factory=set)
    signature: list[Any] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Records uses of the given parameters while it is active.

    Args:
        parameters: by name.
        write_out: replace attention and weight normalisation by simpler functions. Multi-head attention is always
            opened, so that its projections are seen.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, write_out: bool = True) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.write_out = write_out
        self.record = Record()
        self.active = True
        self.on_record: Callable[[Tensor, int], None] | None = None
        self._covered: dict[int, Tensor] = {}  # outputs that are views of a parameter, and already a use of it
        self._suspended: list[set[int]] = []  # parameters that a module's own rule answers for

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let everything pass unobserved."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        replacement = WRITTEN_OUT.get(func)
        if replacement is not None and (self.write_out or func is F.multi_head_attention_forward):
            with self:
                return replacement(*args, **kwargs)
        refusal = REFUSALS.get(func)
        if refusal is not None:
            refusal(*args, **kwargs)
        touched = self._touched(args, kwargs)
        output = func(*args, **kwargs)
        if touched:
            self._record_call(func, args, kwargs, output, touched)
        return output

    def owner(self, tensor: Tensor) -> int | None:
        """Identity of the tracked parameter that ``tensor`` is, or is a view of."""
        if id(tensor) in self.names:
            return id(tensor)
        base = tensor._base
        if base is not None and id(base) in self.names and id(tensor) not in self._covered:
            return id(base)
        return None

    def _is_parameter(self, tensor: Tensor) -> bool:
        """A parameter changed in place, or a view of one: its own uses are seen when they come."""
        return id(tensor) in self.names or (tensor._base is not None and id(tensor._base) in self.names)

    def _touched(self, args: Any, kwargs: Any) -> list[int]:
        found: list[int] = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                owner = self.owner(value)
                if owner is not None:
                    found.append(owner)
            elif isinstance(value, (list, tuple)):
                found += self._touched(value, {})
            elif isinstance(value, dict):
                found += self._touched(value.values(), {})
        if found and self._suspended:
            found = [p for p in found if not any(p in s for s in self._suspended)]
        return found

    def _record_call(self, func: Any, args: Any, kwargs: Any, output: Any, touched: list[int]) -> None:
        rule = FUNCTION_RULES.get(func)
        if rule is not None and isinstance(output, Tensor):
            if not output.requires_grad:
                return
            for used in self._record(rule(output, *args, **kwargs), output):
                if used in touched:
                    touched.remove(used)
        elif not _carries_gradient(output, self._is_parameter):
            return
        self.record.escaped.update(self.names[p] for p in touched)
        name = getattr(func, "__name__", str(func))
        self.record.signature.append((name, tuple(touched), output.shape if isinstance(output, Tensor) else None))

    def _record(self, uses: Any, output: Tensor) -> list[int]:
        """Take a call's uses down; returns the parameters that they cover."""
        covered: list[int] = []
        edge = -1
        for use in uses:
            owner = self.owner(use.parameter)
            placed = None if owner is None else _placement(use)
            if owner is None or placed is None:
                continue
            if edge < 0:
                edge = len(self.record.edges)
                self.record.edges.append(get_gradient_edge(output))
                if self.on_record is not None:
                    self.on_record(output, edge)
            name = self.names[owner]
            self.record.uses.append(RecordedUse(use, name, edge, output.shape, *placed))
            self.record.signature.append((name, output.shape, placed, use.batch_axes))
            covered.append(owner)
        if covered and output._base is not None and id(output._base) in self.names:
            self._covered[id(output)] = output
        return covered

    def module_hooks(self, model: nn.Module) -> list[Any]:
        """Hooks for the modules whose class has a rule; the caller removes them."""
        if not MODULE_RULES:
            return []
        handles = []
        for module in model.modules():
            rule = MODULE_RULES.get(type(module))
            if rule is None:
                continue
            own = {id(p) for p in module.parameters(recurse=False)}

            def before(module: nn.Module, inputs: Any, own: set[int] = own) -> None:
                self._suspended.append(own)

            def after(module: nn.Module, inputs: Any, output: Any, rule: Any = rule, own: set[int] = own) -> None:
                self._suspended.remove(own)
                covered = set()
                if isinstance(output, Tensor) and output.requires_grad:
                    covered = set(self._record(rule(module, output, *inputs), output))
                self.record.escaped.update(self.names[p] for p in own - covered if p in self.names)

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        return handles


def _carries_gradient(output: Any, alias: Callable[[Tensor], bool]) -> bool:
    """Whether something differentiable that is not itself a view of a parameter came out of a call."""
    if isinstance(output, Tensor):
        return output.requires_grad and not alias(output)
    if isinstance(output, (list, tuple)):
        return any(_carries_gradient(item, alias) for item in output)
    return isinstance(output, dict) and any(_carries_gradient(item, alias) for item in output.values())


def _placement(use: Use) -> tuple[bool, int, int] | None:
    """(transposed, first entry, entries) of a used tensor within its parameter, None where it is no plain part."""
    used = use.parameter
    base = used if used._base is None else used._base
    if used is base or not isinstance(base, nn.Parameter):
        return use.transposed, 0, int(used.numel())
    if not base.is_contiguous():
        return None
    start = int(used.storage_offset() - base.storage_offset())
    if used.is_contiguous():
        return use.transposed, start, int(used.numel())
    if used.dim() == 2 and used.mT.is_contiguous() and use.activation is not None:
        return not use.transposed, start, int(used.numel())
    return None


def _refuse_batch_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **options: Any,
) -> None:
    if training:
        raise UnsupportedModelError(
            "batch normalisation with batch statistics mixes the samples of a batch, so that no sample has a gradient "
            "of its own: call model.eval() (with track_running_stats=True) before asking for its curvature, or use "
            f"GroupNorm or LayerNorm. Found at an input of shape {tuple(input.shape)}"
        )


def _refuse_running_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    *rest: Any,
    **options: Any,
) -> None:
    if use_input_stats and running_mean is not None:
        raise UnsupportedModelError(
            "instance normalisation in training mode would change its running statistics: call model.eval()"
        )


REFUSALS: dict[Callable[..., Any], Callable[..., None]] = {
    F.batch_norm: _refuse_batch_statistics,
    F.instance_norm: _refuse_running_statistics,
}


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
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` in ``named_parameters()`` order, a shared one once under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def observation(model: nn.Module) -> Iterator[None]:
    """Gradients on and compiled parts run as plain Python, whatever the caller's context; all restored on exit."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(force_eager(model))
        yield


def force_eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run compiled modules inside the model as plain Python."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
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
        UnsupportedModelError: the forward pass draws random numbers, changes buffers or parameters, normalises with
            batch statistics, or returns something else than a tensor of at least one axis.
    """
    if not parameters:
        raise ValueError("model has no parameter with requires_grad=True: there is nothing to differentiate")
    device = next(iter(parameters.values())).device
    recorder = Recorder(parameters) if recorder is None else recorder
    random = RandomState(device)
    buffers = [(name, b, b._version) for name, b in model.named_buffers()]
    kept = [b.clone() for _, b, _ in buffers] if model.training else []
    handles = recorder.module_hooks(model)
    try:
        with observation(model), recorder:
            outputs, targets = forward(model, batch)
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
    if not outputs.requires_grad:
        raise UnsupportedModelError(
            "the model's output depends on no parameter with requires_grad=True (is part of it under torch.no_grad?)"
        )
    return Capture(outputs, targets, recorder.record, outputs.shape[0], batch)


def _random_message(model: nn.Module) -> str:
    drawing = [
        n for n, m in model.named_modules() if "Dropout" in type(m).__name__ and m.training and getattr(m, "p", 1)
    ]
    where = f" (active: {', '.join(drawing)})" if drawing else ""
    return (
        f"the forward pass draws random numbers{where}, so that the model is not one function: call model.eval() to "
        "switch dropout off, or pass noise in with the inputs"
    )
