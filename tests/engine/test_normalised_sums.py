"""Gradients of single samples by the weights of layer and root-mean-square normalisation, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_curvature as tc
from torch_curvature.layers import normalisation

pytestmark = pytest.mark.usefixtures("on_the_cpu")  # the helpers are of the CPU

normalised_sums = torch.ops.torch_curvature.normalised_sums


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that the helper was given."""
    found: list[torch.Size] = []
    helper = normalisation._normalised_sums
    monkeypatch.setattr(normalisation, "_normalised_sums", lambda g, *a: (found.append(g.shape), helper(g, *a))[1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("V", "N", "S", "features"),
    [(1, 1, 1, 1), (1, 5, 3, 7), (2, 4, 1, 16), (3, 2, 6, 33), (1, 40, 64, 128), (1, 3, 2, 0)],
)
def test_values(V: int, N: int, S: int, features: int, centred: bool, dtype: torch.dtype) -> None:
    g, x = torch.randn(V, N * S, features, dtype=dtype), 3 * torch.randn(N * S, features, dtype=dtype) + 1
    wide = x.double()
    shift = wide.mean(1, keepdim=True) if centred else 0.0
    normal = (wide - shift) / ((wide - shift).square().mean(1, keepdim=True) + 0.01).sqrt()
    terms = (g.double() * normal).view(V, N, S, features)
    for given in (g, g.transpose(0, 1).contiguous().transpose(0, 1)):
        found = normalised_sums(given, x, N, 0.01, centred)
        assert found.dtype == dtype
        error = (found.double() - terms.sum(2)).abs()
        assert bool((error <= 64 * torch.finfo(dtype).eps * (terms.abs().sum(2) + S)).all())


class Rows(nn.Module):
    """Normalised rows between two layers; the samples along axis 0 or, `turned`, along axis 1."""

    def __init__(self, norm: nn.Module, turned: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.turned = nn.Linear(3, 6), norm, nn.Linear(6, 2), turned

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x)
        rows = self.norm(rows.transpose(0, 1)).transpose(0, 1) if self.turned else self.norm(rows)
        return self.last(torch.tanh(rows)).mean(1)


def own_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Sample by sample."""
    parameters = dict(model.named_parameters())
    each = [torch.autograd.grad(model(row[None]).square().sum(), list(parameters.values())) for row in x]
    return {name: torch.stack(found) for name, found in zip(parameters, zip(*each))}


NORMS: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {  # the module, samples turned, by the helper
    "layer": (lambda: nn.LayerNorm(6), False, True),
    "layer without a bias": (lambda: nn.LayerNorm(6, bias=False, eps=0.1), False, True),
    "root mean square": (lambda: nn.RMSNorm(6), False, True),
    "root mean square, eps": (lambda: nn.RMSNorm(6, eps=0.1), False, True),
    "over two axes": (lambda: nn.LayerNorm((4, 6)), False, True),
    "other order": (lambda: nn.LayerNorm(6), True, False),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("parameter_gradients", [True, False])
def test_tracked_gradients(kind: str, parameter_gradients: bool, calls: list[torch.Size]) -> None:
    make, turned, helped = NORMS[kind]
    model, x = Rows(make(), turned), torch.randn(5, 4, 3)
    nn.init.normal_(model.norm.weight)
    for _ in range(2):
        with tc.track(model, parameter_gradients=parameter_gradients) as tracked:
            model(x).square().sum().backward()
        found = tracked.gradients()
    expected = own_gradients(model, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    assert bool(calls) == helped
    torch.testing.assert_close(
        tracked.gradient_norms(squared=True), sum(g.flatten(1).square().sum(1) for g in expected.values())
    )


def test_matrices(calls: list[torch.Size]) -> None:
    """Several columns at once."""
    model, x, y = Rows(nn.LayerNorm(6)), torch.randn(5, 4, 3), torch.randn(5, 2)
    loss = nn.MSELoss()
    found, expected = tc.GaussNewton(model, loss, (x, y)).dense(), tc.reference.gauss_newton(model, loss, (x, y))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert max(shape[0] for shape in calls) > 1


def test_other_ways(calls: list[torch.Size]) -> None:
    """Half types, and where the sums are differentiated, go the general way."""
    summed = partial(normalisation.sums_of_rows, torch.randn(12, 6), [6], 1e-5, True)
    assert summed(torch.randn(1, 12, 6), 4) is not None
    assert summed(torch.randn(1, 12, 6, requires_grad=True), 4) is None
    assert summed(torch.randn(1, 12, 6, dtype=torch.bfloat16), 4) is None
    assert torch.func.vmap(lambda g: F.relu(g) if summed(g, 4) is None else g)(torch.randn(2, 1, 12, 6)).min() == 0
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("g", "x", "samples", "message"),
    [
        ((1, 6, 4), (6, 5), 2, "must be"),
        ((6, 4), (6, 4), 2, "must be"),
        ((1, 6, 4), (6, 4), 4, "not those of 4 samples"),
        ((1, 6, 4), (6, 4), 0, "not those of 0 samples"),
    ],
)
def test_errors(g: tuple[int, ...], x: tuple[int, ...], samples: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        normalised_sums(torch.randn(g), torch.randn(x), samples, 1e-5, True)
    with pytest.raises(RuntimeError, match="not contiguous"):
        normalised_sums(torch.randn(1, 6, 8)[..., ::2], torch.randn(6, 4), 2, 1e-5, True)
    with pytest.raises(RuntimeError, match="float32, or float64"):
        normalised_sums(torch.randn(1, 6, 4).float(), torch.randn(6, 4), 2, 1e-5, True)
