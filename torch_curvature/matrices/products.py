"""Products with vectors, without the matrix.

Per batch: one forward-mode pass gives the outputs and ``J v``, the loss multiplies by its Hessian in output space,
one backward pass applies ``J^T``.  Where there are more vectors than columns, the factors are applied instead:
``sum_vn sign J (J^T V)`` with all vectors at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ..capture import capture
from ..plan import TOLERANCE, working_dtype
from ..tangents import double_backward_product, pull_back, push_forward
from .blocks import normalised


def as_vectors(matrix: Any, vector: Any) -> Tensor:
    """[P, K] of whatever the user gave.

    Raises:
        TypeError, ValueError, KeyError: not a tensor or dictionary, a wrong length, a missing or unknown name.
    """
    if isinstance(vector, dict):
        names = list(matrix.parameters)
        wrong = [n for n in names if n not in vector] + [n for n in vector if n not in matrix.parameters]
        if wrong:
            raise KeyError(f"the vector's names must be those of the trainable parameters; missing or unknown: {wrong}")
        for name, p in matrix.parameters.items():
            if not isinstance(vector[name], Tensor):
                raise TypeError(f"vector[{name!r}] must be a tensor, got {type(vector[name]).__name__}")
            if vector[name].device != matrix.device:
                raise ValueError(
                    f"vector[{name!r}] is on {vector[name].device}, the model on {matrix.device}: move one of them"
                )
            if vector[name].shape != p.shape:
                raise ValueError(
                    f"vector[{name!r}] has shape {tuple(vector[name].shape)}, the parameter {tuple(p.shape)}"
                )
        flat = torch.cat([vector[n].reshape(-1) for n in names])[:, None]
    elif isinstance(vector, Tensor):
        P = matrix._size()
        if vector.dim() not in (1, 2) or vector.shape[0] != P:
            raise ValueError(f"the vector must be [P] or [P, K] with P = {P}, got {tuple(vector.shape)}")
        flat = vector if vector.dim() == 2 else vector[:, None]
    else:
        raise TypeError(f"the vector must be a tensor or a dictionary of tensors, got {type(vector).__name__}")
    if not flat.is_floating_point():
        raise TypeError(f"the vector must be floating, got {flat.dtype}")
    if flat.device != matrix.device:
        raise ValueError(f"the vector is on {flat.device}, the model on {matrix.device}: move one of them")
    return flat.detach().to(matrix.dtype)


def like_given(matrix: Any, vector: Any, result: Tensor) -> Any:
    if isinstance(vector, dict):
        return {n: v.squeeze(-1) for n, v in matrix.split(result).items()}
    return result if vector.dim() == 2 else result[:, 0]


def multiply(matrix: Any, vector: Any) -> Any:
    """``M v`` for a matrix that is a sum of outer products of columns."""
    V = as_vectors(matrix, vector)
    total = torch.zeros_like(V)
    K = V.shape[1]
    if K > 1 and matrix._prefers_columns(K):
        for batch in matrix._sweep("__matmul__"):
            _add_by_columns(matrix, batch, V, total)
    else:
        pieces = [{n: v[..., k] for n, v in matrix.split(V).items()} for k in range(K)]
        for batch in matrix._sweep("__matmul__", pieces[0] if pieces else None):
            for k, tangents in enumerate(pieces):
                if k:
                    batch.captured, batch.tangent = push_forward(
                        matrix.model, matrix.forward, batch.captured.batch, matrix.parameters, tangents
                    )
                total[:, k] += _product(matrix, batch, tangents, V[:, k])
    normalised({"": total}, matrix._denominator)
    return like_given(matrix, vector, total)


def _product(matrix: Any, batch: Any, tangents: dict[str, Tensor], vector: Tensor) -> Tensor:
    """One batch's ``J^T h J v``; ``(h J v) . (J v) = (J^T h J v) . v`` must hold, whichever way J v was computed."""

    def backwards(tangent: Tensor) -> tuple[Tensor, Tensor]:
        w = matrix._output_product(batch, tangent.unsqueeze(0))[0] * batch.scale**2
        return w, pulled(matrix, batch, w)

    w, result = backwards(batch.tangent)
    if not _agree(w, batch.tangent, result, vector, TOLERANCE[batch.captured.outputs.dtype]):
        w, result = backwards(double_backward_product(batch.captured, matrix.parameters, tangents))
    return result


def _agree(a: Tensor, b: Tensor, c: Tensor, d: Tensor, tolerance: float) -> bool:
    """Whether ``a . b = c . d`` up to rounding; not where anything is NaN."""
    a, b, c, d = (x.reshape(-1).to(working_dtype(x.dtype)) for x in (a, b, c, d))
    pairs = ((a, b), (c, d), (a, a), (b, b), (c, c), (d, d))
    ahead, back, *squares = torch.stack([torch.dot(x, y).to(torch.float64) for x, y in pairs]).tolist()
    sizes = (squares[0] * squares[1]) ** 0.5 + (squares[2] * squares[3]) ** 0.5
    return bool(abs(ahead - back) <= tolerance * sizes)


def pulled(matrix: Any, batch: Any, u: Tensor) -> Tensor:
    """``J^T u`` of a batch that was pushed forward."""
    try:
        return pull_back(matrix.model, batch.captured, matrix.parameters, u, matrix.dtype)
    except CheckpointError:  # what is recomputed has no tangents: observe the batch again, without
        batch.captured = capture(matrix.model, matrix.forward, batch.captured.batch, matrix.parameters)
        return pull_back(matrix.model, batch.captured, matrix.parameters, u, matrix.dtype)


def checked_tangent(matrix: Any, batch: Any, tangents: dict[str, Tensor], vector: Tensor) -> Tensor:
    """``J v`` of one batch; ``(J v) . (J v) = (J^T J v) . v`` must hold, else it is computed by double backward."""
    tangent: Tensor = batch.tangent
    back = pulled(matrix, batch, tangent)
    if _agree(tangent, tangent, back, vector, TOLERANCE[batch.captured.outputs.dtype]):
        return tangent
    return double_backward_product(batch.captured, matrix.parameters, tangents)


def _add_by_columns(matrix: Any, batch: Any, V: Tensor, total: Tensor) -> None:
    """``total += sum_vn sign J (J^T V)``, from the factors."""
    sizes = [p.numel() for p in matrix.parameters.values()]
    parts = dict(zip(matrix.parameters, V.split(sizes)))
    into = dict(zip(matrix.parameters, total.split(sizes)))
    for factors, sign in batch.chunks():
        weights: Tensor | None = None
        for name, factor in factors.items():
            part = factor.apply(parts[name].to(factor.g.dtype))
            weights = part if weights is None else weights.add_(part)
        if weights is None:
            continue
        if sign is not None:
            weights = weights * sign[..., None]
        for name, factor in factors.items():
            into[name] += factor.apply_transposed(weights.to(factor.g.dtype))
