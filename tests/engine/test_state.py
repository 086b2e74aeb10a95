"""Nothing of the user's is changed, in whatever context the call is made."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.recorder import UnsupportedModelError

from .models import CASES, Function
from .test_losses_and_splits import close
from .test_matrices import call, problem

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))


def data(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.randint(0, 4, (n,))


def snapshot(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: list[Any] = [
        [(n, sorted(vars(m)), m.training, [len(getattr(m, h)) for h in hooks]) for n, m in model.named_modules()]
    ]
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        hooked = len(t._backward_hooks or {})
        state.append((name, id(t), t.requires_grad, t._version, t.detach().clone(), t.grad, hooked, sorted(vars(t))))
    return state


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and torch.equal(before, after)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(same(b, a) for b, a in zip(before, after))
    return bool(before == after)


def every_method(model: nn.Module, batch: Any) -> None:
    matrix = tc.GaussNewton(model, LOSS, batch)
    matrix.dense(), matrix.blocks(), matrix.diagonal(), matrix.kronecker(), matrix.gram(), matrix.trace()
    matrix.frobenius_norm(), matrix.coverage(), matrix @ torch.randn(matrix._size())
    tc.Fisher(model, LOSS, batch, samples=2).trace()
    tc.EmpiricalFisher(model, LOSS, batch).diagonal()
    J = tc.Jacobian(model, (batch[0], None))
    J.dense(), J.gram(), J @ torch.randn(matrix._size())


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, inputs, targets = problem(name)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    before, random = snapshot(model), torch.get_rng_state()
    every_method_but_vectors = tc.GaussNewton(model, LOSS, (inputs, targets))
    every_method_but_vectors.diagonal(), every_method_but_vectors.gram(), every_method_but_vectors.blocks()
    vector = {n: torch.ones_like(p) for n, p in model.named_parameters() if p.requires_grad}
    every_method_but_vectors @ vector
    tc.Fisher(model, LOSS, (inputs, targets), samples=2).trace()
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, snapshot(model))
    with tc.track(model):
        call(model, inputs)
    assert torch.equal(random, torch.get_rng_state())
    assert same(before, snapshot(model))


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("in the middle of the forward pass")


def test_exceptions_leave_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Failing())
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        tc.GaussNewton(model, LOSS, data()).diagonal()
    with pytest.raises(ZeroDivisionError), tc.track(model):
        model(data()[0])
    assert same(before, snapshot(model))
    assert torch.overrides._get_current_function_mode_stack() == []
    model = net()
    before = snapshot(model)
    x, y = data()
    with pytest.raises(ValueError, match="target"), tc.track(model):
        LOSS(model(x), y[:2])
    assert same(before, snapshot(model))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_tracking_accumulates_grad_as_always() -> None:
    model, (x, y) = net(), data()
    twin = copy.deepcopy(model)
    for _ in range(2):
        LOSS(twin(x), y).backward()
        with tc.track(model) as t:
            LOSS(model(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert t.gradient_norms().shape == (5,)


@pytest.mark.parametrize("parameter_gradients", [True, False])
def test_a_tracked_step_goes_with_its_last_reference(parameter_gradients: bool) -> None:
    """Its activations and derivatives (hundreds of megabytes) do not wait for the garbage collector."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 4)
    activations: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda m, i, output: activations.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        with tc.track(model, parameter_gradients=parameter_gradients) as tracked:
            model(x).square().sum().backward()
        tracked.gradient_norms()
        assert activations
        track = weakref.ref(tracked)
        del tracked
        assert track() is None
        assert not any(activation() is not None for activation in activations)
    finally:
        gc.enable()


def test_tracking_several_backward_passes_and_an_optimiser() -> None:
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    truth, batches = [], [data(3), data(5), data(1)]
    twin = copy.deepcopy(model)
    with tc.track(model) as t:
        for x, y in batches:
            twin.load_state_dict(model.state_dict())
            truth.append(reference.per_sample_gradients(twin, LOSS, (x, y)))
            optimiser.zero_grad()
            LOSS(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                model(x)
    rows = torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in truth])
    close(torch.cat([g.flatten(1) for g in t.gradients().values()], 1), rows)
    close(t.gradient_norms(), rows.norm(dim=1))
    close(t.gradient_gram(), rows @ rows.T)
    variance = torch.cat([v.flatten() for v in t.gradient_variance().values()])
    close(variance, rows.var(0, unbiased=False))


def test_tracking_with_active_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 4)).train()
    x, y = data()
    with tc.track(model) as t:
        LOSS(model(x), y).backward()
    for name, p in model.named_parameters():
        close(t.gradients()[name].sum(0), p.grad)


