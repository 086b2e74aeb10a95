"""Options of the whole test suite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

STAND_IN = "stand-in"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run also the tests marked `full`, which take minutes")
    parser.addoption(
        "--device",
        default="cpu",
        help="device on which operators, engine and Hessians are tested (default: cpu); stand-in: a GPU played by the "
        "CPU, see tests/devices (engine and Hessians only)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: takes long; runs only with --full")
    require_device(str(config.getoption("--device")))


def require_device(device: str) -> None:
    """Stop before anything is collected where the device is not there."""
    if device == STAND_IN:
        return
    try:
        torch.empty(1, device=device).fill_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise pytest.UsageError(f"--device {device}: torch cannot use it here ({reason})") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        chosen = [item for item in items if "full" not in item.keywords]
        left_out = [item for item in items if "full" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """New tensors are made on the device."""
    if device == "cpu":  # torch's own default: nothing to switch, and no function mode around the tests
        yield
    elif device == STAND_IN:
        from tests.devices.stand_in import DEVICE, stand_in

        with stand_in(), torch.device(DEVICE):
            yield
    else:
        with torch.device(device):
            yield
