"""Operators with hand-written CPU and CUDA kernels, named by what they compute.

Each is differentiable to any order in every mode of torch, but for ``curvature_block``, which writes into a given
matrix; float32, float64, bfloat16 and float16 with at least float32 accumulation; any strides.

Products of float32 are true float32 products, unless the user lets torch take them in TF32 on CUDA
(``torch.backends.cuda.matmul.fp32_precision = "tf32"``, ``allow_tf32``, ``torch.set_float32_matmul_precision``).
On CUDA, where an input is infinite or NaN, so are the results that it enters, and no others. Which of the two they are
may differ from the formula: sums over positions by positions may meet infinity less infinity, and bfloat16 and float16
products, whose factors are split in two parts, give NaN for infinity.
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
