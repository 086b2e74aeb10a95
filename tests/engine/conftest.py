"""Engine tests run in float64, on small fresh models, each with its own seed, on the device given by --device."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import on


@pytest.fixture(autouse=True)
def float64(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def on_the_device_under_test(float64: None, device: str) -> Iterator[None]:
    with on(device):
        yield


@pytest.fixture
def on_the_cpu(on_the_device_under_test: None) -> Iterator[None]:
    """For tests of helpers that only the CPU has."""
    with torch.device("cpu"):
        yield
