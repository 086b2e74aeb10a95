"""The matrices: Jacobian, Gauss-Newton, Fisher, gradient second moment, Hessian, in every representation."""

from .gauss_newton import EmpiricalFisher, Fisher, GaussNewton
from .hessian import Hessian, Residual
from .jacobian import Jacobian
from .split import HessianSplit, hessian_split

__all__ = [
    "EmpiricalFisher",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "HessianSplit",
    "Jacobian",
    "Residual",
    "hessian_split",
]
