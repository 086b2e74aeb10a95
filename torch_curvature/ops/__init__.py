"""Operators with hand-written CPU and CUDA kernels, named by what they compute.

Each is differentiable to any order in every mode of torch, but for ``curvature_block``, which writes into a given
matrix; float32, float64, bfloat16 and float16 with at least float32 accumulation; any strides.
"""

from .curvature_block import Places, curvature_block
from .frobenius_inner import frobenius_inner
from .gauss_newton_block import gauss_newton_block
from .gauss_newton_diagonal import gauss_newton_diagonal
from .jacobian_gram import jacobian_gram
from .jacobian_norms import jacobian_norms
from .kronecker_sum import kronecker_sum
from .outer import outer

__all__ = [
    "Places",
    "curvature_block",
    "frobenius_inner",
    "gauss_newton_block",
    "gauss_newton_diagonal",
    "jacobian_gram",
    "jacobian_norms",
    "kronecker_sum",
    "outer",
]
