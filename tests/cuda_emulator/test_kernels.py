"""Every kernel, from its very source, against its formula in float64: over schedules, and under the sanitizers."""

import pytest

from . import operators
from .checks import verify_all
from .emulation import Emulator

SCHEDULES = [
    {"order": "forward", "copies": "lazy"},
    {"order": "reverse", "copies": "eager", "workspace": 4096},  # little memory: sums go piece by piece
    {"order": "1234", "copies": "lazy", "max_blocks": 2},  # few blocks: grid-stride loops go round
]


@pytest.mark.parametrize("operator", operators.GENERATORS)
def test_values(emulator, operator, full):
    for seed in range(2 if full else 1):
        checks = operators.cases(operator, seed, quick=not full)
        for schedule in SCHEDULES:
            verify_all(emulator("plain"), checks, **schedule)


@pytest.mark.full
@pytest.mark.parametrize("operator", operators.GENERATORS)
def test_memory_and_undefined_behaviour(emulator, operator):
    """Buffers have their exact size: one element past any of them, in global or shared memory, ends the run."""
    checks = operators.cases(operator, 10)
    for schedule in SCHEDULES:
        verify_all(emulator("asan"), checks, **schedule)


@pytest.mark.full
@pytest.mark.parametrize("operator", operators.GENERATORS)
def test_races(emulator, operator):
    """Barriers and warp operations order threads; what they do not order must not touch the same bytes."""
    checks = operators.cases(operator, 20)
    for copies in ("lazy", "eager"):
        verify_all(emulator("tsan"), checks, order="77", copies=copies)


@pytest.mark.parametrize(
    ("variant", "operator", "format"),
    [("asan", "jacobian_norms", "bfloat16"), ("tsan", "kronecker_sum", "float32")],
)
def test_a_sample_under_sanitizers(emulator, variant, operator, format):
    """What the two tests above do for all: one operator and format of each, quick to compile."""
    checks = [check for check in operators.cases(operator, 30) if check.case.format == format]
    verify_all(Emulator(variant, operator, format), checks, order="77", copies="eager")


def test_a_result_does_not_depend_on_the_schedule(emulator):
    """To the bit: whoever computes a value, it is summed in one order."""
    for operator in operators.GENERATORS:
        checks = operators.cases(operator, 40)[::3]
        first = emulator("plain").run([check.case for check in checks], order="forward")
        again = emulator("plain").run([check.case for check in checks], order="99", max_blocks=2)
        for check, x, y in zip(checks, first, again):
            mine, other = x[check.output], y[check.output]
            assert (mine == other).all(), str(check)
