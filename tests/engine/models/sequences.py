"""Embeddings, recurrent layers and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .case import Function, case, features, parameter, tokens


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
        lambda m, x: m.last(torch.tanh(m.table(x.flatten(), torch.arange(len(x), device=x.device)))),
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


@case("attention with added keys and a mask", features(3, 4))
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
        x = self.token(index) + self.position(torch.arange(T, device=index.device))
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
        rows = m.table(torch.arange(3, device=x.device))
        return m.last(torch.tanh(x + rows) * rows).sum(1)

    return Function(run, table=nn.Embedding(5, 4), last=nn.Linear(4, 3))


@case("positions cut from a longer table", features(3, 4))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(
            torch.tanh(torch.add(m.rows(torch.arange(3, device=x.device)), x + m.one[:3] + m.two[:, :3]))
        ).sum(1),
        rows=nn.Embedding(3, 4),
        one=parameter(5, 4),
        two=parameter(1, 4, 4),
        last=nn.Linear(4, 3),
    )


@case("latent queries, expanded and repeated", features(3, 4))
def _() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        first = m.one.unsqueeze(0).expand(x.shape[0], -1, -1)
        second = m.two.repeat(x.shape[0], 1, 1)
        mixed = m.attention(first, x, x - m.mean)[0] + m.attention(second, x, torch.sub(m.mean, x))[0]
        return m.last(mixed).mean(1)

    return Function(
        run,
        one=parameter(2, 4),
        two=parameter(1, 2, 4),
        mean=parameter(4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        last=nn.Linear(4, 3),
    )


@case("activation checkpointing", features(4))
def _() -> nn.Module:
    return Function(
        lambda m, x: m.last(checkpoint(m.body, m.first(x), use_reentrant=False)),
        first=nn.Linear(4, 4),
        body=nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh()),
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
