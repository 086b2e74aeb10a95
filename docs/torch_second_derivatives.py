"""Measures what torch's second derivatives get wrong, and writes `torch_second_derivatives.md` beside itself.

    python docs/torch_second_derivatives.py            # regenerate the table (a few minutes)
    python docs/torch_second_derivatives.py --check    # compare with the table that is there

The truth is a five-point central difference of the gradient, which itself is checked against one of the function.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs.derivative_cases import CASES, Case

STEP = 1e-4
TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-9
Scalar = Callable[[Tensor], Tensor]


def scalar_function(case: Case, seed: int = 0) -> tuple[Scalar, Tensor]:
    """The loss of the case as a function of one flat vector of parameters, and where it is to be differentiated."""
    model, inputs, loss_fn, targets = case.make(seed)
    named = {name: p.detach() for name, p in model.named_parameters()}
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        replaced = {name: part.reshape(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        return loss_fn(functional_call(model, {**buffers, **replaced}, arguments), targets)

    return value, torch.cat([p.flatten() for p in named.values()])


def central_differences(function: Callable[[Tensor], Tensor], point: Tensor, step: float = STEP) -> Tensor:
    """`d f / d x` by the five-point rule, of order `step^4`: `[*out, n]`."""
    columns = []
    for unit in torch.eye(point.numel(), dtype=point.dtype):
        h = step * unit
        near = function(point + h) - function(point - h)
        far = function(point + 2 * h) - function(point - 2 * h)
        columns.append((8 * near - far) / (12 * step))
    return torch.stack(columns, dim=-1)


def backward_gradient(function: Scalar, point: Tensor) -> Tensor:
    variable = point.clone().requires_grad_()
    return torch.autograd.grad(function(variable), variable)[0]


def double_backward(function: Scalar, point: Tensor, batched: bool = False) -> Tensor:
    variable = point.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(variable), variable, create_graph=True)
    if not first.requires_grad:
        return point.new_zeros(point.numel(), point.numel())
    units = torch.eye(point.numel(), dtype=point.dtype)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    if batched:
        return torch.autograd.grad(first, variable, units, is_grads_batched=True, **options)[0]
    return torch.stack([torch.autograd.grad(first, variable, unit, **options)[0] for unit in units])


ROUTES: dict[str, Callable[[Scalar, Tensor], Tensor]] = {
    "double backward": double_backward,
    "batched backward": lambda f, x: double_backward(f, x, batched=True),
    "`jacrev(grad)`": lambda f, x: jacrev(grad(f))(x),
    "`jacfwd(grad)`": lambda f, x: jacfwd(grad(f))(x),
    "`hessian`": lambda f, x: torch.func.hessian(f)(x),
    "`jacrev(jacrev)`": lambda f, x: jacrev(jacrev(f))(x),
    "`jacfwd(jacfwd)`": lambda f, x: jacfwd(jacfwd(f))(x),
}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry (or over one, for a function without curvature)."""
    scale = max(float(truth.abs().max()), 1e-3)
    return float((found - truth).abs().max()) / scale


def gradient_error(function: Scalar, point: Tensor) -> float:
    """Of torch's first derivative, against differences of the function."""
    return relative_error(backward_gradient(function, point), central_differences(function, point))


def truth_of(function: Scalar, point: Tensor) -> Tensor:
    """The Hessian by differences of a gradient that differences have confirmed."""
    error = gradient_error(function, point)
    if error > TOLERANCE:
        raise AssertionError(f"the gradient itself is off by {error:.1e}")
    return central_differences(lambda x: backward_gradient(function, x), point)


def measure(case: Case) -> dict[str, str]:
    """For each route: right, WRONG with its relative error, or refused."""
    function, point = scalar_function(case)
    truth = truth_of(function, point)
    found = {}
    for name, route in ROUTES.items():
        try:
            error = relative_error(route(function, point).detach(), truth)
            found[name] = "right" if error < TOLERANCE else f"**wrong, {100 * error:.0f} %**"
        except (RuntimeError, NotImplementedError):
            found[name] = "refused"
    return found


HEADER = """# What torch's second derivatives get wrong

Each row is a layer, activation or loss of torch {version} in float64 on the CPU, inside a small network with a
smooth loss; each column is a way to its Hessian. *right*: within {tolerance:.0e} of five-point central differences of
the gradient, which is itself checked against differences of the loss. *wrong*: the largest deviation relative to
the largest entry of the Hessian, returned without any warning. *refused*: torch raises an error. `hessian`,
`jacrev`, `jacfwd` and `grad` are those of `torch.func`; "batched backward" is
`torch.autograd.grad(..., is_grads_batched=True)`.

`torch_curvature.reference` takes double backward, keeps attention on torch's plain kernel, writes out what is wrong
or missing there, and refuses a Hessian that is not symmetric. Its tests compare it with central differences on
every row. Regenerate this page with `python docs/torch_second_derivatives.py`.
"""


def table() -> str:
    """The whole page."""
    rows, fine, imprecise = [], [], []
    for case in CASES:
        if max(gradient_error(*scalar_function(case, seed)) for seed in range(4)) > GRADIENT_TOLERANCE:
            imprecise.append(case.name)
        found = measure(case)
        if set(found.values()) == {"right"}:
            fine.append(case.name)
        else:
            rows.append(f"| {case.name} | " + " | ".join(found[name] for name in ROUTES) + " |")
    head = HEADER.format(version=torch.__version__.split("+")[0], tolerance=TOLERANCE)
    columns = "| | " + " | ".join(ROUTES) + " |\n|" + "---|" * (len(ROUTES) + 1)
    good = f"Right in every column ({len(fine)} of {len(CASES)}): " + ", ".join(f"`{name}`" for name in fine) + "."
    single = (
        f"Already the first derivative is off by more than {GRADIENT_TOLERANCE:.0e}, in float64, because of a "
        "constant in single precision: " + (", ".join(f"`{name}`" for name in imprecise) or "none") + "."
    )
    return "\n".join([head, columns, *rows, "", good, "", single, ""])


def main() -> int:
    """Write the page, or compare it with the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not up to date")
    check = parser.parse_args().check
    page = Path(__file__).with_suffix(".md")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = table()
    if check:
        same = page.read_text() == text
        print("up to date" if same else "differs from what torch does here: run without --check")
        return 0 if same else 1
    page.write_text(text)
    print(f"wrote {page.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
