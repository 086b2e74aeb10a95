"""The normal form of a parameter's Jacobian, and every contraction of it.

A parameterised layer computes ``z = W a``.  For sample n and backpropagated column v the Jacobian of the
parameter is an outer-product sum over the S positions at which the sample meets the parameter,

    J[v, n] = sum_s  g[v, n, s] (x) a[n, s],        a [N, S, I],   g [V, N, S, O],   J[v, n] [O, I],

and all that is computed about a parameter is a contraction of ``a`` with ``g``.  A parameter without such a
structure is the special case I = 1, a = 1: then ``g`` is the Jacobian itself.  No function here knows which
layer, loss or matrix it works for.

The contractions themselves are operators on bare tensors (``ops``), each with its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ops import gauss_newton_block, gauss_newton_diagonal, jacobian_norms
from .ops.routing import takes_helpers, without_autocast
from .unfolding import Unfolding, in_parts

_norms_with_bias = torch.ops.torch_curvature.norms_with_bias.default._op

CACHE_ELEMENTS = 1 << 18  # of a temporary that stays in the second-level cache of one core (float32: 1 MiB)
FEW = 1 << 16  # entries of an input that is copied to give it a last one, before a second operator is called for that


@dataclass(slots=True)
class Factor:
    """Jacobian of one parameter on one batch, ``J[v, n] = sum_s g[v, n, s] (x) a[n, s]``.

    Attributes:
        g: [V, N, S, O], derivative of each column with respect to the layer's output.
        input: ``a`` [N, S, I], the layer's input, or what makes it when it is needed; None stands for ones with I = 1.
        shape: shape of the parameter.
        transposed: the parameter is stored as [I, O] and not as [O, I].
        rows: [I] rows of the parameter that the I entries of ``a`` stand for (an embedding table of which this
            batch uses few rows); None when I counts all of them.
        bias: name of a parameter with the same ``g`` and the input one: this is the factor of a weight and of that
            bias, for sums over parameters.
        ones: gives ``a`` with a last entry of ones, [N, S, I + 1], where there is a bias.
    """

    g: Tensor
    input: Tensor | Unfolding | None
    shape: torch.Size
    transposed: bool = False
    rows: Tensor | None = None
    bias: str | None = None
    ones: Callable[[], Tensor] | None = None

    @property
    def a(self) -> Tensor | None:
        """All of the input."""
        return self.input.whole().to(self.g.dtype) if isinstance(self.input, Unfolding) else self.input

    @property
    def outputs(self) -> int:
        return self.g.shape[3]

    @property
    def inputs(self) -> int:
        return 1 if self.input is None else self.input.shape[2]

    @property
    def positions(self) -> int:
        return self.g.shape[2]

    @property
    def size(self) -> int:
        """Entries of the parameter that this batch can reach (all of them unless ``rows`` is given)."""
        return self.outputs * self.inputs

    def entries(self) -> Tensor | None:
        """[size] place in the flattened parameter of each entry of the compact Jacobian, None for all in order."""
        if self.rows is None:
            return None
        columns = torch.arange(self.outputs, device=self.g.device)
        return (self.rows[:, None] * self.outputs + columns).reshape(-1)

    def spread(self, compact: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Put axes that count reachable entries in their places among all entries of the parameter."""
        entries = self.entries()
        if entries is None:
            return compact
        for dim in dims:
            full = compact.new_zeros(*compact.shape[:dim], self.shape.numel(), *compact.shape[dim + 1 :])
            compact = full.index_copy_(dim, entries, compact)
        return compact

    def samples(self, start: int, stop: int) -> Factor:
        """The same for samples start..stop-1."""
        if isinstance(self.input, Unfolding):
            a: Tensor | Unfolding | None = self.input.samples(start, min(stop, self.g.shape[1]))
        else:
            a = None if self.input is None else self.input[start:stop]
        factor = Factor(self.g[:, start:stop], a, self.shape, self.transposed, self.rows)
        return factor if self.ones is None else factor.with_bias(self.bias, lambda: self.with_ones()[start:stop])

    def with_ones(self) -> Tensor:
        """``a`` with a last entry of ones, [N, S, I + 1], of the dtype of g; ``a`` itself where there is no bias."""
        assert self.a is not None
        return self.a if self.ones is None else self.ones().to(self.g.dtype)

    def with_bias(self, bias: str | None, ones: Callable[[], Tensor]) -> Factor:
        """Together with the bias, given what makes ``a`` with ones."""
        return replace(self, bias=bias, ones=ones)

    def without_bias(self) -> Factor:
        return self if self.bias is None else Factor(self.g, self.input, self.shape)

    def of_bias(self) -> Factor:
        """That of the bias alone."""
        g = self.g if self.positions == 1 else self.g.sum(2, keepdim=True)
        return Factor(g, None, torch.Size([self.outputs]))

    def jacobian(self) -> Tensor:
        """[V, N, size], flattened as the parameter is, restricted to the reachable entries."""
        V, N, S, O = self.g.shape
        if isinstance(self.input, Unfolding):
            if self.input.patches is not None:
                return self.input.patches.jacobian(self.g)
            return torch.cat([part.jacobian() for _, part in in_parts(self)], 1)
        if self.a is None:
            return self.g.sum(2) if S > 1 else self.g.reshape(V, N, O)
        if S == 1:
            a, g = self.a[:, 0], self.g[:, :, 0]
            J = a[:, :, None] * g[:, :, None, :] if self.transposed else g[..., None] * a[:, None, :]
        else:
            with without_autocast(self.g):
                J = torch.matmul(self.a.mT, self.g) if self.transposed else torch.matmul(self.g.mT, self.a)
        return J.reshape(V, N, -1)

    def apply(self, vector: Tensor) -> Tensor:
        """Product of the Jacobian with vectors: [p, K] -> [V, N, K], without the Jacobian."""
        with without_autocast(self.g):
            return self._apply(vector)

    def _apply(self, vector: Tensor) -> Tensor:
        K = vector.shape[1]
        entries = self.entries()
        if entries is not None:
            vector = vector[entries]
        if self.a is None:
            return torch.matmul(self.g.sum(2), vector)
        O, I = self.outputs, self.inputs
        if self.transposed:
            tangent = torch.einsum("nsi,iok->nsok", self.a, vector.view(I, O, K))
        else:
            tangent = torch.einsum("nsi,oik->nsok", self.a, vector.view(O, I, K))
        return torch.einsum("vnso,nsok->vnk", self.g, tangent)

    def apply_transposed(self, weights: Tensor) -> Tensor:
        """Product of the transposed Jacobian with ``weights`` [V, N, K]: -> [p, K]."""
        with without_autocast(self.g):
            return self._apply_transposed(weights)

    def _apply_transposed(self, weights: Tensor) -> Tensor:
        V, N, K = weights.shape
        if self.a is None:
            out = self.g.sum(2).reshape(V * N, -1).T @ weights.reshape(V * N, K)
        else:
            combined = torch.einsum("vnk,vnso->knso", weights, self.g)
            left, right = combined.reshape(K, -1, self.outputs), self.a.reshape(-1, self.inputs)
            product = torch.matmul(right.T, left) if self.transposed else torch.matmul(left.mT, right)
            out = product.reshape(K, -1).T
        return self.spread(out, (0,))


