"""Layer rules: from a recorded call to the normal form of its parameters' Jacobians."""

from . import convolution, elementwise, embedding, linear, normalisation
from .rules import FUNCTION_RULES, MODULE_RULES, Rule, Use, register_rule
from .written_out import OPENED, WRITTEN_OUT

__all__ = [
    "FUNCTION_RULES",
    "MODULE_RULES",
    "OPENED",
    "WRITTEN_OUT",
    "Rule",
    "Use",
    "convolution",
    "elementwise",
    "embedding",
    "linear",
    "normalisation",
    "register_rule",
]
