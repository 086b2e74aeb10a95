"""Operators are tested on the device given by --device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import on


@pytest.fixture(autouse=True)
def on_the_device_under_test(device: str) -> Iterator[None]:
    with on(device):
        yield
