"""Tracked steps without the parameters' gradients: the same per-sample quantities, no ``.grad``, fewer products."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_curvature as tc
from torch_curvature import UnsupportedModelError, reference
from torch_curvature.layers import FUNCTION_RULES

from .models import CASES, Function
from .test_matrices import N, call, close, own_rule, problem  # noqa: F401

LOSS = nn.CrossEntropyLoss()


def rows_of(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


@pytest.mark.parametrize("name", CASES)
def test_every_model(name: str) -> None:
    """Twice, for the second pass finds the plan that the first one proved."""
    model, inputs, targets = problem(name)
    truth = reference.per_sample_gradients(model, LOSS, (inputs, targets))
    rows = torch.cat([g.reshape(N, -1) for g in truth.values()], 1)
    kept = {n: torch.randn_like(p) if p.requires_grad and i % 2 else None for i, (n, p) in named(model)}
    for n, p in model.named_parameters():
        p.grad = None if kept[n] is None else kept[n].clone()
    random = torch.get_rng_state()
    for _ in range(2):
        with tc.track(model, parameter_gradients=False) as t:
            LOSS(call(model, inputs), targets).backward()
        gradients = t.gradients()
        assert list(gradients) == list(truth)
        for key in truth:
            close(gradients[key], truth[key], rows)
        close(t.gradient_norms(), rows.norm(dim=1))
        close(t.gradient_gram(), rows @ rows.T)
        for key, variance in t.gradient_variance().items():
            close(variance, truth[key].var(0, unbiased=False), rows.square())
    assert torch.equal(random, torch.get_rng_state())
    for n, p in model.named_parameters():
        assert (p.grad is None) if kept[n] is None else torch.equal(p.grad, kept[n])
    with tc.track(model) as ordinary:
        LOSS(call(model, inputs), targets).backward()
    assert t.coverage() == ordinary.coverage()


def named(model: nn.Module) -> Any:
    return enumerate(model.named_parameters())


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_only_the_products_that_are_needed() -> None:
    """Three layers: three forwards, and backwards two instead of five; .grad is as before once the track is left."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    for light, expected in ((False, 8), (True, 5)):
        for _ in range(2):
            with tc.track(model, parameter_gradients=not light), Products() as products:
                LOSS(model(x), y).backward()
        assert products.count == expected
    model.zero_grad()
    LOSS(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_several_passes_of_unequal_size() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    batches = [(torch.randn(n, 3), torch.randint(4, (n,))) for n in (3, 5, 1)]
    truth = torch.cat([rows_of(reference.per_sample_gradients(model, LOSS, batch)) for batch in batches])
    with tc.track(model, parameter_gradients=False) as t:
        for x, y in batches:
            LOSS(model(x), y).backward()
            with torch.no_grad():
                model(x)
    close(rows_of(t.gradients()), truth)
    close(t.gradient_gram(), truth @ truth.T)


@pytest.mark.parametrize("inplace", [False, True])
def test_active_dropout(inplace: bool) -> None:
    """The pass that proves the plan draws the same numbers, and leaves the generator where the user's pass left it."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5, inplace), nn.ReLU(inplace), nn.Linear(8, 4)).train()
    twin = copy.deepcopy(model)
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    for _ in range(2):
        seed = torch.get_rng_state()
        with tc.track(twin) as ordinary:
            LOSS(twin(x), y).backward()
        after = torch.get_rng_state()
        torch.set_rng_state(seed)
        with tc.track(model, parameter_gradients=False) as t:
            LOSS(model(x), y).backward()
        assert torch.equal(after, torch.get_rng_state())
        close(rows_of(t.gradients()), rows_of(ordinary.gradients()))


def test_gradients_of_inputs_and_no_grad() -> None:
    """What the caller differentiates otherwise is as always; under no_grad nothing requires a gradient."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(5, 3, requires_grad=True), torch.randint(4, (5,))
    (expected,) = torch.autograd.grad(LOSS(model(x), y), x)
    with tc.track(model, parameter_gradients=False) as t:
        with torch.no_grad():
            assert not model(x).requires_grad
        LOSS(model(x), y).backward()
    close(x.grad, expected)
    close(rows_of(t.gradients()), rows_of(reference.per_sample_gradients(model, LOSS, (x.detach(), y))))


def test_parameters_in_the_loss_are_refused_and_get_no_gradient() -> None:
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.randint(4, (5,))
    with tc.track(model, parameter_gradients=False) as t:
        (LOSS(model(x), y) + model.weight.square().sum() + nn.functional.linear(x, model.weight).sum()).backward()
    assert model.weight.grad is None
    with pytest.raises(UnsupportedModelError, match="outside of the model's call"):
        t.gradient_norms()


class Squared(torch.autograd.Function):
    """A use of a parameter that no mode of torch sees."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight.square(), (2 * gradient * x * weight).sum(0)


def test_a_use_that_is_not_seen() -> None:
    model = Function(
        lambda m, x: Squared.apply(m.layer(x), m.weight), layer=nn.Linear(3, 4), weight=nn.Parameter(torch.randn(4))
    )
    twin = Function(
        lambda m, x: m.layer(x) * m.weight * m.weight, layer=model.layer, weight=nn.Parameter(model.weight.detach())
    )
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    with tc.track(model, parameter_gradients=False) as t:
        LOSS(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert t.coverage()["weight"].startswith("fallback")
    truth = reference.per_sample_gradients(twin, LOSS, (x, y))
    for name, gradient in t.gradients().items():
        close(gradient, truth[name])


def test_a_model_that_cannot_be_run_twice_is_refused() -> None:
    """The check of its derivatives would be one of another pass."""
    calls: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        calls.append(0)
        return m.layer(x) * len(calls)

    model = Function(forward, layer=nn.Linear(3, 4))
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    with (
        pytest.raises(UnsupportedModelError, match="parameter_gradients=True"),
        tc.track(model, parameter_gradients=False),
    ):
        model(x)
    with tc.track(model) as t:
        LOSS(model(x), y).backward()
    close(t.gradients()["layer.weight"].sum(0), model.layer.weight.grad)


def test_buffers_are_left_as_the_callers_pass_left_them() -> None:
    model = Function(lambda m, x: (m.calls.add_(1), m.layer(x))[1], layer=nn.Linear(3, 4), calls=torch.zeros(()))
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    with tc.track(model, parameter_gradients=False) as t:
        LOSS(model(x), y).backward()
    assert model.calls == 1
    close(rows_of(t.gradients()), rows_of(reference.per_sample_gradients(model, LOSS, (x, y))))


def test_a_rule_that_is_wrong_goes_to_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trusted for having been detached."""

    def wrong(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        yield tc.Use(weight, 1, lambda dz: dz.unsqueeze(2), lambda: 2 * input.unsqueeze(1))

    monkeypatch.setitem(FUNCTION_RULES, nn.functional.linear, wrong)
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.randint(4, (5,))
    with tc.track(model, parameter_gradients=False) as t:
        LOSS(model(x), y).backward()
    assert all(t.coverage()[name].startswith("fallback") for name in ("weight", "bias"))
    assert all(p.grad is None for p in model.parameters())
    close(rows_of(t.gradients()), rows_of(reference.per_sample_gradients(model, LOSS, (x, y))))


def test_compiled_and_distributed_models(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    truth = rows_of(reference.per_sample_gradients(model, LOSS, (x, y)))
    frames: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    with tc.track(compiled, parameter_gradients=False) as t:
        LOSS(compiled(x), y).backward()
    close(rows_of(t.gradients()), truth)
    assert not frames, "what observes the model was compiled with it"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            tc.track(nn.parallel.DistributedDataParallel(model), parameter_gradients=False)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(autocast: bool) -> None:
    """What the ordinary tracked step gives, to the bit: the same operations are made, but for those left out."""
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    model = model.to(torch.float32 if autocast else torch.bfloat16)
    x, y = torch.randn(5, 3).to(model[0].weight.dtype), torch.randint(4, (5,))
    found = []
    for parameter_gradients in (True, False, False):
        model.zero_grad()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            tc.track(model, parameter_gradients=parameter_gradients) as t,
        ):
            LOSS(model(x), y).backward()
        assert set(t.coverage().values()) == {"closed rule"}
        found.append(t.gradients())
    assert all(p.grad is None for p in model.parameters())
    for name, gradient in found[0].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(found[1][name], gradient)
        assert torch.equal(found[2][name], gradient)


def test_models_that_use_transforms() -> None:
    model = Function(
        lambda m, x: torch.tanh(torch.func.vmap(m.first)(x)) @ m.last,
        first=nn.Linear(3, 4),
        last=nn.Parameter(torch.randn(4, 4)),
    )
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    truth = rows_of(reference.per_sample_gradients(model, LOSS, (x, y)))
    for parameter_gradients in (True, False, False):
        model.zero_grad()
        with tc.track(model, parameter_gradients=parameter_gradients) as t:
            LOSS(model(x), y).backward()
        close(rows_of(t.gradients()), truth)
    assert all(p.grad is None for p in model.parameters())


def test_threads() -> None:
    problems = [(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(n, 3)) for n in range(3, 9)]
    truths = [rows_of(reference.per_sample_gradients(m, nn.MSELoss(), (x, x.new_ones(len(x), 4)))) for m, x in problems]
    found: list[Any] = [None] * len(problems)

    def work(k: int) -> None:
        model, x = problems[k]
        for _ in range(5):
            with tc.track(model, parameter_gradients=False) as t:
                (model(x) - 1).square().mean().backward()
            found[k] = rows_of(t.gradients())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, truth in zip(found, truths):
        close(ours, truth)
