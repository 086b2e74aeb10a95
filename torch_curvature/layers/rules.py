"""What a layer rule is, and where rules are registered.

A rule turns one recorded call of a layer into *uses* of parameters.  It is a short function

    rule(output, *args, **kwargs) -> iterable of Use          for a torch function
    rule(module, output, *inputs) -> iterable of Use          for a class of modules

called with the very arguments of the call.  It computes nothing itself: a Use carries two small closures that give
the layer's input ``a`` and turn a derivative with respect to the output ``z`` into ``g``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..patches import Patches

Rule = Callable[..., Iterable["Use"]]


@dataclass(slots=True)
class Use:
    """One use of one parameter in one call ``z = f(x, parameter)`` that is linear in the parameter.

    The first ``batch_axes`` axes of z enumerate samples (and positions: time steps, tokens); flattened they count R
    rows.  The remaining axes F are those of the layer itself.  With s positions made inside the layer (convolution
    patches; 1 for most), the derivative of row r with respect to the parameter is ``sum_s g[r, s] (x) a[r, s]``.

    Attributes:
        parameter: the tensor that was used: a parameter, or a view of one (rows, transposition).
        batch_axes: number of leading axes of z that enumerate samples and positions.
        gradient: maps a derivative with respect to z, [V, R, *F], to g [V, R, s, O]; None where F is (O,).
        activation: gives a [R, s, I], or integers [R, s] where a is one-hot (negative: no row at all); None for
            a = 1 with I = 1: then g is the Jacobian, O counts the entries of the parameter.
        summed: ``gradient`` where a = 1 and the rows of each of N samples follow one another, summed over them:
            (dz, N) -> [V, N, 1, O], or None where it must be done otherwise.
        part: gives a of some rows only, where it is much larger than what it is made from.
        patches: says what a consists of where it is the patches of images.
        transposed: the parameter is stored as [I, O] instead of [O, I].
        is_lookup: rows of a table that may have been looked up once for all samples.
    """

    parameter: Tensor
    batch_axes: int
    gradient: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[], Tensor] | None = None
    transposed: bool = False
    is_lookup: bool = False
    part: Callable[[slice], Tensor] | None = None
    patches: Callable[[], Patches] | None = None
    summed: Callable[[Tensor, int], Tensor | None] | None = None


FUNCTION_RULES: dict[Callable[..., Any], Rule] = {}
MODULE_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(target: Callable[..., Any] | type[nn.Module], rule: Rule | None = None) -> Any:
    """Teach the engine a layer: ``register_rule(target, rule)``, or ``@register_rule(target)`` above the rule.

    Args:
        target: a subclass of ``torch.nn.Module`` (exactly that class is matched), or a torch function as called by
            models (``torch.nn.functional.linear``, ``torch.addmm``, ``torch.Tensor.add``).
        rule: ``rule(module, output, *inputs)`` or ``rule(output, *args, **kwargs)``, returning an iterable of
            :class:`Use`.  Returning no Use for a parameter leaves it to the exact generic fallback.

    A rule is not trusted: on the first batch its factors are compared with autograd's own gradient, and a parameter
    whose factors differ goes to the fallback, which ``coverage()`` reports.

    A module's rule replaces the rules of the functions called inside it, for the parameters that the module owns.

    Raises:
        TypeError: target is neither a module class nor callable.
    """
    if rule is None:
        return lambda function: register_rule(target, function)
    if isinstance(target, type) and issubclass(target, nn.Module):
        MODULE_RULES[target] = rule
    elif callable(target) and not isinstance(target, type):
        FUNCTION_RULES[target] = rule
    else:
        raise TypeError(
            f"target must be a subclass of torch.nn.Module or a torch function, got {target!r}: pass the class or "
            "the function that the model calls"
        )
    return rule


def rows(tensor: Tensor, batch_axes: int, lead: int = 0) -> Tensor:
    """Flatten ``batch_axes`` axes after the first ``lead`` into one."""
    shape = tensor.shape
    return tensor.reshape(*shape[:lead], -1, *shape[lead + batch_axes :])


def reduced_to(tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """[V, R, *F] summed over the axes of F along which a tensor of ``shape`` was broadcast: -> [V, R, 1, numel]."""
    V, R = tensor.shape[:2]
    features = tensor.dim() - 2
    aligned = (1,) * (features - len(shape)) + tuple(shape)
    axes = [2 + i for i in range(features) if aligned[i] == 1 and tensor.shape[2 + i] != 1]
    return (tensor.sum(axes) if axes else tensor).reshape(V, R, 1, -1)
