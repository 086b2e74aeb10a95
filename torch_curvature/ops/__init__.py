"""Operators with hand-written CPU and CUDA kernels, named by what they compute.

Each is differentiable to any order in every mode of torch; float32, float64, bfloat16 and float16 with at least float32
accumulation; any strides.
"""

from .frobenius_inner import frobenius_inner
from .kronecker_sum import kronecker_sum
from .outer import outer

__all__ = ["frobenius_inner", "kronecker_sum", "outer"]
