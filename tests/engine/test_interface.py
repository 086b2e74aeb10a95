"""What can be passed in, and what bad input is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.capture import every_module, trainable_parameters
from torch_curvature.recorder import UnsupportedModelError

from .models import CASES, Function
from .test_losses_and_splits import close
from .test_state import LOSS, data, net


def test_inputs_as_tensor_tuple_or_dictionary() -> None:
    model = Function(lambda m, x, y=0.0: m.layer(x * y + x), layer=nn.Linear(3, 4))
    (x, t), y = data(), torch.randn(5, 3)
    truth = reference.gauss_newton(model, LOSS, ((x, y), t))
    for inputs in ((x, y), [x, y], {"x": x, "y": y}):
        close(tc.GaussNewton(model, LOSS, (inputs, t)).dense(), truth)
        close(tc.GaussNewton(model, LOSS, [(inputs, t)]).dense(), truth)
    close(tc.Jacobian(model, x).dense(), reference.jacobian(model, x))
    close(tc.Jacobian(model, {"x": x, "y": y}).dense(), reference.jacobian(model, (x, y)))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


def test_forward_adapts_other_batches_and_outputs() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, features: Tensor) -> Output:
            hidden = torch.tanh(self.layer(features))
            return Output(hidden * 2, hidden)

    model = Labelled()
    plain = Function(lambda m, x: torch.tanh(m.layer(x)) * 2, layer=model.layer)
    x, y = data()
    batches = [{"features": x[:2], "labels": y[:2]}, {"features": x[2:], "labels": y[2:]}]

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(features=batch["features"]).logits, batch["labels"]

    matrix = tc.GaussNewton(model, LOSS, batches, forward=forward)
    close(matrix.dense(), reference.gauss_newton(plain, LOSS, (x, y)))
    whole = {"features": x, "labels": y}
    v = torch.randn(16)
    close(tc.GaussNewton(model, LOSS, whole, forward=forward) @ v, reference.gauss_newton(plain, LOSS, (x, y)) @ v)
    close(tc.Jacobian(model, whole, forward=forward).dense(), reference.jacobian(plain, x))
    with pytest.raises(UnsupportedModelError, match="pass forward="):
        tc.GaussNewton(model, LOSS, (x, y)).trace()


def test_tracking_models_with_structured_outputs() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.rate = nn.Linear(3, 4), nn.Linear(3, 2), nn.Parameter(torch.rand(2))

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.first(x), "aux": torch.sigmoid(self.second(x)) ** self.rate, "note": "text"}

    model, (x, y) = TwoHeads(), data()
    with tc.track(model) as t:
        output = model(x)
        (LOSS(output["logits"], y) + output["aux"].square().mean()).backward()
    for name, p in model.named_parameters():
        close(t.gradients()[name].sum(0), p.grad)
    single = []
    for n in range(5):
        model.zero_grad()
        output = model(x[n : n + 1])
        (LOSS(output["logits"], y[n : n + 1]) / 5 + output["aux"].square().sum() / 10).backward()
        single.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    close(t.gradient_norms(), torch.stack(single))
    assert t.coverage()["rate"].startswith("fallback")


def test_a_generator_is_read_once_and_refused_afterwards() -> None:
    model, (x, y) = net(), data()

    def batches() -> Iterator[Any]:
        yield x[:2], y[:2]
        yield x[2:], y[2:]

    matrix = tc.GaussNewton(model, LOSS, batches())
    close(matrix.trace(), reference.gauss_newton(model, LOSS, (x, y)).trace())
    with pytest.raises(ValueError, match="read only once"):
        matrix.diagonal()


def test_results_that_cannot_fit_are_refused_before_anything_is_computed() -> None:
    calls = []
    model = Function(lambda m, x: calls.append(1) or m.layer(x), layer=nn.Linear(10_000, 1000))
    batch = torch.randn(2, 10_000), torch.randint(0, 1000, (2,))
    with pytest.raises(MemoryError, match=r"10001000 x 10001000.* takes 7\.45e\+05 GiB"):
        tc.GaussNewton(model, LOSS, batch).dense()
    with pytest.raises(MemoryError, match="memory_budget"):
        tc.GaussNewton(model, LOSS, batch, memory_budget=0.5).blocks()
    assert not calls
    with pytest.raises(MemoryError, match="GiB"):
        tc.Jacobian(model, batch[0], memory_budget=0.01).dense()
    assert tc.GaussNewton(model, nn.MSELoss(), (batch[0], torch.randn(2, 1000))).trace() > 0


def test_messages_of_bad_input() -> None:
    model, (x, y) = net(), data()
    scalar = Function(lambda m, x: m.layer(x).sum(), layer=nn.Linear(3, 4))
    detached = Function(lambda m, x: m.layer(x).detach(), layer=nn.Linear(3, 4))
    flattened = nn.Sequential(
        nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), nn.Flatten(0, 1)
    )
    infinite = nn.Linear(3, 4)
    nn.init.constant_(infinite.weight, torch.nan)
    by_frequency = nn.Embedding(4, 4, scale_grad_by_freq=True)
    for call, error, message in (
        (lambda: tc.GaussNewton(torch.tanh, LOSS, (x, y)), TypeError, "model must be a torch.nn.Module"),
        (lambda: tc.GaussNewton(nn.Tanh(), LOSS, (x, y)), ValueError, "no parameter with requires_grad"),
        (lambda: tc.GaussNewton(model, LOSS, 3), TypeError, "data must be one batch"),
        (lambda: tc.GaussNewton(model, LOSS, []).trace(), ValueError, "no batch"),
        (lambda: tc.GaussNewton(model, LOSS, [x, x, x]).trace(), TypeError, r"a batch must be a pair"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y, x)).trace(), TypeError, r"tuple of length 3"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y), memory_budget=-1), ValueError, "memory_budget must be"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)).blocks(by="layer"), ValueError, "by must be"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)).kronecker("mean"), ValueError, "sharing must be"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)) @ torch.randn(3), ValueError, r"P = 36, got \(3,\)"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)) @ {"0.weight": x}, KeyError, "missing or unknown"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)) @ torch.arange(36), TypeError, "floating"),
        (lambda: tc.GaussNewton(model, LOSS, (x, y)) @ 3, TypeError, "tensor or a dictionary"),
        (lambda: tc.Fisher(model, LOSS, (x, y), samples=0), ValueError, "samples must be"),
        (lambda: tc.Jacobian(model, x).diagonal(), TypeError, "not a square matrix"),
        (lambda: tc.Jacobian(model, x).transposed_product(torch.randn(2, 4)), ValueError, "outputs' shape"),
        (lambda: tc.track(torch.tanh), TypeError, "model must be"),
        (lambda: tc.register_rule(3, lambda: None), TypeError, "target must be"),
        (lambda: tc.GaussNewton(scalar, LOSS, (x, y)).trace(), UnsupportedModelError, "no batch axis"),
        (lambda: tc.GaussNewton(detached, LOSS, (x, y)).trace(), UnsupportedModelError, "depends on no parameter"),
        (lambda: tc.Jacobian(flattened, y[:4].view(2, 2)).dense(), UnsupportedModelError, "first axis of the outputs"),
        (lambda: tc.Jacobian(nn.Sequential(infinite, nn.Linear(4, 4)), x).dense(), ValueError, "not finite"),
        (lambda: tc.Jacobian(model, x[:0]).dense(), ValueError, "no sample"),
        (lambda: tc.Jacobian(nn.LazyLinear(3), x), ValueError, "not initialised"),
        (lambda: tc.GaussNewton(by_frequency, LOSS, (y, y)).trace(), ValueError, "scale_grad_by_freq"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_gram_of_a_loss_that_is_not_convex_is_refused() -> None:
    model, (x, _) = net(), data()
    matrix = tc.GaussNewton(model, lambda u, y: torch.cos(u).sum(), (x, torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="not convex"):
        matrix.gram()
    truth = reference.gauss_newton(model, lambda u, y: torch.cos(u).sum(), (x, torch.zeros(5, 4)))
    close(matrix.dense(), truth)
    close(matrix.trace(), truth.trace())
    close(matrix.frobenius_norm(), truth.norm())


def test_coverage_before_and_after() -> None:
    model, (x, y) = net(), data()
    model[0].weight.requires_grad_(False)
    expected = {"0.weight": "frozen", "0.bias": "closed rule", "2.weight": "closed rule", "2.bias": "closed rule"}
    assert tc.GaussNewton(model, LOSS, (x, y)).coverage() == expected
    with tc.track(model) as t:
        LOSS(model(x), y).backward()
    assert t.coverage() == expected


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model, (x, y) = net(), data()
    tc.GaussNewton(model, LOSS, [(x, y)] * 3, progress=True).trace()
    assert "GaussNewton.trace: batch 3/3" in capsys.readouterr().err
    tc.GaussNewton(model, LOSS, [(x, y)] * 3).trace()
    assert capsys.readouterr().err == ""


def test_properties() -> None:
    """Positive semi-definite, symmetric, and one matrix in all representations, in float32 too."""
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, (x, y) = net().to(dtype), data()
        for matrix in (
            tc.GaussNewton(model, LOSS, (x.to(dtype), y)),
            tc.Fisher(model, LOSS, (x.to(dtype), y), samples=3),
            tc.EmpiricalFisher(model, LOSS, (x.to(dtype), y)),
        ):
            dense = matrix.dense()
            assert dense.dtype == dtype
            assert torch.equal(dense, dense.T)
            assert torch.linalg.eigvalsh(dense).min() > -slack
            diagonal = torch.cat([d.flatten() for d in matrix.diagonal().values()])
            blocks = torch.cat([b.diagonal() for b in matrix.blocks().values()])
            assert torch.allclose(diagonal, blocks, atol=slack)
            assert torch.allclose(diagonal.sum(), matrix.trace(), atol=slack)
            assert torch.allclose(matrix.gram().trace(), matrix.trace(), atol=slack)
            v = torch.randn(len(dense), dtype=dtype)
            assert torch.allclose(matrix @ v, dense @ v, atol=100 * slack)


def test_modules_and_parameters_have_the_names_torch_gives_them() -> None:
    shared = nn.Linear(3, 3)
    nested = nn.ModuleDict(
        {"first": shared, "again": shared, "inside": nn.Sequential(nn.ReLU(), nn.Sequential(shared))}
    )
    nested["tied"] = nn.Linear(3, 3)
    nested["tied"].weight = shared.weight
    nested.register_module("nothing", None)
    for model in (nested, shared, nn.Sequential(nested, shared), *(case.build() for case in CASES.values())):
        assert [(n, m) for m, n in every_module(model).items()] == list(model.named_modules())
        names = [(n, id(p)) for n, p in model.named_parameters() if p.requires_grad]
        assert [(n, id(p)) for n, p in trainable_parameters(model).items()] == names


class _Renamed(nn.Linear):
    """As wrappers do that hide their own part of a name."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((f"plain.{name}", p) for name, p in super().named_parameters(*args, **kwargs))


class _Inside(nn.Sequential):
    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield name.replace("1.", "hidden."), module


def test_a_class_with_names_of_its_own_is_asked() -> None:
    assert list(trainable_parameters(_Renamed(2, 3))) == ["plain.weight", "plain.bias"]
    inside = nn.Sequential(nn.Linear(2, 3), _Inside(nn.Linear(3, 2)))
    assert list(trainable_parameters(inside)) == [name for name, _ in inside.named_parameters()]
