"""The matrices: Jacobian, Gauss-Newton, Fisher and gradient second moment, each in every representation."""

from .gauss_newton import EmpiricalFisher, Fisher, GaussNewton
from .jacobian import Jacobian

__all__ = ["EmpiricalFisher", "Fisher", "GaussNewton", "Jacobian"]
