"""The kernels of csrc/cuda run on the CPU. A fast set by default; all of it with --full."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from . import emulation


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def emulator() -> Callable[[str], emulation.Emulator]:
    """A driver of all operators, by variant, built once."""
    if reason := emulation.unavailable():
        pytest.skip(reason)
    built: dict[str, emulation.Emulator] = {}

    def get(variant: str) -> emulation.Emulator:
        if variant not in built:
            built[variant] = emulation.Emulator(variant)
        return built[variant]

    return get
