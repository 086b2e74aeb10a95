"""The oracle: every derivative and curvature matrix of this package by its definition, slow and obvious.

Nothing here is fast and nothing of the rest of the package is used, so that every fast path can be tested
against it. The routes are reverse mode and reverse mode over reverse mode, which torch has right where
`torch.func.hessian` is not; functions for which they are wrong too are written out, and a Hessian that is not
symmetric is refused.

`data` is one batch `(inputs, targets)`; `inputs` is a tensor, a tuple (positional arguments) or a mapping
(keyword arguments); `loss_fn(outputs, targets)` gives a scalar. The P axis of a matrix holds the parameters
of `parameters(model)`, each flattened, concatenated; the C axis holds the outputs of one sample,
`outputs.shape[1:]` flattened in C order.
"""

from .curvature import gauss_newton, hessian, residual
from .evaluation import flatten_outputs, parameters
from .fisher import empirical_fisher, fisher, output_fisher
from .loss import loss_hessian, loss_jacobian, output_gradient, per_sample_gradients
from .network import (
    function_hessian,
    function_jacobian,
    input_jacobian,
    jacobian,
    jacobian_by_name,
    network_hessian,
    split_by_name,
)
from .normalisation import denominator

__all__ = [
    "denominator",
    "empirical_fisher",
    "fisher",
    "flatten_outputs",
    "function_hessian",
    "function_jacobian",
    "gauss_newton",
    "hessian",
    "input_jacobian",
    "jacobian",
    "jacobian_by_name",
    "loss_hessian",
    "loss_jacobian",
    "network_hessian",
    "output_fisher",
    "output_gradient",
    "parameters",
    "per_sample_gradients",
    "residual",
    "split_by_name",
]
