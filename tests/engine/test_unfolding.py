"""Convolutions in a tracked step: their inputs are unfolded a few samples at a time, or met without being unfolded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import unfolding
from torch_curvature.factors import Factor
from torch_curvature.grams import gram
from torch_curvature.layers import convolution
from torch_curvature.matrices.dual import frobenius_from_gram
from torch_curvature.patches import Patches

from .models import Function
from .test_matrices import close

LOSS = nn.CrossEntropyLoss()
N = 7

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 5, 3),
    "no bias": lambda: nn.Conv2d(4, 5, (1, 2), bias=False),
    "padding, stride": lambda: nn.Conv2d(4, 5, 3, padding=(2, 1), stride=(2, 1)),
    "dilation": lambda: nn.Conv2d(4, 5, 2, dilation=(3, 2), stride=2, padding=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "same padding": lambda: nn.Conv2d(4, 5, 3, padding="same"),
    "circular": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 5, 3, stride=2),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 5, 3, stride=2, padding=1)),
    "three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2, padding=(0, 1, 0))),
    "more outputs than positions": lambda: nn.Conv2d(4, 9, (6, 5)),
    "few positions of many channels": lambda: nn.Conv2d(4, 100, (6, 5)),
    "used twice": lambda: Function(lambda m, x: m.c(m.c(x)) + m.c(x), c=nn.Conv2d(4, 4, 3, padding=1)),
    "frames of one sample": lambda: Function(
        lambda m, x: m.c(x.reshape(-1, 2, *x.shape[2:])).reshape(len(x), -1), c=nn.Conv2d(2, 3, 2)
    ),
    "frames, time first": lambda: Function(
        lambda m, x: m.c(x.unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1)).unflatten(0, (2, -1)).sum(0),
        c=nn.Conv2d(2, 3, 2),
    ),
    "some of its outputs": lambda: Function(
        lambda m, x: nn.functional.conv2d(x, m.c.weight[1:4], m.c.bias[1:4]), c=nn.Conv2d(4, 5, 3)
    ),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    layers = nn.Conv2d(2, 4, 2), nn.ReLU(), LAYERS[name](), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)
    model, x = nn.Sequential(*layers), torch.randn(N, 2, 8, 7)
    model(x)
    return model, x, torch.randint(3, (N,))


def expected(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of the samples' shares of the mean, [N, P]."""
    rows = []
    for n in range(len(x)):
        loss = LOSS(model(x[n : n + 1]), y[n : n + 1]) / len(x)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """No more samples at a time than there must be; the ranges that were asked for."""
    asked: list[tuple[int, int]] = []
    ranges = unfolding.Unfolding.ranges

    def noted(self: Any) -> Any:
        for part in ranges(self):
            asked.append(part)
            yield part

    monkeypatch.setattr(unfolding, "PART_BYTES", 0)
    monkeypatch.setattr(unfolding, "LARGE_BYTES", 0)
    monkeypatch.setattr(unfolding.Unfolding, "ranges", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return asked


@pytest.fixture
def unfolded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No helper takes images as they are."""
    monkeypatch.setattr(Patches, "suit", lambda self, g: False)


@pytest.mark.parametrize("parameter_gradients", [True, False])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("unfolded")
def test_tracked_step(
    name: str, form: torch.memory_format, parameter_gradients: bool, small_parts: list[tuple[int, int]]
) -> None:
    model, x, y = build(name)
    truth = expected(model, x, y)
    x = x.contiguous(memory_format=form)
    for _ in range(2):
        with tc.track(model, parameter_gradients=parameter_gradients) as t:
            LOSS(model(x), y).backward()
        assert set(t.coverage().values()) == {"closed rule"}
        small_parts.clear()
        close(t.gradient_norms(), truth.norm(dim=1))
        assert small_parts[:4] == [(0, 2), (2, 4), (4, 6), (6, 7)]
        close(t.gradient_gram(), truth @ truth.T)
        close(torch.cat([g.flatten(1) for g in t.gradients().values()], 1), truth)
        variance = torch.cat([g.flatten() for g in t.gradient_variance().values()])
        close(variance, truth.var(0, correction=0))


# Layers of which every sample meets one image, with all of the weight.
FROM_IMAGES = ("plain", "no bias", "padding, stride", "dilation", "same padding", "circular", "one dimension")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_tracked_step_from_images(
    name: str, form: torch.memory_format, dtype: torch.dtype, small_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = build(name)
    truth = expected(model, x, y)
    model, x = model.to(dtype), x.to(dtype).contiguous(memory_format=form)
    met: list[Tensor] = []
    norms, jacobian = Patches.norms, Patches.jacobian
    monkeypatch.setattr(Patches, "norms", lambda self, g, bias: met.append(g) or norms(self, g, bias))
    monkeypatch.setattr(Patches, "jacobian", lambda self, g: met.append(g) or jacobian(self, g))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    with tc.track(model) as t:
        LOSS(model(x), y).backward()
    for found, value in (
        (t.gradient_norms(), truth.norm(dim=1)),
        (torch.cat([g.flatten(1) for g in t.gradients().values()], 1), truth),
        (t.gradient_gram(), truth @ truth.T),
    ):
        torch.testing.assert_close(found.to(truth.dtype), value, **tolerance)
    layers = 1 + (name in (*FROM_IMAGES, "more outputs than positions"))
    assert len(met) >= 2 * layers  # norms and gradients of the first convolution and, if it can be, of this one
    assert all(g.dtype == dtype for g in met)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), lambda u, y: -torch.tanh(u).square().sum()], ids=["CE", "signed"]
)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_diagonals_from_images(
    name: str, form: torch.memory_format, loss_fn: Any, small_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss that is convex and of one that is not, beside those from unfolded inputs."""
    model, x, y = build(name)
    data = x.contiguous(memory_format=form), y
    met: list[Tensor] = []
    norms, diagonal = Patches.norms, Patches.diagonal
    monkeypatch.setattr(Patches, "norms", lambda self, g, bias: met.append(g) or norms(self, g, bias))
    monkeypatch.setattr(Patches, "diagonal", lambda self, g, sign: met.append(g) or diagonal(self, g, sign))
    G = tc.GaussNewton(model, loss_fn, data)
    found, trace = G.diagonal(), G.trace()
    assert len(met) >= 2
    with monkeypatch.context() as without:
        without.setattr(Patches, "suit", lambda self, g: False)
        met.clear()
        expected = G.diagonal()
        assert not met
    for key, value in expected.items():
        close(found[key], value)
    truth = tc.reference.gauss_newton(model, loss_fn, data)
    close(torch.cat([d.flatten() for d in found.values()]), truth.diagonal())
    close(trace, truth.trace())


def test_norms_over_pairs_where_positions_are_few() -> None:
    """Counted multiply-adds decide: last layers of a residual network, the patches of a vision transformer."""
    for S, O, C, kernel, sums in (
        (1024, 32, 3, 3, True),
        (64, 64, 64, 3, True),
        (49, 512, 512, 3, False),
        (196, 768, 3, 16, False),
    ):
        patches = Patches(torch.empty(1, C, 1, 1), [kernel, kernel, 1, 1, 0, 0, 1, 1, 1, S])
        assert patches.by_sums(torch.empty(1, 1, S, O)) == sums


def test_two_steps(small_parts: list[tuple[int, int]]) -> None:
    """Inner products between batches of which one has its Jacobians formed in parts, and the other whole."""
    model, x, y = build("padding, stride")
    with tc.track(model) as t:
        for rows in (slice(0, 1), slice(1, 7)):
            LOSS(model(x[rows]), y[rows]).backward()
    truth = torch.cat([expected(model, x[rows], y[rows]) for rows in (slice(0, 1), slice(1, 7))])
    close(t.gradient_gram(), truth @ truth.T)
    close(t.gradient_norms(), truth.norm(dim=1))


def test_parts_are_as_large_as_they_may_be() -> None:
    found = unfolding.Unfolding(torch.Size((100, 50, 1000)), lambda a, b: torch.empty(0), lambda: torch.empty(0), 8)
    ranges = list(found.ranges())
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, 100)
    step = ranges[0][1]
    assert step == max(2 * torch.get_num_threads(), unfolding.PART_BYTES // (50 * 1000 * 8))


def test_matrices_unfold_once(small_parts: list[tuple[int, int]]) -> None:
    """Every chunk of columns meets the same input."""
    model, x, y = build("plain")
    tc.GaussNewton(model, LOSS, (x, y)).diagonal()
    assert not small_parts


@pytest.mark.parametrize("elements", [1, 100, 1 << 30])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_padded_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: int, elements: int) -> None:
    monkeypatch.setattr(convolution, "PADDED_ELEMENTS", elements)
    x, weight = torch.randn(rows, 3, 6, 7), torch.randn(4, 3, 3, 2)
    for options in ({"padding": 1}, {"stride": 2}, {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}):
        output = torch.nn.functional.conv2d(x, weight, None, **options)
        (use,) = convolution.convolution(output, x, weight, None, **options)
        assert use.activation().shape == (rows, output.shape[2:].numel(), 18)
        if rows:
            expected = torch.nn.functional.unfold(x, (3, 2), **options).mT
            assert torch.equal(use.activation(), expected)
            assert torch.equal(use.part(slice(1, 3)), expected[1:3])


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_dual_of_one_column(
    name: str, images: bool, small_parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the empirical Fisher matrix: inputs are not kept unfolded, and several batches meet each other."""
    if not images:
        monkeypatch.setattr(Patches, "suit", lambda self, g: False)
    model, x, y = build(name)
    rows = expected(model, x, y) * len(x) ** 0.5  # gradients of a mean's samples carry 1/N, columns its root
    for data in ((x, y), [(x[:3], y[:3]), (x[3:], y[3:])]):
        matrix = tc.EmpiricalFisher(model, LOSS, data)
        gram = matrix.gram()
        assert torch.equal(gram, gram.T)
        close(gram, rows @ rows.T)
        monkeypatch.setattr(matrix.budget, "working_bytes", lambda: 4 * 8 * 8)  # two samples at a time
        close(frobenius_from_gram(matrix), (rows @ rows.T).norm())


@pytest.mark.parametrize("samples", [(3, 5), (4, 4)])
def test_biases_of_one_position_between_batches(samples: tuple[int, int]) -> None:
    """A convolution as large as its images, of few outputs: its Jacobian is formed, its bias's apart."""
    factors, rows = [], []
    for N in samples:
        images, g = torch.randn(N, 3, 4, 4), torch.randn(1, N, 1, 2)
        a = torch.nn.functional.unfold(images, 4).mT
        patches = Patches(images, [4, 4, 1, 1, 0, 0, 1, 1, 1, 1])
        input = unfolding.Unfolding(a.shape, lambda start, stop, a=a: a[start:stop], lambda a=a: a, 8, patches)
        weight = Factor(g, input, torch.Size([2, 3, 4, 4]))
        factors.append(weight.with_bias("bias", lambda a=a: torch.cat([a, a.new_ones(len(a), 1, 1)], 2)))
        assert unfolding.smaller_formed(factors[-1])
        rows.append(torch.cat([(g.mT @ a).flatten(2), g.sum(2)], 2))
    for left in (0, 1):
        for right in (0, 1):
            found = gram(factors[left], factors[right])
            close(found, torch.einsum("vnp,wmp->vnwm", rows[left], rows[right]))


def test_two_batches_of_images_as_large_as_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfolding, "PART_BYTES", 1)
    model, loss = nn.Sequential(nn.Conv2d(3, 2, 5), nn.Flatten()), nn.CrossEntropyLoss()
    data = [(torch.randn(N, 3, 5, 5), torch.randint(2, (N,))) for N in (3, 4)]
    gradients = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss(model(x[n : n + 1]), y[n : n + 1]), model.parameters())]
        )
        for x, y in data
        for n in range(len(x))
    ]
    J = torch.stack(gradients)
    close(tc.EmpiricalFisher(model, loss, data).gram(), J @ J.T / 7)
