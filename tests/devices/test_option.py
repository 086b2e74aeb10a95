"""``pytest --device`` and ``make test-gpu``, as far as they go without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import require_device
from tests.ops.cases import OPERATORS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_device_that_is_not_there_stops_before_anything_runs() -> None:
    require_device("cpu")
    require_device("stand-in")
    with pytest.raises(pytest.UsageError, match="--device nonsense: torch cannot use it here"):
        require_device("nonsense")
    with pytest.raises(pytest.UsageError, match="--device meta: torch cannot use it here"):
        require_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(pytest.UsageError, match="--device cuda: torch cannot use it here"):
            require_device("cuda")
        stopped = run("tests/engine/test_matrices.py", "--device", "cuda")
        assert stopped.returncode == pytest.ExitCode.USAGE_ERROR
        assert "--device cuda: torch cannot use it here" in stopped.stderr


def test_engine_and_hessians_run_on_the_device_that_is_asked_for() -> None:
    """The tests of the matrices themselves, reference and all, with everything made on the stand-in."""
    done = run("tests/engine/test_matrices.py", "tests/hessian/test_models.py", "--device", "stand-in", "-k", "[mlp]")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^[5-9] passed", done.stdout, re.MULTILINE), done.stdout


def test_the_sanitizers_get_every_operator() -> None:
    makefile = (ROOT / "Makefile").read_text()
    chosen = re.search(r'^SANITIZED := (\S+) -k "(.*)"$', makefile, re.MULTILINE)
    assert chosen is not None
    listed = run(chosen[1], "-k", chosen[2], "--collect-only").stdout
    for operator in OPERATORS:
        for dtype in ("float32", "bfloat16"):
            assert re.search(rf"\[{re.escape(operator.name)}-.*torch\.{dtype}\]", listed), operator.name
    tests = re.findall(r"tests/\S+", makefile[makefile.index("test-gpu: build") :].split("\n\n")[0])
    assert all((ROOT / path).exists() for path in tests)
