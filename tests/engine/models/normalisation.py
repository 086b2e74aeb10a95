"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import nn

from .case import case, features


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
