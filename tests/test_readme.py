"""Every code block of the README runs as printed, and every name and file it mentions exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import torch_curvature as tc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_an_example_of_fifteen_lines() -> None:
    assert BLOCKS
    assert sum(bool(line.strip()) for line in BLOCKS[0].splitlines()) <= 15


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_code_blocks_run_as_printed(index: int) -> None:
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    exec(compile(BLOCKS[index], "README.md", "exec"), scope)
    if index == 0:
        double = scope["model"].double()
        data = (scope["inputs"].double(), scope["targets"])
        dense = tc.reference.gauss_newton(double, scope["loss_fn"], data)
        block = dense[:320, :320]
        torch.testing.assert_close(scope["blocks"]["0.weight"].double(), block, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            scope["diagonal"]["0.weight"].flatten().double(), block.diagonal(), atol=1e-6, rtol=1e-4
        )
        gradients = tc.reference.per_sample_gradients(double, scope["loss_fn"], data)
        squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
        torch.testing.assert_close(scope["norms"].double(), squares.sqrt(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`tc\.([a-zA-Z_.]+)", README))))
def test_names_exist(name: str) -> None:
    found = tc
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("http") or (ROOT / target).exists()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
