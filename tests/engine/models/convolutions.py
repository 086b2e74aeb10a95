"""Convolutions of all kinds, and networks made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Function, case, features


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
