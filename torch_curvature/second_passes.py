"""Second derivatives of the loss of one captured batch, in activation space.

Let ``L`` be the loss, ``z_e`` the output of a layer (an edge of the graph) and ``g_e = dL/dz_e``.  One backward pass
that is itself differentiable gives every ``g_e``; pulling unit vectors at ``g_f`` back gives ``d2 L / dz_f dz_e`` for
all samples at once, with as many passes as ``z_f`` has entries per sample, instead of one per parameter.

The loss enters through its closed forms: with its gradient ``c`` at the network's outputs u held fixed, the second
derivatives are those of ``c . u``: the residual.  What ``c`` changes by is the Gauss-Newton part, ``J^T h_L J``.

    H v = d(J^T c)/dw v  at fixed c   +   J^T h_L (J v),       J v = d(v . J^T c)/dc
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from .backprop import Backpropagation
from .capture import Capture
from .nodes import known_graph, pull_back
from .plan import working_dtype

Roots = Sequence[Tensor]

BREAK = "Error"  # the node that stands for a missing derivative


class SecondPasses:
    """Second derivatives of ``scale`` times the loss of one batch.

    Args:
        backpropagation: of the captured batch; its graph is kept.
        bound: the loss, bound to the outputs.
        scale: factor of the loss.
        limit: bytes that columns in flight may take.
        explain: makes a clear error of one that autograd raised, or None.
    """

    def __init__(
        self,
        backpropagation: Backpropagation,
        bound: Any,
        scale: float,
        limit: int,
        explain: Callable[[Exception], Exception | None] = lambda error: None,
    ) -> None:
        self.pass_ = backpropagation
        self.captured: Capture = backpropagation.captured
        self.parameters: dict[str, nn.Parameter] = backpropagation.parameters
        self.bound = bound
        self.scale = scale
        self.limit = limit
        self.explain = explain
        outputs = self.captured.outputs
        dtypes = [outputs.dtype, *(p.dtype for p in self.parameters.values())]
        self.dtype = working_dtype(max(dtypes, key=lambda dtype: dtype.itemsize))  # of all that is contracted
        self.cotangent = (bound.gradient() * scale).to(outputs.dtype).detach().requires_grad_()
        self._places: dict[int, Tensor | None] = {}
        self._widths: dict[int, int] = {}
        # All columns at once; a way that fails is not tried again.
        self._ways: list[Callable[..., Sequence[Tensor | None]]] = [_mapped, partial(_backward, batched=True)]

    @cached_property
    def kinds(self) -> frozenset[str | type]:
        """Kinds of nodes that the outputs and the first derivatives were made by.

        Where `BREAK` is among them, a function of the model declares that it can be differentiated once only:
        autograd would take its first derivative for a constant without a word. Known nodes have a derivative each.
        """
        nodes = None if self.captured.record.hooked else known_graph(self.captured.outputs)
        if nodes is not None:
            return frozenset(node.name() for node in nodes)
        edges, gradients = self._first
        return kinds_of_nodes([self.captured.outputs, *edges, *gradients.values()])

    @cached_property
    def _first(self) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """``g`` at every edge and the gradient of every parameter, both with their graphs."""
        edges = self.captured.record.edges
        inputs: list[Any] = [*edges, *self.parameters.values()]
        with torch.enable_grad():
            found = torch.autograd.grad(
                self.captured.outputs,
                inputs,
                self.cotangent,
                create_graph=True,
                allow_unused=True,
            )
        gradients = {n: g for n, g in zip(self.parameters, found[len(edges) :]) if g is not None}
        return list(found[: len(edges)]), gradients

    # ------------------------------------------------------------------ backward passes

    def columns_at_once(self, entries: int) -> int:
        """Columns of ``entries`` numbers each, with what a pass through the whole graph takes beside."""
        size = self.captured.outputs.element_size()
        return max(1, self.limit // (8 * self.pass_.column_bytes() + 4 * entries * size))

    def pull(self, roots: Roots, inputs: Sequence[Any], vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """Columns [K, *root] pulled back to [K, *input], None where nothing arrives."""
        live = [i for i, root in enumerate(roots) if root.requires_grad]
        roots, vectors = [roots[i] for i in live], [vectors[i] for i in live]
        if not roots:
            return [None] * len(inputs)
        K = vectors[0].shape[0]
        while K > 1 and self._ways:
            try:
                return list(self._ways[0](roots, inputs, vectors))
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                del self._ways[0]
        try:
            each = [_backward(roots, inputs, [v[k] for v in vectors], False) for k in range(K)]
        except (RuntimeError, NotImplementedError) as error:
            clear = self.explain(error)
            if clear is None:
                raise
            raise clear from error
        if K == 1:
            return [None if d is None else d.unsqueeze(0) for d in each[0]]
        return [None if ds[0] is None else torch.stack([d for d in ds if d is not None]) for ds in zip(*each)]

    def pull_once(self, root: Tensor, inputs: Sequence[Any], columns: Tensor) -> Sequence[Tensor | None]:
        """Columns [K, *root] at a tensor of the forward pass pulled back to earlier edges."""
        if self.pass_.plan.by_nodes and not self.captured.record.hooked:
            found = pull_back(root, inputs, columns)
            if found is not None:
                return found
        return self.pull([root], inputs, [columns])

    def pull_twice(
        self, roots: Roots, inputs: Sequence[Any], vectors: Sequence[Tensor], curved: bool
    ) -> list[Tensor | None]:
        """Columns at first derivatives (``roots``) pulled back; with the Gauss-Newton part where ``curved``."""
        if not curved:
            return self.pull(roots, inputs, vectors)
        moved, *found = self.pull(roots, [self.cotangent, *inputs], vectors)
        if moved is None:
            return found
        outputs = self.captured.outputs
        bent = (self.bound.hessian_product(moved) * self.scale).to(outputs.dtype)
        return [_sum(x, y) for x, y in zip(found, self.pull([outputs], inputs, [bent]))]

    def products(self, directions: dict[str, Tensor], names: Sequence[str], curved: bool) -> dict[str, Tensor]:
        """Rows ``names`` of the matrix times {name: [K, *shape]} (zero where left out): {name: [K, p]}."""
        gradients = self._first[1]
        given = [n for n in directions if n in gradients]
        vectors = [directions[n].to(gradients[n].dtype) for n in given]
        K = next(iter(directions.values())).shape[0]
        found = self.pull_twice([gradients[n] for n in given], [self.parameters[n] for n in names], vectors, curved)
        result = {}
        for name, d in zip(names, found):
            p = self.parameters[name]
            dtype = working_dtype(p.dtype)
            result[name] = p.new_zeros(K, p.numel(), dtype=dtype) if d is None else d.reshape(K, -1).to(dtype)
        return result

    # ------------------------------------------------------------------ edges

    @cached_property
    def edges(self) -> list[int]:
        """Those of parameters with a closed rule, in order of execution."""
        uses = self.captured.record.uses
        return sorted({uses[i].edge for indices in self.pass_.plan.closed.values() for i in indices})

    def width(self, edge: int) -> int:
        """Entries of a layer's output that belong to one sample."""
        if edge not in self._widths:
            self._widths[edge] = self._shape(edge).numel() // self.captured.samples
        return self._widths[edge]

    def _shape(self, edge: int) -> torch.Size:
        return next(u.output_shape for u in self.captured.record.uses if u.edge == edge)

    def places(self, edge: int) -> Tensor | None:
        """[N, Z] flat places in z of each sample's entries, in the order (s, o); None for z itself."""
        if edge not in self._places:
            plan, uses = self.pass_.plan, self.captured.record.uses
            index = next(i for i in plan.layouts if uses[i].edge == edge)
            if plan.layouts[index].in_order:
                self._places[edge] = None
                return None
            recorded, N = uses[index], self.captured.samples
            shape, axes = recorded.output_shape, recorded.use.batch_axes
            flat = torch.arange(shape.numel(), device="cpu")  # shapes alone decide: nothing to wait for on a GPU
            rows = flat.view(shape[:axes].numel(), 1, -1)
            arranged = plan.layouts[index].arrange(rows, shape[:axes], N, 0).reshape(N, -1)
            whole = torch.equal(arranged.reshape(-1), flat)
            self._places[edge] = None if whole else arranged.to(self.captured.outputs.device)
        return self._places[edge]

    def read(self, edge: int, derivative: Tensor) -> Tensor:
        """[V, *z] -> [V, N, Z]."""
        places, V = self.places(edge), derivative.shape[0]
        derivative = derivative.to(self.dtype).reshape(V, -1)
        if places is None:
            return derivative.view(V, self.captured.samples, -1)
        return derivative[:, places]

    def write(self, edge: int, values: Tensor) -> Tensor:
        """[V, N, Z] -> [V, *z]."""
        places, shape = self.places(edge), self._shape(edge)
        if places is None:
            return values.reshape(values.shape[0], *shape)
        flat = values.new_zeros(values.shape[0], shape.numel())
        flat[:, places] = values
        return flat.view(values.shape[0], *shape)

    def gradient(self, edge: int) -> Tensor | None:
        """``g`` [1, *z] at an edge, detached."""
        g = self._first[0][edge]
        return None if g is None else g.detach().unsqueeze(0)

    def units(self, edge: int, start: int, stop: int) -> Tensor:
        """Unit vectors [stop - start, *z], the same entry in every sample."""
        N, Z = self.captured.samples, self.width(edge)
        unit = torch.zeros(stop - start, 1, Z, device=self.captured.outputs.device, dtype=self.captured.outputs.dtype)
        unit[:, 0].diagonal(start).fill_(1)
        return self.write(edge, unit.expand(-1, N, -1))

    def hessians(self, edge: int, others: Sequence[int], curved: bool) -> dict[int, Tensor]:
        """{e: [N, Z_edge, Z_e]}: second derivatives of the loss with respect to two layers' outputs.

        Pairs that vanish identically are left out.
        """
        root = self._first[0][edge]
        if root is None or not others or (root.grad_fn is None and not curved):
            return {}
        edges, N, Z = self.captured.record.edges, self.captured.samples, self.width(edge)
        step = self.columns_at_once(sum(self.width(e) for e in others) * N)
        found: dict[int, Tensor] = {}
        for start in range(0, Z, step):
            stop = min(Z, start + step)
            seeds = self.units(edge, start, stop).to(root.dtype)
            pulled = self.pull_twice([root], [edges[e] for e in others], [seeds], curved)
            for e, d in zip(others, pulled):
                if d is None:
                    continue
                part = self.read(e, d).transpose(0, 1)
                if start == 0 and stop == Z:
                    found[e] = part
                else:
                    if e not in found:
                        found[e] = part.new_zeros(N, Z, self.width(e))
                    found[e][:, start:stop] = part
        return found

    def residual_diagonal(self, edge: int) -> Tensor | None:
        """[N, Z]: second derivatives by each entry of a layer's output alone, without the Gauss-Newton part.

        None where they vanish identically.
        """
        root, Z = self._first[0][edge], self.width(edge)
        if root is None or root.grad_fn is None:
            return None
        step = self.columns_at_once(Z * self.captured.samples)
        parts: list[Tensor] = []
        for start in range(0, Z, step):
            stop = min(Z, start + step)
            seeds = self.units(edge, start, stop).to(root.dtype)
            (pulled,) = self.pull([root], [self.captured.record.edges[edge]], [seeds])
            if pulled is not None:
                own = self.read(edge, pulled)  # [stop - start, N, Z]
                parts.append(own[:, :, start:stop].diagonal(dim1=0, dim2=2))
        return torch.cat(parts, 1) if parts else None


def _backward(roots: Roots, inputs: Sequence[Any], columns: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
    return torch.autograd.grad(
        list(roots), list(inputs), list(columns), retain_graph=True, allow_unused=True, is_grads_batched=batched
    )


def _mapped(roots: Roots, inputs: Sequence[Any], columns: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """All columns at once by torch.func: it has rules for more functions than autograd's own batching."""
    reached: list[bool] = []

    def one(*column: Tensor) -> tuple[Tensor, ...]:
        found = _backward(roots, inputs, column, False)
        reached[:] = [d is not None for d in found]
        return column[0].new_zeros(()), *[d for d in found if d is not None]  # vmap wants some result

    _, *arrived = torch.func.vmap(one)(*columns)
    rest = iter(arrived)
    return [next(rest) if there else None for there in reached]


def kinds_of_nodes(tensors: Sequence[Tensor | None]) -> frozenset[str | type]:
    """Kinds of the nodes in the graphs of the tensors: torch's own by name, a user's function by its class."""
    waiting = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen = set(waiting)
    kinds: set[str | type] = set()
    while waiting:
        node = waiting.pop()
        kind = type(node)
        kinds.add(kind if issubclass(kind, BackwardCFunction) else kind.__name__)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    return frozenset(kinds)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y
