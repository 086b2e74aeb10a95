"""Recurrent layers and cells written out step by step in dense layers.

The projections of the inputs are one dense layer over all time steps, those of the state one use of the same weight
for each step: the uses are joined along S like any other repeated use.  Packed sequences are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor, "tuple[Tensor, ...]"], "tuple[Tensor, ...]"]


def _lstm_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + h).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = h.chunk(3, -1)
    new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
    z = torch.sigmoid(xz + hz)
    return ((1 - z) * new + z * state[0],)


def _tanh_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(x + h),)


def _relu_step(x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(x + h),)


def _direction(
    x: Tensor, state: tuple[Tensor, ...], weights: Sequence[Tensor], bias: bool, step: Step, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction over x [T, N, I]."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = (rest[0], rest[1]) if bias else (None, None)
    projection = rest[-1] if len(rest) in (1, 3) else None
    projected = F.linear(x, w_ih, b_ih)
    outputs: list[Tensor] = []
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        state = step(projected[t], F.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), state


def _layers(step: Step, states: int) -> Callable[..., Any]:
    """The function behind ``torch.nn.LSTM``, ``GRU`` and ``RNN`` for padded (not packed) sequences."""

    def run(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        x = input.transpose(0, 1) if batch_first else input
        initial = tuple(hx) if states == 2 else (hx,)
        directions = 2 if bidirectional else 1
        per_direction = len(params) // (num_layers * directions)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            if layer and dropout and train:
                x = F.dropout(x, dropout, True)
            outputs = []
            for d in range(directions):
                k = layer * directions + d
                weights = params[k * per_direction : (k + 1) * per_direction]
                output, state = _direction(x, tuple(s[k] for s in initial), weights, has_biases, step, d == 1)
                outputs.append(output)
                last.append(state)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        final = [torch.stack([state[i] for state in last]) for i in range(states)]
        return (x.transpose(0, 1) if batch_first else x, *final)

    return run


def _cell(step: Step, states: int) -> Callable[..., Any]:
    """The function behind ``torch.nn.LSTMCell``, ``GRUCell`` and ``RNNCell``."""

    def run(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = tuple(hx) if states == 2 else (hx,)
        new = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return new if states == 2 else new[0]

    return run


def is_padded(*args: Any, **kwargs: Any) -> bool:
    """Whether a call of a recurrent layer is the one for padded sequences: (input, hx, params, has_biases, ...)."""
    return not kwargs and len(args) == 9 and isinstance(args[2], (list, tuple)) and isinstance(args[3], bool)


RECURRENT_LAYERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _layers(_lstm_step, 2),
    torch.gru: _layers(_gru_step, 1),
    torch.rnn_tanh: _layers(_tanh_step, 1),
    torch.rnn_relu: _layers(_relu_step, 1),
}
RECURRENT_CELLS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm_cell: _cell(_lstm_step, 2),
    torch.gru_cell: _cell(_gru_step, 1),
    torch.rnn_tanh_cell: _cell(_tanh_step, 1),
    torch.rnn_relu_cell: _cell(_relu_step, 1),
}
