"""Products in TF32: exact where the factors have no more than 11 bits; else those of the rounded factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import operators
from .checks import Check, in_tf32
from .jacobians import Layer, diagonal_check, gram_check, layer, norms_check
from .test_instructions import rounded_to_tf32


@pytest.mark.parametrize("operator", operators.PRODUCTS)
def test_products_of_few_bits_are_exact(emulator, operator):
    """Inputs -2 .. 2: every factor and every partial sum is an integer that its format holds."""
    checks = [c for c in operators.cases(operator, 50) if c.case.format in ("tf32", "float32")]
    cases = [replace(c.case, buffers=[x.clamp(-2, 2).round() for x in c.case.buffers]) for c in checks]
    cases = [case for case, c in zip(cases, checks) if c.case.integers[2] <= 40]  # J stays below 2^11
    half = len(cases) // 2
    assert [case.format for case in cases] == ["float32"] * half + ["tf32"] * half
    results = emulator("plain").run(cases)
    for case, plain, tf32 in zip(cases, results[:half], results[half:]):
        assert torch.equal(plain[-1].nan_to_num(), tf32[-1].nan_to_num()), f"{case.operator} {case.integers}"


def rounded_and_not(operator: str, shape: tuple[int, ...]) -> list[Check]:
    g = torch.Generator().manual_seed(12)
    x = layer(g, *shape, torch.float32)
    kinds = {"jacobian_norms": norms_check, "gauss_newton_diagonal": lambda x: diagonal_check(x, None)}
    make = kinds.get(operator, lambda x: gram_check(x, None, False, g))
    return [in_tf32(make(y)) for y in (x, Layer(rounded_to_tf32(x.g), rounded_to_tf32(x.a)))]


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        ("jacobian_norms", (2, 3, 70, 9, 5)),
        ("jacobian_norms", (2, 3, 5, 9, 70)),
        ("gauss_newton_diagonal", (2, 5, 3, 8, 16)),
        ("jacobian_gram", (2, 5, 3, 8, 16)),
    ],
)
def test_factors_are_rounded_to_nearest(emulator, operator, shape):
    """To the bit, what rounding beforehand would give; and not what float32 gives."""
    checks = rounded_and_not(operator, shape)
    plain = replace(checks[0].case, format="float32")
    found = [buffers[checks[0].output] for buffers in emulator("plain").run([*(c.case for c in checks), plain])]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
