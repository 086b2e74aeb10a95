"""Products with the network's Jacobian: ``J v`` by the graph's nodes or in forward mode, ``J^T u`` backwards."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from . import nodes
from .backprop import Backpropagation
from .capture import Capture, capture, every_module, observation
from .chain_products import product_chain
from .ops.routing import without_autocast
from .plan import working_dtype
from .recorder import Recorder
from .trust import proven

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]

# Models in whose graph a node was found that is not known: their tangents are carried along with the forward pass.
FORWARD_MODE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Whether the graph's nodes gave what autograd gives for ``J^T u``, by what the model was called with; None
# where both vanished, which shows nothing.
BY_NODES: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool | None]] = weakref.WeakKeyDictionary()


class TangentRecorder(Recorder):
    """Hands every function that receives a parameter the parameter with its tangent; records nothing."""

    def __init__(self, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]) -> None:
        super().__init__({})
        self.duals = {
            id(p): forward_ad.make_dual(p, tangents[name].reshape(p.shape).to(p.dtype))
            for name, p in parameters.items()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: self._with_tangents(value) for key, value in kwargs.items()} if kwargs else {}
        return super().__torch_function__(func, types, tuple(self._with_tangents(x) for x in args), kwargs)

    def _with_tangents(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.duals.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._with_tangents(x) for x in value)
        if type(value) is dict:
            return {key: self._with_tangents(x) for key, x in value.items()}
        return value


@functools.cache
def _load_forward_mode() -> None:
    """What torch loads on first use; it warns of its own use of ``torch.jit`` then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def push_forward(
    model: nn.Module, forward: Forward, batch: Any, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]
) -> tuple[Capture, Tensor]:
    """One pass that gives the outputs, attached to the graph, and ``J v`` of the outputs' shape."""
    if model not in FORWARD_MODE:
        captured = capture(model, forward, batch, parameters, Recorder({}))
        chain = captured.cache["chain"] = product_chain(captured.outputs, parameters)
        if chain is not None:
            dtype = captured.outputs.dtype
            given = {id(p): tangents[name].reshape(p.shape).to(dtype) for name, p in parameters.items()}
            return captured, chain.ahead(given)
        with without_autocast(captured.outputs):
            by_nodes = nodes.push_forward(captured.outputs, parameters, tangents)
        if by_nodes is not None:
            return captured, by_nodes
        FORWARD_MODE.add(model)
    _load_forward_mode()
    try:
        with observation(every_module(model)), forward_ad.dual_level():
            captured = capture(model, forward, batch, parameters, TangentRecorder(parameters, tangents))
            captured.outputs, tangent = forward_ad.unpack_dual(captured.outputs)
            tangent = torch.zeros_like(captured.outputs) if tangent is None else tangent.detach()
        return captured, tangent
    except NotImplementedError:  # a function of the model has no forward-mode derivative
        pass
    captured = capture(model, forward, batch, parameters)
    try:
        return captured, double_backward_product(captured, parameters, tangents)
    except (NotImplementedError, RuntimeError):  # nor a second one
        return captured, column_product(model, forward, captured, parameters, tangents)


def column_product(
    model: nn.Module,
    forward: Forward,
    captured: Capture,
    parameters: dict[str, nn.Parameter],
    tangents: dict[str, Tensor],
) -> Tensor:
    """``J v`` from the rows of J, one backward pass for each output."""
    backpropagation = Backpropagation(model, parameters, captured, forward)
    outputs = captured.outputs
    N, C = outputs.shape[0], outputs[0].numel()
    product = torch.zeros(N, C, dtype=working_dtype(outputs.dtype), device=outputs.device)
    for c in range(C):
        column = torch.zeros_like(outputs).view(N, C)
        column[:, c] = 1
        for name, factor in backpropagation.factors(column.view(1, *outputs.shape)).items():
            vector = tangents[name].reshape(-1, 1).to(factor.g.dtype)
            product[:, c] += factor.apply(vector)[0, :, 0]
    return product.view(outputs.shape)


def double_backward_product(
    captured: Capture, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]
) -> Tensor:
    """``J v`` as the derivative of ``v . (J^T u)`` with respect to u, which does not depend on u."""
    with without_autocast(captured.outputs):
        return _double_backward_product(captured.outputs, parameters, tangents)


def _double_backward_product(
    outputs: Tensor, parameters: dict[str, nn.Parameter], tangents: dict[str, Tensor]
) -> Tensor:
    u = torch.zeros_like(outputs).requires_grad_()
    pulled = torch.autograd.grad(
        outputs, list(parameters.values()), u, create_graph=True, retain_graph=True, allow_unused=True
    )
    pairs = [(g, tangents[n]) for n, g in zip(parameters, pulled) if g is not None and g.requires_grad]
    if not pairs:
        return torch.zeros_like(outputs)
    directions = [t.reshape(g.shape).to(g.dtype) for g, t in pairs]
    (product,) = torch.autograd.grad([g for g, _ in pairs], u, directions, retain_graph=True)
    return product.detach()


def pull_back(
    model: nn.Module, captured: Capture, parameters: dict[str, nn.Parameter], u: Tensor, dtype: torch.dtype
) -> Tensor:
    """``J^T u``, [P], for u of the outputs' shape."""
    outputs = captured.outputs
    u = u.to(outputs.dtype)
    with without_autocast(u):
        known = BY_NODES.setdefault(model, {})
        key = (outputs.shape, outputs.dtype, *(id(p) for p in parameters.values()))
        pulled = None if known.get(key) is False else _pulled_by_nodes(captured, parameters, u)
        if pulled is None or not known.get(key):
            ours = pulled
            pulled = torch.autograd.grad(outputs, list(parameters.values()), u, retain_graph=True, allow_unused=True)
            if ours is not None:
                known[key] = proven(ours, pulled)
    pieces = []
    for p, g in zip(parameters.values(), pulled):
        if g is None:
            pieces.append(torch.zeros(p.numel(), dtype=dtype, device=p.device))
        else:
            pieces.append((g.to_dense() if g.is_sparse else g).reshape(-1).to(dtype))
    return torch.cat(pieces)


def _pulled_by_nodes(
    captured: Capture, parameters: dict[str, nn.Parameter], u: Tensor
) -> Sequence[Tensor | None] | None:
    """By the graph's nodes; None where autograd must do it."""
    if captured.record.hooked or any(p._backward_hooks for p in parameters.values()):
        return None
    chain = captured.cache.get("chain")
    if chain is not None:
        sums = chain.back(u)
        return [sums.get(id(p)) for p in parameters.values()]
    graph = nodes.known_graph(captured.outputs)
    if graph is None or not any(node.name() in nodes.SPATIAL for node in graph):
        return None  # small operators take autograd's engine less time
    leaves = {id(node.variable): GradientEdge(node, 0) for node in graph if node.name() == nodes.LEAF}
    used = [leaves[id(p)] for p in parameters.values() if id(p) in leaves]
    pulled = nodes.pull_back(captured.outputs, used, u.unsqueeze(0))
    if pulled is None:
        return None
    found = iter(pulled)
    columns = [next(found) if id(p) in leaves else None for p in parameters.values()]
    return [None if g is None else g[0] for g in columns]