def test_tracking_refuses_what_has_no_per_sample_gradient() -> None:
    model, (x, y) = net(), data()
    with tc.track(model) as t:
        (LOSS(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()
    with pytest.raises(UnsupportedModelError, match="outside of the model's call"):
        t.gradients()
    with tc.track(model) as t:
        pass
    with pytest.raises(RuntimeError, match="no gradient has been seen"):
        t.gradient_norms()
    with pytest.raises(UnsupportedModelError, match="called again before backward"), tc.track(model):
        (LOSS(model(x), y) + LOSS(model(x), y)).backward()
    rate = nn.Parameter(torch.rand(4))
    odd = Function(
        lambda m, x: m.drop(m.layer(x)) * m.rate.exp(), layer=nn.Linear(3, 4), drop=nn.Dropout(0.3), rate=rate
    )
    with tc.track(odd) as t:
        LOSS(odd(x.abs()), y).backward()
    with pytest.raises(UnsupportedModelError, match="random numbers"):
        t.gradients()


@pytest.mark.parametrize("parameter_gradients", [True, False])
def test_tracking_without_any_closed_rule(parameter_gradients: bool) -> None:
    """Several passes, two backward passes through one call, and asking while the track is active."""
    model = Function(lambda m, x: torch.sin(x[:, :, None] * m.rate.exp()).sum(1), rate=nn.Parameter(torch.rand(3, 4)))
    batches = [data(3), data(5)]
    truth = [reference.per_sample_gradients(model, LOSS, batch)["rate"] for batch in batches]
    with tc.track(model, parameter_gradients=parameter_gradients) as t:
        for x, y in batches:
            LOSS(model(x), y).backward()
        close(t.gradients()["rate"], torch.cat(truth))
        close(t.gradient_norms(), torch.cat(truth).flatten(1).norm(dim=1))
    assert t.coverage()["rate"].startswith("fallback")
    x, y = batches[0]
    with tc.track(model, parameter_gradients=parameter_gradients) as t:
        loss = LOSS(model(x), y)
        for times in (1.0, 2.0):
            loss.backward(retain_graph=True)
            close(t.gradients()["rate"], times * truth[0])


def test_fallback_parameters_must_not_have_moved_since() -> None:
    model = Function(
        lambda m, x: torch.sin(m.layer(x) * m.rate.exp()), layer=nn.Linear(3, 4), rate=nn.Parameter(torch.rand(4))
    )
    x, y = data()
    with tc.track(model) as t:
        LOSS(model(x), y).backward()
    with torch.no_grad():
        model.rate.add_(1)
    with pytest.raises(RuntimeError, match=r"ask before optimizer\.step"):
        t.gradients()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_batch_statistics(training: bool) -> None:
    x, y = data()
    dropout = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train(training)
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train(training)
    functional = Function(
        lambda m, x: nn.functional.dropout(m.layer(x), training=m.training), layer=nn.Linear(3, 4)
    ).train(training)
    for model, message in (
        (dropout, r"draws random numbers \(active: 1\)"),
        (normed, "batch statistics"),
        (functional, "draws random"),
    ):
        vector = torch.randn(sum(p.numel() for p in model.parameters()))
        before, random = snapshot(model), torch.get_rng_state()
        if training:
            with pytest.raises(UnsupportedModelError, match=message):
                tc.GaussNewton(model, LOSS, (x, y)).diagonal()
            with pytest.raises(UnsupportedModelError, match=message):
                tc.GaussNewton(model, LOSS, (x, y)) @ vector
        else:
            close(tc.GaussNewton(model, LOSS, (x, y)).dense(), reference.gauss_newton(model, LOSS, (x, y)))
        assert same(before[0], snapshot(model)[0])
        assert [torch.equal(a[4], b[4]) for a, b in zip(before[1:], snapshot(model)[1:])] == [True] * (len(before) - 1)
        assert torch.equal(random, torch.get_rng_state())


def test_models_that_mix_samples_or_change_state_are_refused() -> None:
    x, y = data()
    mixing = Function(lambda m, x: torch.tanh(m.layer(x) - m.layer(x).mean(0)), layer=nn.Linear(3, 4))
    with pytest.raises(UnsupportedModelError, match="mixes the samples"):
        tc.GaussNewton(mixing, LOSS, (x, y)).diagonal()

    def count(m: Any, x: Tensor) -> Tensor:
        m.calls.add_(1)
        return m.layer(x)

    counting = Function(count, layer=nn.Linear(3, 4), calls=torch.zeros(()))
    with pytest.raises(UnsupportedModelError, match="changes the buffers"):
        tc.GaussNewton(counting, LOSS, (x, y)).diagonal()
    assert counting.calls == 0
