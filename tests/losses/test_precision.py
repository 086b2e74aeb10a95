"""Half precision, accuracy in float32, large vocabularies without C x C arrays, devices, and no side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_curvature.losses import interpret
from torch_curvature.losses.interface import BoundLoss


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LOSSES: dict[str, tuple[Callable[..., Any], Callable[[int, int], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, lambda n, c: torch.arange(n) % c),
    "soft targets": (F.cross_entropy, lambda n, c: draw(n, c, seed=2).softmax(1)),
    "flattened": (lambda u, y: F.cross_entropy(u.view(-1, u.shape[1]), y), lambda n, c: torch.arange(n) % c),
    "nll": (F.nll_loss, lambda n, c: torch.arange(n) % c),
    "mse": (F.mse_loss, lambda n, c: draw(n, c, seed=2)),
    "bce": (F.binary_cross_entropy_with_logits, lambda n, c: (draw(n, c, seed=2) > 0).float()),
    "generic": (lambda u, y: ((u - y) ** 4).mean(), lambda n, c: draw(n, c, seed=2)),
}


def quantities(bound: BoundLoss, u: Tensor) -> dict[str, Tensor]:
    columns = [s for s, _ in bound.columns()]
    return {
        "value": bound.value().detach(),
        "gradient": bound.gradient(),
        "product": bound.hessian_product(u),
        "hessian": sum((torch.einsum("vni,vnj->nij", s, s) for s in columns), torch.zeros((), dtype=u.dtype)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_outputs_are_worked_on_in_float32(name: str, dtype: torch.dtype) -> None:
    loss_fn, targets_of = LOSSES[name]
    outputs, targets = draw(64, 12, dtype=dtype), targets_of(64, 12)
    loss = interpret(loss_fn)
    bound = loss.bind(outputs, targets)
    exact = interpret(loss_fn).bind(outputs.double(), targets.double() if targets.is_floating_point() else targets)
    u = draw(2, 64, 12)
    assert bound.denominator.dtype == torch.float64
    for key, got in quantities(bound, u).items():
        assert got.dtype == torch.float32
        expected = quantities(exact, u.double())[key]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_confident_predictions_keep_their_relative_accuracy() -> None:
    """1 - p is 1e-11 here; diag(sqrt p) - p sqrt(p)^T in float32 gives 0 for it, the triangular factor 1e-11."""
    for winner in (0, 2, 4):
        outputs = torch.zeros(1, 5)
        outputs[0, winner] = 26.0
        outputs += 0.3 * draw(1, 5)
        bound = interpret(F.cross_entropy).bind(outputs, torch.tensor([winner]))
        (s, _) = next(bound.columns())
        got = s.double().square().sum(0)[0]
        p = outputs.double().softmax(1)[0]
        others = torch.stack([p[torch.arange(5) != k].sum() for k in range(5)])
        torch.testing.assert_close(got, p * others, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_extreme_logits_stay_finite_and_right(scale: float) -> None:
    outputs, y = scale * draw(16, 7), torch.arange(16) % 7
    for loss_fn, targets in (
        (F.cross_entropy, y),
        (F.binary_cross_entropy_with_logits, (draw(16, 7, seed=1) > 0).float()),
    ):
        u = draw(2, 16, 7, seed=3)
        got = quantities(interpret(loss_fn).bind(outputs, targets), u)
        expected = quantities(
            interpret(loss_fn).bind(outputs.double(), targets if targets is y else targets.double()), u.double()
        )
        for key, value in got.items():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and 0 not in x.stride():
                self.numel = max(self.numel, x.numel())
        return result


FORMS: dict[str, Callable[..., Any]] = {
    "function": F.cross_entropy,
    "callable": lambda u, y: F.cross_entropy(u.view(-1, 50_000), y.view(-1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_vocabulary_of_50000_never_makes_a_square(form: str) -> None:
    """Nothing larger than the columns asked for is made, and they are right where they are looked at."""
    samples, classes, chunk = 3, 50_000, 4
    outputs, y = draw(samples, classes), torch.tensor([1, -100, 49_999])
    u = draw(2, samples, classes, seed=1)
    with Largest() as largest:
        bound = interpret(FORMS[form]).bind(outputs, y)
        value, gradient, product = bound.value(), bound.gradient(), bound.hessian_product(u)
        drawn = bound.sample_columns(chunk, torch.Generator().manual_seed(0))
        columns = bound.columns(chunk)
        first, second = next(columns)[0], next(columns)[0]
    assert bound.num_columns == classes - 1
    assert largest.numel <= chunk * samples * classes
    assert first.shape == second.shape == drawn.shape == (chunk, samples, classes)
    assert not product[:, 1].any()

    exact = outputs.double()
    p, valid = exact.softmax(1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(value.double(), F.cross_entropy(exact, y, reduction="sum"), rtol=1e-6, atol=1e-6)
    expected = valid * (p - F.one_hot(y.clamp(min=0), classes))
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-8)
    expected = valid * p * (u - (p * u).sum(-1, keepdim=True))
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-9)
    # The leading 8 x 8 block of the Hessian only depends on the first 8 columns of a lower triangular factor.
    s = torch.cat([first, second])[:, :, :8].double()
    block = torch.einsum("vni,vnj->nij", s, s)
    q = p[:, :8]
    expected = valid[:, :, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
    torch.testing.assert_close(block, expected, rtol=1e-3, atol=1e-11)


def test_all_columns_of_a_large_vocabulary_in_float32() -> None:
    outputs, y = 3 * draw(2, 3000), torch.tensor([0, 7])
    bound = interpret(F.cross_entropy).bind(outputs, y)
    total = torch.zeros(2, 3000, 3000, dtype=torch.float64)
    for s, _ in bound.columns(500):
        total += torch.einsum("vni,vnj->nij", s.double(), s.double())
    p = outputs.double().softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    relative = (total - expected).abs() / (scale[:, :, None] * scale[:, None, :])
    assert relative.max() < 1e-5


def test_outputs_in_a_graph_stay_as_they_are() -> None:
    for loss_fn, targets_of in LOSSES.values():
        x = draw(4, 3).requires_grad_()
        outputs = x * 2
        before = outputs.detach().clone()
        bound = interpret(loss_fn).bind(outputs, targets_of(4, 3))
        got = quantities(bound, draw(2, 4, 3))
        assert not any(value.requires_grad for value in got.values())
        assert bound.value().requires_grad
        assert x.grad is None
        assert torch.equal(before, outputs.detach())
        with torch.no_grad():
            again = quantities(interpret(loss_fn).bind(outputs, targets_of(4, 3)), draw(2, 4, 3))
        for key, value in got.items():
            assert torch.equal(value, again[key])


def test_memory_layout_of_the_outputs_does_not_matter() -> None:
    for loss_fn, y in (
        (F.cross_entropy, torch.zeros(3, 5).long()),
        (lambda u, t: F.cross_entropy(u, t), torch.ones(3, 5).long()),
    ):
        outputs = draw(5, 4, 3).permute(2, 1, 0)
        u = draw(2, 3, 4, 5)
        one = interpret(loss_fn).bind(outputs, y)
        other = interpret(loss_fn).bind(outputs.contiguous(), y)
        torch.testing.assert_close(one.hessian_product(u), other.hessian_product(u))
        torch.testing.assert_close(one.gradient(), other.gradient())


def test_on_any_device(device: str) -> None:
    """The same numbers on the device given by --device as on the CPU."""
    for loss_fn, targets_of in LOSSES.values():
        outputs, targets, u = draw(8, 6), targets_of(8, 6), draw(2, 8, 6)
        here = quantities(interpret(loss_fn).bind(outputs, targets), u)
        loss = interpret(loss_fn)
        bound = loss.bind(outputs.to(device), targets.to(device))
        there = quantities(bound, u.to(device))
        for key, value in there.items():
            assert value.device.type == torch.device(device).type
            torch.testing.assert_close(value.cpu(), here[key], rtol=1e-4, atol=1e-6)
        assert loss.combine([bound.denominator, bound.denominator]).item() == 2 * bound.denominator.item()
        if loss_fn is F.cross_entropy:
            drawn = bound.sample_columns(2, torch.Generator(device=device).manual_seed(0))
            assert drawn.device.type == torch.device(device).type
