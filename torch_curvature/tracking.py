"""Per-sample gradients of the user's own training step.

``with track(model) as t:`` observes the forward pass and, by hooks on the layers' outputs, the backward pass that the
user runs anyway.  The factors of one column (V = 1, the gradient) then give per-sample gradients, their norms, inner
products and variance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attached import attached_pass, batch_size, counts_samples, joined, leaves_of
from .backprop import Backpropagation
from .capture import Capture, RandomState, every_module, force_eager, trainable_parameters, unwrapped
from .detaching import WithheldGradient
from .factors import Factor, gradient_moments
from .grams import inner_products, total_gram
from .norms import total_squared_norms
from .plan import coverage, working_dtype
from .recorder import Record, Recorder, UnsupportedModelError


@dataclass(slots=True)
class TrackedBatch:
    """One call of the model, and what the backward pass brings to its layers and outputs."""

    record: Record
    random: RandomState
    samples: int = 0
    backpropagation: Backpropagation | None = None
    derivatives: dict[int, Tensor] = field(default_factory=dict)  # at the edges
    arrived: dict[int, Tensor] = field(default_factory=dict)  # at the outputs, by leaf
    output_shapes: list[tuple[int, torch.Size]] = field(default_factory=list)
    uses: int = 0  # recorded inside the model's call
    escaped: frozenset[str] = frozenset()
    versions: dict[str, int] = field(default_factory=dict)
    drew: bool = False  # random numbers
    fallback: dict[str, Factor] | None = None  # of all that has arrived

    @property
    def reached(self) -> bool:
        """By a backward pass."""
        return bool(self.derivatives or self.arrived)


class Track:
    """Per-sample quantities of the backward passes seen; see :func:`track`."""

    def __init__(self, model: nn.Module, parameter_gradients: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not parameter_gradients and isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "parameter_gradients=False with DistributedDataParallel, which waits for the gradients of all "
                "parameters: track and call the module inside it"
            )
        self._given, self._model = model, unwrapped(model)
        self._parameters = trainable_parameters(self._model)
        if not self._parameters:
            raise ValueError("model has no parameter with requires_grad=True: there is nothing to track")
        self._recorder = Recorder(self._parameters, write_out=False, detach=not parameter_gradients)
        self._withheld: set[str] = set()
        self._batches: list[TrackedBatch] = []
        self._inside = False
        self._stack: contextlib.ExitStack | None = None
        self._hooks: list[Any] = []

    # ------------------------------------------------------------------ observing

    def __enter__(self) -> Track:
        if self._stack is not None:
            raise RuntimeError("this track is already active: use a new tc.track(model) for each with statement")
        self._recorder.on_record, self._recorder.on_attached = self._watch, self._withhold
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_hooks)
            stack.enter_context(force_eager(every_module(self._given)))
            self._hooks += self._recorder.module_hooks(every_module(self._model))
            self._hooks.append(self._model.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(self._model.register_forward_hook(self._after, with_kwargs=True))
            stack.enter_context(self._recorder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # These refer to this object: all that it holds would stay until the garbage collector finds the circle.
        self._recorder.on_record = self._recorder.on_attached = None

    def _withhold(self, name: str) -> None:
        """No ``.grad`` for a parameter that is in the graph all the same."""
        if name not in self._withheld:
            self._withheld.add(name)
            self._hooks.append(WithheldGradient(self._parameters[name]))

    def _watch(self, output: Tensor, edge: int) -> None:
        if self._inside:
            batch = self._batches[-1]
            self._hooks.append(output.register_hook(lambda g: self._arrive(batch, batch.derivatives, edge, g)))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not (self._recorder.active and torch.is_grad_enabled()):
            return
        with torch._C.DisableTorchFunction():  # what is looked up here is no part of the model
            if self._batches and not self._batches[-1].reached:
                raise UnsupportedModelError(
                    "the model was called again before backward(): which outputs belong to one sample is not known. "
                    "Call it once for each backward(), on the concatenated inputs (evaluate under torch.no_grad())"
                )
            self._recorder.record = Record()
            random = RandomState(next(iter(self._parameters.values())).device)
            self._batches.append(TrackedBatch(self._recorder.record, random))
            self._inside = True

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (self._recorder.active and self._inside):
            return
        self._inside = False
        batch = self._batches[-1]
        batch.uses = len(batch.record.uses)
        batch.escaped = frozenset(batch.record.escaped)
        leaves = leaves_of(output)
        with torch._C.DisableTorchFunction():  # as above
            batch.drew = batch.random.changed()
            batch.samples = batch_size(leaves, (args, kwargs))
            chosen = [i for i, leaf in enumerate(leaves) if counts_samples(leaf, batch.samples)]
            batch.output_shapes = [(i, leaves[i].shape) for i in chosen]
        if not chosen:
            raise UnsupportedModelError(
                f"no output of the model has a leading axis of {batch.samples} samples and a gradient"
            )

        def forward(model: nn.Module, inputs: Any) -> tuple[Tensor, None]:
            found = leaves_of(model(*inputs[0], **inputs[1]))
            return joined([found[i] for i in chosen]), None

        with self._recorder.paused():
            outputs = joined([leaves[i] for i in chosen])
            captured = Capture(outputs, None, batch.record, batch.samples, (args, kwargs))
            attached = None
            if self._recorder.detach:
                attached = partial(attached_pass, self._model, self._parameters, forward, captured, batch.random)
            batch.backpropagation = Backpropagation(
                self._model, self._parameters, captured, forward, not batch.drew, attached
            )
            batch.backpropagation.once = True
            captured.outputs = outputs.detach()  # the graph is the user's to keep or free
            plan = batch.backpropagation.plan
            if attached is not None:
                for name in self._parameters.keys() - plan.closed.keys():
                    self._withhold(name)
            if plan.fallback:
                batch.versions = {name: p._version for name, p in self._model.named_parameters()}
                for i in chosen:
                    self._hooks.append(leaves[i].register_hook(lambda g, i=i: self._arrive(batch, batch.arrived, i, g)))

    def _arrive(self, batch: TrackedBatch, into: dict[int, Tensor], key: int, gradient: Tensor) -> None:
        """Called by the user's backward pass (and, inactive, by the check of the factors)."""
        if self._recorder.active:
            gradient = gradient.detach()
            into[key] = into[key] + gradient if key in into else gradient
            batch.fallback = None

    # ------------------------------------------------------------------ factors

    def _done(self) -> list[TrackedBatch]:
        """The forward passes that a backward pass has followed."""
        done = [batch for batch in self._batches if batch.reached]
        if not done:
            raise RuntimeError(
                "no gradient has been seen: inside `with tc.track(model) as t:` call model(...) and then backward() on "
                "the loss, and ask afterwards"
            )
        return done

    def _each(self, batch: TrackedBatch, together: bool = False) -> Iterator[tuple[str, Factor]]:
        """Factors (V = 1) of the parameters that were used, one by one; ``together`` for sums over them."""
        backpropagation, record = batch.backpropagation, batch.record
        assert backpropagation is not None
        outside = {use.name for use in record.uses[batch.uses :]} | (record.escaped - batch.escaped)
        if outside:
            raise UnsupportedModelError(
                f"parameters {sorted(outside)} are also used outside of the model's call (in the loss?): that part of "
                "their gradient belongs to no sample; leave it out of the tracked loss"
            )
        derivatives = [batch.derivatives.get(i) for i in range(len(record.edges))]
        yield from backpropagation.each([None if d is None else d.unsqueeze(0) for d in derivatives], None, together)
        if backpropagation.plan.fallback and batch.fallback is None:
            self._check_repeatable(batch)
            like = backpropagation.captured.outputs
            arrived = [
                batch.arrived.get(i, torch.zeros(shape, dtype=like.dtype, device=like.device))
                for i, shape in batch.output_shapes
            ]
            with self._recorder.paused():  # it may still be active: the model is called again, by no one's step
                batch.fallback = dict(backpropagation.fallback(joined(arrived).unsqueeze(0)))
        yield from (batch.fallback or {}).items()

    def _check_repeatable(self, batch: TrackedBatch) -> None:
        assert batch.backpropagation is not None
        names = sorted(batch.backpropagation.plan.fallback)
        if batch.drew:
            raise UnsupportedModelError(
                f"parameters {names} have no closed rule, and the forward pass drew random numbers (dropout?), so that "
                "it cannot be repeated sample by sample: call model.eval(), freeze them, or register a rule"
            )
        if batch.versions != {name: p._version for name, p in self._model.named_parameters()}:
            raise RuntimeError(
                f"parameters {names} have no closed rule and need the model as it was in the forward pass, but it has "
                "been changed since: ask before optimizer.step()"
            )

    # ------------------------------------------------------------------ results

    def gradients(self) -> dict[str, Tensor]:
        """Per-sample gradients, {name: [N, *shape]}; over several backward passes one after the other.

        They are the samples' shares of the loss as it was reduced: summed over N they give what backward() added to
        ``p.grad``, so for a mean they carry its 1/N.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        for batch in self._done():
            factors = {n: f.spread(f.jacobian(), (2,)) for n, f in self._each(batch)}
            for name, p in self._parameters.items():
                J = factors.get(name)
                part = p.detach().new_zeros(batch.samples, p.numel()) if J is None else J
                found[name].append(part.reshape(batch.samples, *p.shape))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def gradient_norms(self, squared: bool = False) -> Tensor:
        """[N] norms of the per-sample gradients over all parameters, without forming them where that is cheaper."""
        parts = []
        for batch in self._done():
            total = total_squared_norms(factor for _, factor in self._each(batch, True))
            if total is None:
                p = next(iter(self._parameters.values()))
                total = torch.zeros(1, batch.samples, dtype=working_dtype(p.dtype), device=p.device)
            parts.append(total[0])
        norms = parts[0] if len(parts) == 1 else torch.cat(parts)
        return norms if squared else norms.sqrt()

    def gradient_gram(self) -> Tensor:
        """[N, N] inner products of the per-sample gradients over all parameters, symmetric to the bit."""
        batches = [dict(self._each(batch, True)) for batch in self._done()]
        rows: list[list[Tensor]] = []
        for i, left in enumerate(batches):
            before = [rows[j][i].T for j in range(i)]
            rows.append([*before, total_gram(left), *(inner_products(left, r)[0, :, 0] for r in batches[i + 1 :])])
        return rows[0][0] if len(rows) == 1 else torch.cat([torch.cat(parts, 1) for parts in rows])

    def gradient_variance(self) -> dict[str, Tensor]:
        """Variance over the samples of each entry of :meth:`gradients`, {name: parameter's shape}.

        The population variance ``(1/N) sum_n (g[n] - mean g)^2`` of the gradients as they are, so for a mean loss it
        carries 1/N^2. No per-sample gradient is formed for layers with one position per sample.
        """
        samples = sum(batch.samples for batch in self._done())
        moments = {
            name: torch.zeros(2, *p.shape, dtype=torch.float64, device=p.device) for name, p in self._parameters.items()
        }
        for batch in self._done():
            for name, factor in self._each(batch):
                first, second = gradient_moments(factor)
                moments[name][0] += first
                moments[name][1] += second
        found = {}
        for name, p in self._parameters.items():
            mean, square = moments[name] / samples
            found[name] = (square - mean.square()).clamp_(min=0).to(working_dtype(p.dtype))
        return found

    def coverage(self) -> dict[str, str]:
        """{name: "closed rule" | "fallback: why" | "unused" | "frozen"} of the calls seen."""
        plans = [b.backpropagation.plan for b in self._batches if b.backpropagation is not None]
        if not plans:
            raise RuntimeError("the model has not been called yet inside the with statement")
        return coverage(self._model, plans)


def track(model: nn.Module, parameter_gradients: bool = True) -> Track:
    """Observe a training step to get per-sample gradients out of the user's own backward pass.

        with tc.track(model) as t:
            loss_fn(model(x), y).backward()
        t.gradients()         # {name: [N, *shape]}
        t.gradient_norms()    # [N]

    ``.grad`` is accumulated as always, and on exit nothing is left on the model. Call the model once for each
    backward(); several such pairs follow one another along N. Active dropout is fine for parameters with a closed
    rule: the derivatives are those of the pass that was run.

    Args:
        model: the network.
        parameter_gradients: False where only per-sample quantities are wanted (norms to select or clip by, Gram
            matrices): no ``.grad`` is touched, and layers with a closed rule take part in the backward pass without
            the gradients of their own weights: two matrix products each instead of three, none for the first layer.

    Raises:
        TypeError, ValueError: ``model`` is no module, or nothing in it requires a gradient.
        UnsupportedModelError: in the forward pass, where batch normalisation uses batch statistics, or where
            ``parameter_gradients=False`` and the model cannot be run a second time with the same result (it is, the
            first time that its layers are seen, for the check of their derivatives); when asking, where parameters are
            used in the loss itself, or a random pass would have to be repeated.
    """
    return Track(model, parameter_gradients)
