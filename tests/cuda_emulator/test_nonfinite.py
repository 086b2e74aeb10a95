"""Infinite inputs: what no infinite value enters stays right, and what one enters is infinite.

Inputs are positive, so that the formulas give infinity and never NaN: a NaN would come from a zero that pads a tile and
meets the infinite value. bfloat16 and half values that are formed on the way to tensor cores are split in two parts, of
which the second is infinity less infinity: there NaN stands for infinity.
"""

from __future__ import annotations

import pytest
import torch

from .checks import DTYPES, Check, in_tf32
from .jacobians import Layer, block_check, diagonal_check, gram_check, layer, norms_check
from .operators import LAYERS, kronecker_check

SHAPES = [shape for shape in LAYERS if 0 not in shape and shape[3] * shape[4] <= 2700]


def checks(operator: str, dtype: torch.dtype) -> list[Check]:
    g = torch.Generator().manual_seed(11)
    if operator == "kronecker_sum":
        b, a = (torch.rand(*shape, generator=g).to(dtype) + 0.5 for shape in ((1, 20, 5, 5), (1, 20, 9)))
        b = (b + b.mT) / 2
        a[0, 3, 4] = float("inf")
        return [kronecker_check(b, a, None, True, 1), kronecker_check(b, a, a[..., :6].clone(), False, 1)]
    found = []
    for V, N, S, O, I in SHAPES:
        x = layer(g, V, N, S, O, I, dtype)
        x = Layer(x.g.abs() + 0.1, x.a.abs() + 0.1)
        x.a[N - 1, S // 2, I - 1] = float("inf")
        if operator == "jacobian_norms":
            found.append(norms_check(x))
        elif operator == "jacobian_gram":
            found.append(gram_check(x, None, False, g))
        elif operator == "gauss_newton_diagonal":
            found.append(diagonal_check(x, None))
        elif O * I <= 300:
            found.append(block_check(x, None))
    return found


@pytest.mark.parametrize(
    "operator", ["kronecker_sum", "jacobian_norms", "jacobian_gram", "gauss_newton_diagonal", "gauss_newton_block"]
)
def test_infinite_inputs(emulator, operator):
    for dtype in DTYPES:
        found = checks(operator, dtype)
        if dtype == torch.float32:
            found += [in_tf32(check) for check in found]
        results = emulator("plain").run([check.case for check in found])
        for check, buffers in zip(found, results):
            assert check.want.isinf().any()
            assert not check.want.isnan().any()
            if dtype in (torch.bfloat16, torch.float16):
                got = buffers[check.output]
                got[got.isnan() & check.want.flatten().isinf()] = float("inf")
            check.verify(buffers)
