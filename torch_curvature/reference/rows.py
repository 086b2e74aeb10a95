"""Jacobians by reverse mode, row by row, and Hessians as Jacobians of gradients."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 64


def jacobian_rows(values: Tensor, variables: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """`d values[r] / d variables`, `[R], P scalars -> [R, P]`: one backward pass for every row.

    Rows go through in chunks under vmap where torch can and one plain backward pass confirms it, else one at a time.
    """
    if values.ndim != 1:
        raise ValueError(f"values must be a vector [R], got shape {tuple(values.shape)}")
    size = sum(v.numel() for v in variables)
    if values.numel() == 0 or not values.requires_grad:
        return values.new_zeros(values.numel(), size)
    units = torch.eye(values.numel(), dtype=values.dtype, device=values.device)
    rows = [_pullback(values, variables, chunk, create_graph) for chunk in units.split(CHUNK)]
    return torch.cat(rows)


def gradient(value: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """`d value / d variables`, a scalar -> `[P]`, itself differentiable."""
    return jacobian_rows(value.reshape(1), variables, create_graph=True)[0]


def hessian_rows(value: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """`d2 value / d variables2`, a scalar -> `[P, P]`, as torch gives it: not yet checked for symmetry."""
    return jacobian_rows(gradient(value, variables), variables)


def checked_symmetric(matrix: Tensor, names: Sequence[str] = (), sizes: Sequence[int] = ()) -> Tensor:
    """The matrix, symmetric to the bit, if it was symmetric up to rounding; a Hessian that is not is wrong.

    Raises:
        RuntimeError: not symmetric; names the pair of parameters where it is worst.
    """
    if matrix.numel() == 0:
        return matrix
    asymmetry = (matrix - matrix.mT).abs()
    scale = float(matrix.abs().max())
    tolerance = 1e-9 if matrix.dtype == torch.float64 else 100 * torch.finfo(matrix.dtype).eps ** 0.75
    if not float(asymmetry.max()) <= tolerance * scale:  # also true for NaN
        where = ""
        if names:
            row, column = divmod(int(asymmetry.flatten().nan_to_num(torch.inf).argmax()), matrix.shape[-1])
            owner = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
            where = f", worst between {owner[row % len(owner)]!r} and {owner[column]!r}"
        raise RuntimeError(
            f"the Hessian is not symmetric (|H - H^T| up to {float(asymmetry.max()):.2e}, |H| up to "
            f"{scale:.2e}{where}): a function in the model or loss has wrong second derivatives in torch, "
            "or none at this point"
        )
    return (matrix + matrix.mT) / 2


def _pullback(values: Tensor, variables: Sequence[Tensor], vectors: Tensor, create_graph: bool) -> Tensor:
    """`vectors [K, R] -> vectors @ (d values / d variables) [K, P]`."""

    def plain(vector: Tensor) -> Tensor:
        return _concatenate(_grad(values, variables, vector, create_graph, batched=False), variables, None)

    if vectors.shape[0] > 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = _grad(values, variables, vectors, create_graph, batched=True)
        except RuntimeError:
            pass  # no rule for vmap: the plain backward pass below works or says what is missing
        else:
            rows = _concatenate(found, variables, vectors.shape[0])
            # Rules for vmap are not above suspicion: all rows are checked at once, in a combination with known weights.
            weights = torch.linspace(0.5, 1.5, vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
            if _same(weights @ rows, plain(weights @ vectors)[0]):
                return rows
    return torch.cat([plain(vector) for vector in vectors])


def _same(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding; not a number in the same places."""
    tolerance = 1e-9 if first.dtype == torch.float64 else 100 * torch.finfo(first.dtype).eps ** 0.75
    scale = float(second.detach().nan_to_num(0.0).abs().max()) if second.numel() else 0.0
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)


def _grad(
    values: Tensor, variables: Sequence[Tensor], vectors: Tensor, create_graph: bool, batched: bool
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        values,
        list(variables),
        vectors,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        is_grads_batched=batched,
    )


def _concatenate(found: Sequence[Tensor | None], variables: Sequence[Tensor], batch: int | None) -> Tensor:
    """Flatten and concatenate to `[K, P]`, with zeros for a variable that the values do not depend on."""
    count = 1 if batch is None else batch
    parts = [
        v.new_zeros(count, v.numel()) if g is None else g.reshape(count, v.numel())
        for g, v in zip(found, variables, strict=True)
    ]
    return torch.cat(parts, dim=1)
