"""Exact curvature of neural networks: Jacobians, Hessians, Gauss-Newton and Fisher matrices, fast.

Curvature lives in activation space: a layer computes ``z = W a``, and all that one may want to know of ``W`` is an
outer-product contraction of ``a`` with a derivative taken at ``z``.
"""

import torch  # noqa: F401  first: the compiled module resolves its symbols in torch's libraries

__version__ = "0.1.0"

try:
    import torch_curvature._C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The compiled part of torch_curvature cannot be loaded ({error}). It is missing, or was built for another "
        "torch or Python (torch >= 2.13 is needed). Build it against the torch that is installed here:\n"
        "    pip install . --no-build-isolation        (in a checkout of torch_curvature)\n"
        "    make build                                (the same, for the checkout's own .venv)"
    ) from error

from . import losses, ops, reference
from .composition import compose, compose_hessian, compose_jacobian
from .layers import Use, register_rule
from .matching import MatchingLoss, is_matching, softmax_jacobian
from .matrices import EmpiricalFisher, Fisher, GaussNewton, Hessian, HessianSplit, Jacobian, Residual, hessian_split
from .products import frobenius_inner, inner, outer, tensor_product
from .recorder import UnsupportedModelError
from .tracking import track

__all__ = [
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "HessianSplit",
    "Jacobian",
    "MatchingLoss",
    "Residual",
    "UnsupportedModelError",
    "Use",
    "compose",
    "compose_hessian",
    "compose_jacobian",
    "frobenius_inner",
    "hessian_split",
    "inner",
    "is_matching",
    "losses",
    "ops",
    "outer",
    "reference",
    "register_rule",
    "softmax_jacobian",
    "tensor_product",
    "track",
]