def samples_per_chunk(elements_per_sample: int, limit: int = CACHE_ELEMENTS) -> int:
    return max(1, limit // max(1, elements_per_sample))


def mirrored_gram(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum w x x^T`` over the rows x of ``rows`` [M, P] or [M, S, P], read where they lie; ``weights`` [M].

    Symmetric to the bit; half the work of a matrix product.
    """
    if rows.dim() == 2:
        rows = rows.unsqueeze(1)
    M, S, _ = rows.shape
    sign = None if weights is None else weights.to(rows.dtype).expand(S, M)
    return gauss_newton_block(rows.transpose(0, 1).unsqueeze(2), rows.new_ones(1, 1, 1).expand(M, 1, 1), sign)


def mirror_upper(matrix: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return torch.triu(matrix) + torch.triu(matrix, 1).T


def activation_space_block(g: Tensor, g2: Tensor, sign: Tensor | None = None) -> Tensor:
    """``B[n] = sum_v sign[v,n] g[v,n] g2[v,n]^T``: [V,N,1,O], [V,N,1,O2] -> [N,O,O2]; symmetric when g2 is g."""
    left = g[:, :, 0].permute(1, 2, 0)
    right = g2[:, :, 0] if sign is None else g2[:, :, 0] * sign[..., None]
    with without_autocast(g):
        B = torch.bmm(left, right.transpose(0, 1))
    if g2 is g:
        B = torch.triu(B) + torch.triu(B, 1).mT
    return B


def ones_for(g: Tensor) -> Tensor:
    """The input a = 1 that goes with a Jacobian in the place of g."""
    return g.new_ones(1, 1, 1).expand(g.shape[1], 1, 1)


def _bare(factor: Factor) -> tuple[Tensor, Tensor]:
    """Operands g and a of the operators."""
    if factor.input is not None:
        assert factor.a is not None
        return factor.g, factor.a
    g = factor.jacobian()[:, :, None]
    return g, ones_for(g)


def squared_norms(factor: Factor) -> Tensor:
    """[V, N] squared Frobenius norms of the Jacobian's columns."""
    if isinstance(factor.input, Unfolding):
        if factor.input.patches is not None and factor.input.patches.by_sums(factor.g):
            return factor.input.patches.norms(factor.g, factor.bias is not None)
        return torch.cat([squared_norms(part) for _, part in in_parts(factor)], 1)
    if factor.a is None or factor.bias is None:
        return jacobian_norms(*_bare(factor))
    if takes_helpers(factor.g) and takes_helpers(factor.a):
        found: Tensor = _norms_with_bias(factor.g, factor.a)
        return found
    if factor.positions == 1 and factor.a.numel() <= FEW:
        return jacobian_norms(factor.g, factor.with_ones())
    return jacobian_norms(factor.g, factor.a) + squared_norms(factor.of_bias())


def diagonal(factor: Factor, sign: Tensor | None = None) -> Tensor:
    """``sum_vn sign[v,n] J[v,n]^2`` in the parameter's shape."""
    if isinstance(factor.input, Unfolding) and factor.input.patches is not None:
        return factor.input.patches.diagonal(factor.g, sign).reshape(factor.shape)
    out = None
    for chosen, part in in_parts(factor):
        g, a = _bare(part)
        found = gauss_newton_diagonal(g, a, None if sign is None else sign[:, chosen].to(g.dtype))
        out = found if out is None else out.add_(found)
    assert out is not None
    return factor.spread((out.T if factor.transposed else out).reshape(-1), (0,)).reshape(factor.shape)


def diagonals(name: str, factor: Factor, sign: Tensor | None = None) -> dict[str, Tensor]:
    """:func:`diagonal` by parameter, where the factor is one of a weight and its bias."""
    if factor.bias is None:
        return {name: diagonal(factor, sign)}
    return {name: diagonal(factor, sign), factor.bias: diagonal(factor.of_bias(), sign)}


def gradient_moments(factor: Factor) -> tuple[Tensor, Tensor]:
    """``sum_n J[n]`` and ``sum_n J[n]^2`` elementwise, in float64 and the parameter's shape (V = 1)."""
    if factor.input is None:
        J = factor.jacobian()[0].double()
        first, second = J.sum(0), J.square().sum(0)
    elif factor.positions == 1 and factor.a is not None:
        g, a = factor.g[0, :, 0].double(), factor.a[:, 0].double()
        first, second = g.T @ a, g.square().T @ a.square()
        if factor.transposed:
            first, second = first.T, second.T
    else:
        first = second = torch.zeros((), dtype=torch.float64, device=factor.g.device)
        for _, J in jacobian_chunks(factor, CACHE_ELEMENTS):
            wide = J[0].double()
            first, second = first + wide.sum(0), second + wide.square().sum(0)
    first, second = first.reshape(-1), second.reshape(-1)
    return factor.spread(first, (0,)).reshape(factor.shape), factor.spread(second, (0,)).reshape(factor.shape)


def jacobian_chunks(factor: Factor, elements: int) -> Iterator[tuple[slice, Tensor]]:
    """Jacobians [V, n, size] of consecutive samples, each of at most ``elements`` entries where one sample fits."""
    V, N = factor.g.shape[:2]
    step = samples_per_chunk(V * factor.size, elements)
    for start in range(0, N, step):
        yield slice(start, start + step), factor.samples(start, start + step).jacobian()
