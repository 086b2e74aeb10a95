"""Engine tests run in float64, on small fresh models, each with its own seed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def float64(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
    yield
    torch.set_default_dtype(before)
