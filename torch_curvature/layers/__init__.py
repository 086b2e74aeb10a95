"""Layer rules: from a recorded call to the normal form of its parameters' Jacobians."""

import torch

from . import convolution, elementwise, embedding, linear, normalisation
from .rules import FUNCTION_RULES, MODULE_RULES, Rule, Use, register_rule
from .written_out import OPENED, WRITTEN_OUT

# Functions of torch whose parameters may be given detached where their own gradients are not wanted. Not those that
# return a view of the parameter, by which its later uses are known.
DETACHABLE = frozenset(FUNCTION_RULES) - {torch.Tensor.expand, torch.Tensor.repeat}

__all__ = [
    "DETACHABLE",
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
