"""Second derivatives that cannot be right, or are missing, and the module that they come from.

A Hessian is symmetric: ``v . H w = w . H v``.  Two products with random vectors tell, at the cost of about eight
gradients.  When they differ, or when autograd has no second derivative, each module without children is tried alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import every_module, observation
from ..layers.twice import TWICE_DIFFERENTIABLE
from ..plan import TOLERANCE, Plan
from ..recorder import Recorder, UnsupportedModelError
from ..second_order import SecondOrder
from ..second_passes import BREAK, kinds_of_nodes

ONCE = "a backward that is marked as once differentiable"
MISSING = ("not implemented", "differentiate twice", "does not require grad", "not differentiable twice")

# Plans and kinds of nodes under which the two products agreed and did not vanish, of the Hessian (True) and of the
# residual. A plan knows the calls on parameters alone, not the activations between them, which may be exchanged.
Passed = tuple[Plan, "frozenset[str | type]", bool]
SYMMETRIC: weakref.WeakKeyDictionary[nn.Module, list[Passed]] = weakref.WeakKeyDictionary()


def check_second_derivatives(second: SecondOrder, curved: bool, batch: Any, probe: bool) -> None:
    """Look for functions that can be differentiated only once; with ``probe`` compare ``v . H w`` with ``w . H v``.

    They are compared once for the same functions on tensors of the same shapes.

    Raises:
        UnsupportedModelError: there is one, or the products differ by more than rounding; names the module.
    """
    if BREAK in second.kinds:
        raise _no_second_derivative(batch, ONCE)
    known = SYMMETRIC.setdefault(batch.matrix.model, [])
    plan, kinds = second.pass_.plan, second.kinds
    if not probe or any(p is plan and k == kinds and c == curved for p, k, c in known):
        return
    parameters = second.parameters
    generator = torch.Generator().manual_seed(90210)
    directions = {
        n: torch.randn(2, *p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p)
        for n, p in parameters.items()
    }
    found = second.products(directions, list(parameters), curved)
    flat = torch.cat([d.reshape(2, -1).to(torch.float64) for d in directions.values()], 1)
    product = torch.cat([found[n].to(torch.float64) for n in parameters], 1)
    there, back = flat[0] @ product[1], flat[1] @ product[0]
    size = flat[0].norm() * product[1].norm() + flat[1].norm() * product[0].norm()
    if (there - back).abs() <= TOLERANCE[batch.matrix._precision(second)] * size:
        if bool(size > 0):  # where all vanishes nothing was shown
            del known[: max(0, len(known) - 255)]
            known.append((plan, kinds, curved))
        return
    where = _suspects(batch) or _worst_pair(second, curved, directions)
    raise UnsupportedModelError(
        f"the second derivatives that torch gives for this model are wrong: v . H w = {float(there):.6g} but w . H v = "
        f"{float(back):.6g}, and a Hessian is symmetric. {where}. Write the function out in simpler operations, or "
        "correct its backward; check_symmetry=False switches this probe off"
    )


def _worst_pair(second: SecondOrder, curved: bool, directions: dict[str, Tensor]) -> str:
    """No module alone fails: the pair of parameters whose block and its transpose differ most."""
    names = list(directions)
    found = {n: second.products({n: directions[n]}, names, curved) for n in names}
    worst, pair = -1.0, (names[0], names[0])
    for i, a in enumerate(names):
        for b in names[i:]:
            there = directions[b][1].reshape(-1).to(found[a][b]) @ found[a][b][0]
            back = directions[a][0].reshape(-1).to(found[b][a]) @ found[b][a][1]
            if float((there - back).abs()) > worst:
                worst, pair = float((there - back).abs()), (a, b)
    return f"No single module is to blame; it shows most between the parameters {pair[0]!r} and {pair[1]!r}"


def explained(batch: Any, error: Exception) -> Exception | None:
    """A clear error for a missing second derivative, None for any other error."""
    text = str(error)
    if not any(phrase in text for phrase in MISSING):
        return None
    return _no_second_derivative(batch, text.splitlines()[0])


def _no_second_derivative(batch: Any, reason: str) -> UnsupportedModelError:
    where = _suspects(batch) or "No single module of the model fails alone: look at the functions that it calls"
    return UnsupportedModelError(
        f"the model has no second derivative in torch ({reason}). {where}. Write the function out in simpler operations"
    )


def _suspects(batch: Any) -> str:
    """Modules without children that fail alone, as a sentence; empty where none does."""
    found = []
    for name, module, inputs, output in _calls(batch):
        why = _fault(module, inputs, output)
        if why is not None:
            found.append(f"{name or 'the model'} ({type(module).__name__}) {why}")
    return "; ".join(dict.fromkeys(found))


def _calls(batch: Any) -> list[tuple[str, nn.Module, tuple[Any, ...], Any]]:
    """Every call of a module without children in one pass: its inputs, and a function that repeats it."""
    matrix = batch.matrix
    calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]] = []
    handles = []
    for module, name in every_module(matrix.model).items():
        if next(module.children(), None) is None:

            def note(module: nn.Module, inputs: Any, kwargs: Any, output: Any, name: str = name) -> None:
                calls.append((name, module, inputs, kwargs))

            handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        with observation(every_module(matrix.model)), _replacing():
            matrix.forward(matrix.model, batch.captured.batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _replacing() -> Recorder:
    recorder = Recorder({})
    recorder.replacements = TWICE_DIFFERENTIABLE
    return recorder


def _fault(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What is wrong with the second derivative of one module on its inputs."""
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    arguments = []
    for value in inputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone().requires_grad_()
            leaves.append(value)
        arguments.append(value.clone() if isinstance(value, Tensor) else value)
    if not leaves:
        return None
    try:
        with torch.enable_grad(), _replacing():
            output = module(*arguments, **kwargs)
        output = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        with torch.enable_grad():
            slope = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device)
            value = (output * slope.view_as(output)).square().sum()
            first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        if BREAK in kinds_of_nodes(first):
            return f"has none: {ONCE}"
        return _asymmetry(leaves, first)
    except (RuntimeError, NotImplementedError) as error:
        return f"has none: {str(error).splitlines()[0]}"


def _asymmetry(leaves: list[Tensor], first: tuple[Tensor | None, ...]) -> str | None:
    used = [(x, g) for x, g in zip(leaves, first) if g is not None and g.requires_grad]
    if not used:
        return None
    generator = torch.Generator().manual_seed(1)
    vectors = [
        [torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x) for x, _ in used]
        for _ in range(2)
    ]
    products = [
        torch.autograd.grad([g for _, g in used], [x for x, _ in used], v, retain_graph=True, allow_unused=True)
        for v in vectors
    ]
    sides = [sum(float((a * b).sum()) for a, b in zip(vectors[i], products[1 - i]) if b is not None) for i in range(2)]
    size = sum(
        float((a * b).abs().sum()) for i in range(2) for a, b in zip(vectors[i], products[1 - i]) if b is not None
    )
    if abs(sides[0] - sides[1]) > TOLERANCE[min((x.dtype for x, _ in used), key=lambda d: d.itemsize)] * size:
        return "has a wrong one"
    return None
