"""Derivatives through the nodes of convolutions and pooling, in both memory formats, against autograd's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import torch_curvature as tc
from torch_curvature import nodes, reference, spatial

from .models import Function
from .test_matrices import close

LOSS = nn.CrossEntropyLoss()
N = 3


def normalised(channels: int, **options: Any) -> nn.Module:
    layer = nn.BatchNorm2d(channels, **options).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


# Each follows a convolution to [N, 4, 7, 6] and a ReLU.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 5, 3),
    "one by one": lambda: nn.Conv2d(4, 5, 1, bias=False),
    "padding": lambda: nn.Conv2d(4, 5, 3, padding=(2, 1)),
    "same padding, even kernel": lambda: nn.Conv2d(4, 5, (2, 3), padding="same"),
    "valid padding": lambda: nn.Conv2d(4, 5, 3, padding="valid", stride=(1, 2)),
    "circular": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
    "stride that leaves nothing over": lambda: nn.Conv2d(4, 5, (3, 2), stride=2),
    "stride that leaves something over": lambda: nn.Conv2d(4, 5, 2, stride=(3, 4)),
    "stride beyond the kernel": lambda: nn.Conv2d(4, 5, 1, stride=3),
    "dilation": lambda: nn.Conv2d(4, 5, 2, dilation=(3, 2), padding=1),
    "stride and dilation": lambda: nn.Conv2d(4, 5, 2, dilation=3, stride=2, padding=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1, output_padding=(1, 0)),
    "transposed, dilated": lambda: nn.ConvTranspose2d(4, 5, 2, dilation=2),
    "transposed, output padding beyond the stride": lambda: nn.ConvTranspose2d(4, 5, 2, dilation=3, output_padding=2),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 5, 3, stride=2, padding=1)),
    "three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2, padding=(0, 1, 0))),
    "transposed in one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(4, 5, 3, stride=2)),
    "average": lambda: nn.AvgPool2d((3, 2), stride=2, padding=(1, 0)),
    "average, ceil": lambda: nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
    "average, divisor": lambda: nn.AvgPool2d(3, stride=1, padding=1, divisor_override=5),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive average to one": lambda: nn.AdaptiveAvgPool2d(1),
    "mean": lambda: Function(lambda m, x: x.mean((2, 3))),
    "mean of some axes": lambda: Function(lambda m, x: x.mean((-3, 2), keepdim=True)),
    "mean of a matrix": lambda: Function(lambda m, x: x.flatten(2).mean(-1)),
    "maximum": lambda: nn.MaxPool2d(2, stride=1, padding=1),
    "maximum, dilated": lambda: nn.MaxPool2d((2, 3), dilation=2, ceil_mode=True),
    "batch normalisation": lambda: normalised(4),
    "batch normalisation, plain": lambda: normalised(4, affine=False),
    "zero padding": lambda: nn.ZeroPad2d((1, 0, 2, 3)),
    "cropping": lambda: nn.ZeroPad2d((-1, 1, 0, -2)),
    "smooth": lambda: nn.Sequential(nn.Conv2d(4, 5, 3), nn.Softplus()),
    "residual": lambda: Function(
        lambda m, x: F.relu(m.b(F.relu(m.a(x), inplace=True)) + x),
        a=nn.Conv2d(4, 3, 3, padding=1),
        b=nn.Conv2d(3, 4, 3, padding=1),
    ),
}
# Where a node is not known: left to autograd.
ELSEWHERE = {
    *("circular", "reflect"),
    ("adaptive average to one", torch.channels_last),
}


class Net(nn.Module):
    def __init__(self, name: str, form: torch.memory_format) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(2, 4, 2), LAYERS[name](), nn.LazyLinear(3)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        self.middle = F.relu(self.first(x.contiguous(memory_format=self.form)))
        self.z = self.layer(self.middle)
        return self.last(torch.tanh(self.z.flatten(1)))


def build(name: str, form: torch.memory_format, dtype: torch.dtype) -> tuple[Net, Tensor]:
    model, x = Net(name, form), torch.randn(N, 2, 8, 7)
    model(x)
    model.eval()
    return model.to(dtype), x.to(dtype)


def agree(ours: Tensor | None, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours is not None
    assert not ours.requires_grad
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= (1e-5 if dtype is torch.float32 else 1e-12) * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_backwards_and_forwards(name: str, form: torch.memory_format, dtype: torch.dtype) -> None:
    model, x = build(name, form, dtype)
    outputs, parameters = model(x), dict(model.named_parameters())
    strides = model.middle.stride(), x.stride(), model.z.stride()
    edges = [get_gradient_edge(t) for t in (model.first(x), model.middle, model.z)][1:]
    edges += [get_gradient_edge(p) for p in parameters.values()]
    if name in ELSEWHERE or (name, form) in ELSEWHERE:
        assert nodes.pull_back(outputs, edges[:1], torch.randn(2, *outputs.shape, dtype=dtype)) is None
        return
    assert nodes.known_graph(outputs) is not None
    for V in (1, 3, 2):
        columns = torch.randn(V, *outputs.shape, dtype=dtype)
        truth = torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, retain_graph=True)
        found = nodes.pull_back(outputs, edges, columns)
        assert found is not None
        for ours, theirs in zip(found, truth, strict=True):
            agree(ours, theirs, dtype)
    for only in (None, "first.weight", "first.bias", *(n for n in parameters if n.startswith("layer"))):
        tangents = {n: torch.randn_like(p) * (only in (None, n)) for n, p in parameters.items()}
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, list(parameters.values()), u, create_graph=True)
        (expected,) = torch.autograd.grad(pulled, u, list(tangents.values()), retain_graph=True)
        ahead = nodes.push_forward(outputs, parameters, tangents)
        agree(ahead, expected, dtype)
        chosen = {n: p for n, p in parameters.items() if only in (None, n)}
        agree(nodes.push_forward(outputs, chosen, {n: tangents[n] for n in chosen}), expected, dtype)
    assert strides == (model.middle.stride(), x.stride(), model.z.stride())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", [*LAYERS])
def test_matrices(name: str, form: torch.memory_format) -> None:
    model, x = build(name, form, torch.float64)
    data = x, torch.randint(3, (N,))
    truth = reference.gauss_newton(model, LOSS, data)
    v = torch.randn(len(truth), dtype=torch.float64)
    for _ in range(2):  # the second time without a comparison
        matrix = tc.GaussNewton(model, LOSS, data)
        close(torch.cat([d.reshape(-1) for d in matrix.diagonal().values()]), truth.diagonal())
        close(matrix @ v, truth @ v)
        close(matrix.trace(), truth.trace())


@pytest.mark.parametrize("name", ["plain", "padding", "average", "maximum", "smooth"])
def test_what_arrives_at_images_has_channels_last(name: str) -> None:
    """Then ``g [V, N, S, O]`` is contiguous; and what was saved is brought into that format once."""
    model, x = build(name, torch.contiguous_format, torch.float32)
    outputs = model(x)
    edge = get_gradient_edge(model.middle)
    for V in (1, 2):
        (found,) = nodes.pull_back(outputs, [edge], torch.randn(V, *outputs.shape, dtype=outputs.dtype))
        assert found.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    kept = spatial.kept_channels_last(edge.node, "_saved_result")
    assert kept is spatial.kept_channels_last(edge.node, "_saved_result")
    assert torch.equal(kept, model.middle)


def test_batch_statistics_are_left_to_autograd() -> None:
    model, x = build("batch normalisation", torch.contiguous_format, torch.float64)
    outputs = model.train()(x)
    edge = get_gradient_edge(model.middle)
    assert nodes.pull_back(outputs, [edge], torch.randn(2, *outputs.shape, dtype=torch.float64)) is None
    tangents = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    assert nodes.push_forward(outputs, dict(model.named_parameters()), tangents) is None


def test_every_known_kind_has_a_layer() -> None:
    covered = set()
    for name in LAYERS:
        for form in (torch.contiguous_format, torch.channels_last):
            model, x = build(name, form, torch.float32)
            covered |= {node.name() for node in nodes.known_graph(model(x)) or []}
    assert covered >= nodes.SPATIAL.keys()


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
    return model, (torch.randn(N, 2, 6, 6), torch.randint(3, (N,)))


def test_a_proved_product_needs_no_pass_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small()
    truth = reference.gauss_newton(model, LOSS, data)
    v = torch.randn(len(truth))
    close(tc.GaussNewton(model, LOSS, data) @ v, truth @ v)

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("autograd was asked")

    monkeypatch.setattr(torch.autograd, "grad", refused)
    close(tc.GaussNewton(model, LOSS, data) @ v, truth @ v)


def test_a_node_that_is_wrong_is_not_used_in_products(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = nodes.KINDS["ConvolutionBackward0"]
    monkeypatch.setitem(
        nodes.KINDS,
        "ConvolutionBackward0",
        nodes.Kind(lambda node, G, i: 2 * kind.back(node, G, i), lambda node, t: 2 * kind.ahead(node, t)),
    )
    model, data = small()
    truth = reference.gauss_newton(model, LOSS, data)
    v = torch.randn(len(truth))
    for _ in range(2):
        close(tc.GaussNewton(model, LOSS, data) @ v, truth @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 1, 1), (2, 3, 5, 7, 6), (1, 2, 70, 9, 3), (3, 1, 4, 40, 33), (2, 0, 3, 4, 4)]
)
def test_relu_of_images_in_the_other_format(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    V, M, C, H, W = shape
    result = torch.randn(M, C, H, W, dtype=dtype).relu()
    if result.numel():
        result[0, 0, 0, 0] = float("nan")  # as for torch, no number that is not positive
    G = torch.randn(V * M, C, H, W, dtype=dtype).contiguous(memory_format=torch.channels_last).view(shape)
    expected = torch.ops.aten.threshold_backward(G, result, 0)
    torch.ops.torch_curvature.keep_positive_(G, result)
    assert torch.equal(G, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_relu_between_convolutions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(N, 2, 9, 8)
    model(x)
    model, x = model.to(dtype), x.to(dtype)
    outputs, calls = model(x), []
    helper = spatial._keep_positive
    monkeypatch.setattr(spatial, "_keep_positive", lambda *a: (calls.append(a), helper(*a)))
    edge = get_gradient_edge(model[0].bias)
    for V in (1, 3):
        columns = torch.randn(V, *outputs.shape, dtype=dtype)
        (truth,) = torch.autograd.grad(outputs, edge, columns, is_grads_batched=True, retain_graph=True)
        (found,) = nodes.pull_back(outputs, [edge], columns)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
        assert (found - truth).norm() <= tolerance * truth.norm()
    assert bool(calls) == (dtype is torch.float32)  # else images stay in the usual format, or the helper takes none


@pytest.mark.parametrize(
    ("g", "result", "message"),
    [
        (torch.randn(2, 3, 4, 5), torch.randn(3, 4, 5, 6), "must be"),
        (torch.randn(1, 2, 5, 6, 4).permute(0, 1, 4, 2, 3), torch.randn(3, 4, 5, 6), "shape"),
        (torch.randn(1, 3, 5, 6, 4).permute(0, 1, 4, 2, 3), torch.randn(3, 4, 5, 6).double(), "dtype"),
        (torch.randn(1, 3, 4, 5, 6), torch.randn(3, 4, 5, 6), "channels last"),
        (torch.randn(1, 3, 5, 6, 4).bfloat16().permute(0, 1, 4, 2, 3), torch.randn(3, 4, 5, 6).bfloat16(), "float32"),
    ],
)
def test_errors_of_relu_in_the_other_format(g: Tensor, result: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_curvature.keep_positive_(g, result)
