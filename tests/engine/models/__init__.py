"""The list of models that the engine's tests run over: every kind of layer, and every way to use one."""

from . import convolutions, dense, normalisation, sequences, sharing
from .case import CASES, Case, Function
from .sharing import ScaledLinear

__all__ = [
    "CASES",
    "Case",
    "Function",
    "ScaledLinear",
    "convolutions",
    "dense",
    "normalisation",
    "sequences",
    "sharing",
]
