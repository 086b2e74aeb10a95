"""What of the processor decides where chains of dense layers are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torch_curvature import chains, processor

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel name\t: A: b\n"
ZEN4, ZEN5 = (f"processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: {k}\nmodel\t\t: 2\n\n" for k in (25, 26))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the sizes of the caches and the maker of the processor those given; None where nothing says."""

    def make(second: str | None, third: str | None, maker: str | None, width: str = "AVX512") -> None:
        for level, text in ((2, second), (3, third)):
            if text is not None:
                (tmp_path / f"index{level}").mkdir(exist_ok=True)
                (tmp_path / f"index{level}" / "size").write_text(text)
        information = tmp_path / "cpuinfo"
        if maker is not None:
            information.write_text(maker)
        monkeypatch.setattr(processor, "_SYSTEM", tmp_path)
        monkeypatch.setattr(processor, "_INFORMATION", information)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)

    return make


@pytest.mark.parametrize(
    ("size", "most"),
    [(None, 1 << 17), ("512K", 1 << 17), ("2048K\n", 1 << 18), ("64M", 1 << 17), ("1048576K", 1 << 19)],
)
def test_by_the_second_cache(size: str | None, most: int, machine) -> None:
    machine(size, "32768K", INTEL)
    assert processor.chain_weights() == (most, 1 << 17)


def test_by_the_third_cache_where_products_are_slow(machine) -> None:
    machine("1024K", "32768K", ZEN5)
    assert processor.chain_weights() == (1 << 21, 1 << 21)
    machine("1024K", "1024K", ZEN5)
    assert processor.chain_weights() == (1 << 17, 1 << 17)


@pytest.mark.parametrize(
    ("maker", "width"),
    [
        (ZEN5, "AVX2"),
        (ZEN4, "AVX512"),
        (INTEL, "AVX512"),
        (None, "AVX512"),
        ("processor\t: 0\n", "AVX512"),
        ("", "AVX512"),
    ],
)
def test_products_are_not_called_slow_without_a_reason(maker: str | None, width: str, machine) -> None:
    machine("1024K", "32768K", maker, width)
    assert processor.chain_weights() == (1 << 17, 1 << 17)


def test_limits_are_those_of_this_processor() -> None:
    assert processor.chain_weights() == (chains.MOST_WEIGHTS, chains.FEW_WEIGHTS)
