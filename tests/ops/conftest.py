"""Operators are tested on the device given by --device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def on_the_device_under_test(device: str) -> Iterator[None]:
    if device == "cpu":  # torch's own default: nothing to switch, and no function mode around the tests
        yield
        return
    with torch.device(device):
        yield
