"""The checks of this folder find what they are for: each seeded fault is caught, by the means it says."""

import shutil

import pytest

from . import operators
from .checks import fails
from .emulation import CACHE, KERNELS, Emulator
from .mutants import FAST, MUTANTS, Mutant

RUNS = {
    "values": (
        "plain",
        [{}, {"order": "reverse", "copies": "eager"}, {"order": "5", "max_blocks": 2, "workspace": 4096}],
    ),
    "memory": ("asan", [{}]),
    "races": ("tsan", [{"order": "7", "copies": "eager", "max_blocks": 2}, {"copies": "lazy", "max_blocks": 2}]),
}


def marked(mutant: Mutant) -> object:
    return pytest.param(mutant, id=mutant.name, marks=[] if mutant.name in FAST else pytest.mark.full)


@pytest.mark.parametrize("mutant", [marked(m) for m in MUTANTS])
def test_a_seeded_fault_is_caught(emulator, mutant):
    folder = CACHE / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("*.cu", "*.h"))
    source = folder / mutant.file
    source.write_text(mutant.apply(source.read_text()))
    variant, runs = RUNS[mutant.caught_by]
    checks = [c for c in operators.cases(mutant.operator, seed=7) if c.case.format == mutant.format]
    driver = Emulator(variant, mutant.operator, mutant.format, folder)
    assert any(fails(driver, checks, **options) for options in runs), "nothing noticed"
