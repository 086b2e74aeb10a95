"""The list of models that the engine's tests run over: every kind of layer, and every way to use one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CASES: dict[str, Case] = {}


@dataclass(frozen=True)
class Case:
    """``build()`` gives the model, ``inputs(N)`` N samples; ``fallback`` names parameters without a closed rule."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    fallback: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    classes_axis: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def case(
    name: str, inputs: Callable[[int], Any], fallback: tuple[str, ...] = (), unused: tuple[str, ...] = ()
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[name] = Case(build, inputs, frozenset(fallback), frozenset(unused))
        return build

    return add


def features(*shape: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randn(N, *shape)


def tokens(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    return lambda N: torch.randint(0, vocabulary, (N, length))


class Function(nn.Module):
    """A forward pass written as a function of the module; ``parts`` are its submodules and parameters."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(*shape))


# ---------------------------------------------------------------------- dense layers


@case("mlp", features(4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))


@case("mlp without bias, relu in place", features(4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 3, bias=False))


@case("single layer", features(4))
def _() -> nn.Module:
    return nn.Linear(4, 3)


@case("sequence of dense layers", features(3, 4))
def _() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3))


@case("bilinear", lambda N: (torch.randn(N, 3), torch.randn(N, 2)))
def _() -> nn.Module:
    return Function(
        lambda m, x, y: m.last(torch.tanh(m.form(x, y)) + torch.bilinear(x, y, m.weight, None)),
        form=nn.Bilinear(3, 2, 4),
        weight=parameter(4, 3, 2),
        last=nn.Linear(4, 3),
    )


@case("matrix products with parameters", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x @ m.one)
        x = torch.tanh(torch.matmul(x, m.two) + m.shift)
        x = torch.tanh(torch.mm(x, m.three)) + x.mm(m.four)
        x = torch.addmm(m.offset, x.matmul(m.five), m.six)
        return torch.addmm(x, x, m.seven)

    shapes = {"one": (4, 3), "two": (3, 4), "three": (4, 4), "four": (4, 4), "five": (4, 3), "six": (3, 3)}
    parts = {name: parameter(*shape) for name, shape in shapes.items()}
    return Function(run, **parts, seven=parameter(3, 3), shift=parameter(4), offset=parameter(3))


@case("functional calls", features(2, 5))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.conv1d(x, m.kernel, padding=1)
        x = F.linear(F.silu(x).flatten(1), weight=m.weight, bias=m.bias)
        return F.linear(input=torch.tanh(x), weight=m.last)

    return Function(run, kernel=parameter(3, 2, 3), weight=parameter(4, 15), bias=parameter(4), last=parameter(3, 4))


@case("elementwise parameters", features(2, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(x * m.scale + m.shift) * m.gain
        x = torch.mul(m.rows, x).add(m.columns) + 1.0
        x = torch.add(x, m.both).mul(m.last)
        x = m.left + x * torch.sigmoid(x)
        x = m.right * x
        return F.prelu(torch.prelu(x, m.slope), m.slopes).flatten(1)[:, :5]

    return Function(
        run,
        scale=parameter(4),
        shift=parameter(1, 2, 1),
        gain=parameter(1),
        rows=parameter(2, 1),
        columns=parameter(4),
        both=parameter(1, 2, 4),
        last=nn.Parameter(torch.randn(())),
        left=parameter(4),
        right=parameter(2, 4),
        slope=parameter(1),
        slopes=parameter(2),
    )


# ---------------------------------------------------------------------- convolutions


@case("conv1d: stride, dilation, padding", features(2, 9))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=3),
        nn.Tanh(),
        nn.Conv1d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


@case("conv2d: same padding, even kernel", features(1, 5, 4))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, (2, 3), padding="same"),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3, padding="valid"),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


@case("conv2d: circular padding", features(2, 4, 5))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 3, padding=(2, 0), stride=(2, 1), padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


@case("conv2d: reflect and replicate padding", features(1, 4, 4))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@case("conv3d", features(1, 3, 4, 3))
def _() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, (2, 3, 2), padding=(0, 1, 0)), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


@case("depthwise and pointwise", features(3, 4, 4))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
        nn.Tanh(),
        nn.Conv2d(6, 2, 1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@case("grouped and dilated convolution", features(4, 5, 5))
def _() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 2, groups=2, dilation=2), nn.Tanh(), nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 3)
    )


@case("transposed convolutions", features(2, 3, 2))
def _() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0)),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 2, dilation=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@case("transposed convolutions in one and three dimensions, grouped", features(2, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.line(x))
        x = torch.tanh(m.volume(x.reshape(-1, 2, 2, 3, 3)))
        return m.last(x.flatten(2).mean(2))

    return Function(
        run,
        line=nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2),
        volume=nn.ConvTranspose3d(2, 2, 2, padding=(1, 0, 0)),
        last=nn.Linear(2, 3),
    )


@case("frames: convolution of flattened time", features(2, 1, 4, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        frames = torch.tanh(m.conv(x.flatten(0, 1)))
        return m.last(frames.flatten(1).unflatten(0, (-1, 2)).sum(1))

    return Function(run, conv=nn.Conv2d(1, 2, 3), last=nn.Linear(8, 3))


@case("U-shaped skip", features(1, 4, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        top = F.silu(m.down(x))
        low = F.silu(m.low(F.avg_pool2d(top, 2)))
        up = torch.cat([m.up(low), top], 1)
        return m.out(up).mean((2, 3))

    return Function(
        run,
        down=nn.Conv2d(1, 2, 3, padding=1),
        low=nn.Conv2d(2, 3, 1),
        up=nn.ConvTranspose2d(3, 2, 2, stride=2),
        out=nn.Conv2d(4, 3, 1),
    )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return F.relu(y)


@case("residual block with batch normalisation", features(2, 4, 4))
def _() -> nn.Module:
    return nn.Sequential(ResidualBlock(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()


# ---------------------------------------------------------------------- normalisation


@case("layer, group and instance normalisation", features(4, 3, 2))
def _() -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 2, 1),
        nn.InstanceNorm2d(2, affine=True),
        nn.Tanh(),
        nn.LayerNorm([3, 2]),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


@case("root mean square normalisation, sequences", features(3, 4))
def _() -> nn.Module:
    return nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


@case("batch and instance normalisation with running statistics", features(3, 4))
def _() -> nn.Module:
    model = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model(torch.randn(8, 3, 4))
    return model.eval()


# ---------------------------------------------------------------------- sequences and attention


@case("embedding with padding", tokens(4, 6))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(torch.tanh(m.table(x)).mean(1)),
        table=nn.Embedding(6, 3, padding_idx=2),
        last=nn.Linear(3, 3),
    )


@case("tied embedding", tokens(3, 4))
def _() -> nn.Module:
    model = Function(
        lambda m, x: m.head(torch.tanh(m.body(m.table(x)))).transpose(1, 2),
        table=nn.Embedding(4, 3),
        body=nn.Linear(3, 3),
        head=nn.Linear(3, 4, bias=False),
    )
    model.head.weight = model.table.weight
    return model


@case("embedding bags", tokens(3, 5))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.mean(x) + m.largest(x) * m.total(x, per_sample_weights=x * 0.1)),
        mean=nn.EmbeddingBag(5, 3, mode="mean", padding_idx=1),
        largest=nn.EmbeddingBag(5, 3, mode="max"),
        total=nn.EmbeddingBag(5, 3, mode="sum"),
        last=nn.Linear(3, 3),
    )


@case("embedding bags with offsets", tokens(1, 5), fallback=("table.weight",))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(torch.tanh(m.table(x.flatten(), torch.arange(len(x))))),
        table=nn.EmbeddingBag(5, 3, mode="sum"),
        last=nn.Linear(3, 3),
    )


@case("LSTM classifier", features(4, 3))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.cell(x)[0][:, -1]), cell=nn.LSTM(3, 2, batch_first=True), last=nn.Linear(2, 3)
    )


@case("GRU, two layers, both directions, time first", features(3, 2))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.cell(x.transpose(0, 1))[0].mean(0)),
        cell=nn.GRU(2, 2, num_layers=2, bidirectional=True),
        last=nn.Linear(4, 3),
    )


@case("LSTM with projections and the plain recurrent layers", features(3, 3))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.relu(m.tanh(m.cell(x)[0])[0])[0].sum(1)),
        cell=nn.LSTM(3, 4, proj_size=2, bias=False, batch_first=True),
        tanh=nn.RNN(2, 3, batch_first=True),
        relu=nn.RNN(3, 2, nonlinearity="relu", batch_first=True),
        last=nn.Linear(2, 3),
    )


@case(
    "packed sequences",
    features(3, 2),
    fallback=tuple(f"cell.{w}_{k}_l0" for w in ("weight", "bias") for k in ("ih", "hh")),
)
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True)
        return m.last(m.cell(packed)[1][0])

    return Function(run, cell=nn.GRU(2, 2, batch_first=True), last=nn.Linear(2, 3))


@case("recurrent cells in a loop", features(4, 3))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 2)
        state = (h, h)
        for t in range(x.shape[1]):
            h = m.rnn(x[:, t], h)
            h = m.gru(h, m.relu(h, h))
            state = m.lstm(h, state)
        return m.last(state[0])

    return Function(
        run,
        rnn=nn.RNNCell(3, 2),
        relu=nn.RNNCell(2, 2, nonlinearity="relu"),
        gru=nn.GRUCell(2, 2),
        lstm=nn.LSTMCell(2, 2),
        last=nn.Linear(2, 3),
    )


@case("time first", features(3, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.tanh(m.norm(m.first(x.transpose(0, 1))))
        return m.last(x).sum(0)

    return Function(run, first=nn.Linear(4, 3), norm=nn.LayerNorm(3), last=nn.Linear(3, 3))


@case("flattened tokens, samples first and samples last", features(3, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.first(x.reshape(-1, 4))).reshape(x.shape[0], 3, 3)
        z = torch.tanh(m.second(y.transpose(0, 1).reshape(-1, 3))).reshape(3, x.shape[0], 3)
        return m.last(z.transpose(0, 1).flatten(1))

    return Function(run, first=nn.Linear(4, 3), second=nn.Linear(3, 3), last=nn.Linear(9, 3))


@case("self-attention", features(3, 4))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.attention(x, x, x)[0]).mean(1),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        last=nn.Linear(4, 3),
    )


@case("cross-attention", lambda N: {"x": torch.randn(N, 2, 4), "y": torch.randn(N, 3, 4)})
def _() -> nn.Module:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        mixed = m.packed(x, y, y, need_weights=False)[0]
        mixed = mixed + m.separate(mixed.transpose(0, 1), *[y[..., :3].transpose(0, 1)] * 2)[0].transpose(0, 1)
        return m.last(mixed).mean(1)

    return Function(
        run,
        packed=nn.MultiheadAttention(4, 2, batch_first=True),
        separate=nn.MultiheadAttention(4, 1, kdim=3, vdim=3),
        last=nn.Linear(4, 3),
    )


@case(
    "attention with added keys and a mask",
    features(3, 4),
    fallback=("attention.bias_k", "attention.bias_v"),
)
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(m.attention(x, x * 2, x, attn_mask=m.mask)[0]).mean(1),
        attention=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True),
        mask=torch.triu(torch.full((3, 3), -torch.inf), 1),
        last=nn.Linear(4, 3),
    )


@case("transformer encoder", features(3, 4))
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.2, norm_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(12, 3)
    ).eval()


@case("transformer decoder, time first", lambda N: (torch.randn(N, 2, 4), torch.randn(N, 3, 4)))
def _() -> nn.Module:
    return Function(
        lambda m, x, y: m.last(m.layer(x.transpose(0, 1), y.transpose(0, 1))).mean(0),
        layer=nn.TransformerDecoderLayer(4, 2, 4, dropout=0.0),
        last=nn.Linear(4, 3),
    )


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        N, T = index.shape
        x = self.token(index) + self.position(torch.arange(T))
        q, k, v = self.attend(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(N, T, -1))
        x = x + self.mlp(self.norm2(x))
        return self.head(x).transpose(1, 2)


@case("GPT block", tokens(3, 5))
def _() -> nn.Module:
    return GPTBlock(4, 2, 3, 5)


@case("rows looked up for all samples and used twice", features(3, 4), fallback=("table.weight",))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        rows = m.table(torch.arange(3))
        return m.last(torch.tanh(x + rows) * rows).sum(1)

    return Function(run, table=nn.Embedding(5, 4), last=nn.Linear(4, 3))


@case("positions cut from a longer table", features(3, 4))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(torch.tanh(torch.add(m.rows(torch.arange(3)), x + m.one[:3] + m.two[:, :3]))).sum(1),
        rows=nn.Embedding(3, 4),
        one=parameter(5, 4),
        two=parameter(1, 4, 4),
        last=nn.Linear(4, 3),
    )


@case("class token, positions, layer scale", features(3, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        x = x + m.scale * torch.tanh(m.mix(x))
        return m.last(x[:, 0] + x.mean(1))

    return Function(
        run,
        token=parameter(1, 1, 4),
        position=parameter(1, 4, 4),
        scale=parameter(4),
        mix=nn.Linear(4, 4),
        last=nn.Linear(4, 3),
    )


# ---------------------------------------------------------------------- sharing, freezing, anything


@case("one layer used three times", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(m.again(x))
        return m.last(x)

    return Function(run, again=nn.Linear(4, 4), last=nn.Linear(4, 3))


@case("autoencoder with a transposed weight", features(4))
def _() -> nn.Module:
    return Function(
        lambda m, x: F.linear(torch.tanh(m.code(x)), m.code.weight.t(), m.bias), code=nn.Linear(4, 2), bias=parameter(4)
    )


@case("rows of one weight", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        gate, value = m.weight.chunk(2)
        return m.last(torch.sigmoid(F.linear(x, gate, m.bias[:3])) * F.linear(x, value, m.bias[3:]))

    return Function(run, weight=parameter(6, 4), bias=parameter(6), last=nn.Linear(3, 3))


@case("frozen parts", features(4))
def _() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


@case("unused parameter", features(4), unused=("extra",))
def _() -> nn.Module:
    return Function(lambda m, x: m.last(torch.tanh(x)), extra=parameter(3), last=nn.Linear(4, 3))


@case(
    "weight normalisation",
    features(4),
    fallback=("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
)
def _() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3))


@case("spectral normalisation", features(4), fallback=("0.parametrizations.weight.original",))
def _() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 3)).eval()


@case("weights made of a parameter", features(4), fallback=("code", "low", "high", "power"))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.linear(x, torch.outer(m.code, m.code.cos())) + F.linear(x, m.low @ m.high)
        return m.last(torch.tanh(x).abs() ** m.power)

    return Function(
        run,
        code=parameter(4),
        low=parameter(4, 2),
        high=parameter(2, 4),
        power=nn.Parameter(torch.ones(4) * 2),
        last=nn.Linear(4, 3),
    )


@case("branches", features(4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        left, right = torch.tanh(m.left(x)), torch.sigmoid(m.right(x))
        return m.last(left * right + left) + m.side(right)

    return Function(
        run, left=nn.Linear(4, 3), right=nn.Linear(4, 3), last=nn.Linear(3, 3), side=nn.Linear(3, 3, bias=False)
    )


class ScaledLinear(nn.Module):
    """A user's own layer, ``z = exp(1) x W``; its rule is registered by the tests."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = parameter(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,io->no", x, self.weight) * torch.e


@case("a user's own layer", features(4))
def _() -> nn.Module:
    return nn.Sequential(ScaledLinear(4, 4), nn.Tanh(), nn.Linear(4, 3))
