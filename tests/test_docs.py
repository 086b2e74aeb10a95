"""The pages under `docs/` hold what they say: every block runs, and the tables are those that torch gives."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs import torch_second_derivatives as script
from docs.derivative_cases import CASES

DOCS = Path(script.__file__).parent
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    previous = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(previous)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    session: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), session)


def test_the_walk_covers_every_equation_and_ends_with_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "calculus.md").read_text()
    blocks = [b[1] for b in BLOCK.finditer(text)]
    assert len(blocks) >= 20
    assert sum(b.count("assert ") for b in blocks) >= 30
    assert text.count("$$") // 2 >= 13
    assert "H - (G + R)" in blocks[-1]
    # After each display of equations, before the next heading, there is a block that computes it.
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        if "$$" in section:
            assert "assert" in "".join(b[1] for b in BLOCK.finditer(section)), section.splitlines()[0]


def row_of(name: str) -> list[str] | None:
    for line in (DOCS / "torch_second_derivatives.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] == name:
            return cells[1:]
    return None


def test_the_table_names_every_case_once() -> None:
    text = (DOCS / "torch_second_derivatives.md").read_text()
    good = text[text.index("Right in every column") : text.index("Already the first derivative")]
    for case in CASES:
        assert (row_of(case.name) is None) == (f"`{case.name}`" in good), case.name


@pytest.mark.parametrize(
    "name", ["Tanh()", "LayerNorm", "InstanceNorm1d affine", "weight_norm (parametrization)", "cdist", "MSELoss"]
)
def test_the_table_is_what_torch_gives(name: str) -> None:
    text = (DOCS / "torch_second_derivatives.md").read_text()
    version = re.search(r"torch (\d+\.\d+)", text)
    assert version is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = script.measure(next(c for c in CASES if c.name == name))
    if torch.__version__.startswith(version[1]):
        listed = row_of(name) or ["right"] * len(script.ROUTES)
        assert [verdict.split(",")[0] for verdict in found.values()] == [cell.split(",")[0] for cell in listed]
    # Whatever the version: the route that the reference takes is right, unless it writes the function out.
    if name not in ("weight_norm (parametrization)", "cdist"):
        assert found["double backward"] == "right"


def test_the_measure_finds_what_is_wrong() -> None:
    """Mutants of the Hessian must not pass as right."""
    function, point = script.scalar_function(next(c for c in CASES if c.name == "Tanh()"))
    truth = script.truth_of(function, point)
    assert script.relative_error(script.double_backward(function, point), truth) < script.TOLERANCE
    for mutant in (truth * 1.00001, truth + 1e-5 * truth.abs().max(), truth.roll(1, 0)):
        assert script.relative_error(mutant, truth) > script.TOLERANCE

    def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
        return function(x.detach()) + (1.1 * script.backward_gradient(function, x.detach()) * (x - x.detach())).sum()

    with pytest.raises(AssertionError, match="gradient itself"):
        script.truth_of(wrong_gradient, point)


def test_the_script_writes_and_checks_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [c for c in CASES if c.name in ("Tanh()", "LayerNorm", "Hardsigmoid()")]
    monkeypatch.setattr(script, "CASES", some)
    monkeypatch.setattr(script, "__file__", str(tmp_path / "torch_second_derivatives.py"))
    monkeypatch.setattr(sys, "argv", ["torch_second_derivatives.py"])
    assert script.main() == 0
    page = tmp_path / "torch_second_derivatives.md"
    text = page.read_text()
    assert "| Hardsigmoid() | refused" in text
    assert "**wrong" in next(line for line in text.splitlines() if line.startswith("| LayerNorm"))
    assert "`Tanh()`" in text
    assert "single precision: `Hardsigmoid()`." in text
    monkeypatch.setattr(sys, "argv", ["torch_second_derivatives.py", "--check"])
    assert script.main() == 0
    page.write_text(text.replace("wrong,", "right,"))
    assert script.main() == 1
