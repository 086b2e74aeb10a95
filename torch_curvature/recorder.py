"""Seeing every use of a parameter in a forward pass, and the graph edges of the layers' outputs.

One mechanism for all models: a thread-local ``torch.overrides.TorchFunctionMode`` that is active only inside a call
of the package.  It sees every torch function wherever it is written and matches parameters by identity, so that
modules, functional calls, tied weights and repeated use need no cases of their own, and nothing is left on the
user's modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from .detaching import must_stay_attached, start_of_graph
from .layers import DETACHABLE, FUNCTION_RULES, MODULE_RULES, OPENED, WRITTEN_OUT, Use
from .layers.watched import HOOKING, REFUSALS, REORDERING, SUMS, indexes_by_data
from .layers.watched import UnsupportedModelError as UnsupportedModelError


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
        reorders: something was indexed or sorted by data, so that the same signature need not mean the same plan.
        hooked: the graph may have hooks, so that only autograd can go through it.
    """

    uses: list[RecordedUse] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    escaped: set[str] = field(default_factory=set)
    signature: list[Any] = field(default_factory=list)
    reorders: bool = False
    hooked: bool = False


class Recorder(TorchFunctionMode):
    """Records uses of the given parameters while it is active.

    Args:
        parameters: by name.
        write_out: replace attention and weight normalisation by simpler functions too, as derivatives other than
            the gradient need it. Functions that hide layers inside them are always opened.
        detach: keep the parameters of layers with a rule out of autograd's graph; ``on_attached`` is called with the
            names of those that stay in it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, write_out: bool = True, detach: bool = False) -> None:
        super().__init__()
        self.detach = detach
        self.names = {id(p): name for name, p in parameters.items()}
        self.replacements = WRITTEN_OUT if write_out else OPENED
        self.record = Record()
        self.active = True
        self.on_record: Callable[[Tensor, int], None] | None = None
        self.on_attached: Callable[[str], None] | None = None
        self._covered: dict[int, Tensor] = {}  # outputs that are views of a parameter, and already a use of it
        self._shared: dict[int, tuple[Tensor, int]] = {}  # looked-up rows and the index of their use
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
        replacement = self.replacements.get(func)
        if replacement is not None and replacement[0](*args, **kwargs):
            self.record.signature.append(replacement[1])  # the graph is another one than where it is called as it is
            with self:
                return replacement[1](*args, **kwargs)
        refusal = REFUSALS.get(func)
        if refusal is not None:
            refusal(*args, **kwargs)
        touched = self._touched(args, kwargs)
        output = self._detached(func, args, kwargs, touched) if touched and self.detach else func(*args, **kwargs)
        if touched:
            output = _no_view(func, output)
            self._record_call(func, args, kwargs, output, touched)
        if self._shared and func in SUMS:
            self._broadcast(args, output)
        if self._covered and isinstance(output, Tensor) and any(id(x) in self._covered for x in args):
            self._covered[id(output)] = output  # a view of an expanded parameter is no new use of the parameter
        if func in REORDERING:
            self.record.reorders = self.record.reorders or indexes_by_data(func, args)
        elif func in HOOKING:
            self.record.hooked = True
        return output

    def _detached(self, func: Any, args: Any, kwargs: Any, touched: list[int]) -> Any:
        """The call without its parameters in the graph, which starts at the output if it has not started yet."""
        if func not in DETACHABLE or "out" in kwargs or must_stay_attached():
            output = func(*args, **kwargs)
            if func in FUNCTION_RULES or _carries_gradient(output, self._is_parameter):
                self._attach(touched)
            return output
        kwargs = {key: self._bare(value) for key, value in kwargs.items()}
        output = func(*(self._bare(value) for value in args), **kwargs)
        return start_of_graph(output) if torch.is_grad_enabled() and not output.requires_grad else output

    def _bare(self, value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and self.owner(value) is not None else value

    def _attach(self, owners: Iterable[int]) -> None:
        if self.detach and self.on_attached is not None:
            for owner in owners:
                self.on_attached(self.names[owner])

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
        called: Any = rule if rule is not None else getattr(func, "__name__", str(func))
        self.record.signature.append((called, tuple(touched), output.shape if isinstance(output, Tensor) else None))

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
        if covered and self.record.uses[-1].use.is_lookup:
            self._shared[id(output)] = (output, len(self.record.uses) - 1)
        if covered and output._base is not None and id(output._base) in self.names:
            self._covered[id(output)] = output
        return covered

    def _broadcast(self, args: Any, output: Tensor) -> None:
        """Rows of a table looked up once for all samples meet the samples when they are added to something larger.

        From there on each sample has a derivative of its own: the use moves to the sum.  Should the rows be used
        elsewhere too, the comparison with autograd's gradient fails and the parameter goes to the fallback.
        """
        for term in args:
            shared = self._shared.pop(id(term), None)
            if shared is None:
                continue
            extra = output.dim() - term.dim()
            if extra <= 0 or output.shape[extra:] != term.shape or not output.requires_grad:
                continue
            recorded = self.record.uses[shared[1]]
            activation = recorded.use.activation
            assert activation is not None
            copies = int(output.shape[:extra].numel())
            use = replace(
                recorded.use,
                batch_axes=recorded.use.batch_axes + extra,
                activation=partial(_repeated, activation, copies),
            )
            edge = len(self.record.edges)
            self.record.edges.append(get_gradient_edge(output))
            if self.on_record is not None:
                self.on_record(output, edge)
            self.record.uses[shared[1]] = replace(recorded, use=use, edge=edge, output_shape=output.shape)
            self.record.signature.append(("broadcast", shared[1], output.shape))

    def module_hooks(self, modules: Iterable[nn.Module]) -> list[Any]:
        """Hooks for those of the modules whose class has a rule; the caller removes them."""
        if not MODULE_RULES:
            return []
        handles = []
        for module in modules:
            rule = MODULE_RULES.get(type(module))
            if rule is None:
                continue
            own = {id(p) for p in module.parameters(recurse=False)}

            def before(module: nn.Module, inputs: Any, own: set[int] = own) -> None:
                self._suspended.append(own)
                self._attach(p for p in own if p in self.names)

            def after(module: nn.Module, inputs: Any, output: Any, rule: Any = rule, own: set[int] = own) -> None:
                self._suspended.remove(own)
                if not self.active:
                    return
                self.record.signature.append(rule)
                covered = set()
                if isinstance(output, Tensor) and output.requires_grad:
                    covered = set(self._record(rule(module, output, *inputs), output))
                self.record.escaped.update(self.names[p] for p in own - covered if p in self.names)

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        return handles


def _no_view(func: Any, output: Any) -> Any:
    """A dense layer's output over several positions as a tensor of its own.

    Torch makes it a view of a product that nobody else holds.  An activation in place would rewrite the history of that
    product, and the edge of the view would no longer lie between the layer and the outputs.
    """
    if func is not nn.functional.linear or not isinstance(output, Tensor) or not output._is_view():
        return output
    return torch.ops.aten._unsafe_view(output, output.shape)


def _repeated(activation: Callable[[], Tensor], copies: int) -> Tensor:
    """[R, s, ...] for one sample -> [copies R, s, ...]."""
    a = activation()
    return a.expand(copies, *a.shape).reshape(-1, *a.shape[1:])


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
