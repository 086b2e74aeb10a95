"""Blocks of the Hessian: the reference, and how the peers get the Hessian, dense and by blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

from . import problems
from .ours import Contestant, _blocks, _dense
from .peers import _curvlinops, _loader
from .problems import LOSS, Problem


def reference_blocks(p: Problem) -> Tensor:
    """Each weight's block times probes, by reverse mode twice."""
    found = []
    for name in problems.weights(p):
        q = p.model.get_parameter(name)
        (first,) = torch.autograd.grad(LOSS(p.model(p.x), p.y), q, create_graph=True)
        for v in p.probes(q.numel()).T:
            (second,) = torch.autograd.grad(first.reshape(-1) @ v, q, retain_graph=True)
            found.append(second.reshape(-1))
    return torch.cat(found)


def _each_parameter(p: Problem, derivative) -> Contestant:
    """``derivative(loss, vector)`` for each parameter alone, the others fixed."""
    parameters = {n: q.detach() for n, q in p.model.named_parameters()}

    def run() -> dict[str, Tensor]:
        found = {}
        for name, q in parameters.items():
            others = {n: x for n, x in parameters.items() if n != name}

            def loss(w: Tensor, name: str = name, q: Tensor = q, others: dict[str, Tensor] = others) -> Tensor:
                return LOSS(functional_call(p.model, {**others, name: w.view_as(q)}, (p.x,)), p.y)

            found[name] = derivative(loss, q.reshape(-1))
        return found

    return run, lambda r: _blocks(p, r)


def func_blocks(p: Problem) -> Contestant:
    return _each_parameter(p, lambda loss, w: hessian(loss)(w))


def chunked_blocks(p: Problem) -> Contestant:
    return _each_parameter(p, lambda loss, w: jacrev(grad(loss), chunk_size=256)(w))


def curvlinops_blocks(p: Problem) -> Contestant:
    def run() -> dict[str, Tensor]:
        found = {}
        for name, q in p.model.named_parameters():
            found[name] = _curvlinops(p, "HessianLinearOperator", [q]) @ torch.eye(q.numel(), device=q.device)
        return found

    return run, lambda r: _blocks(p, r)


def nngeometry_dense(p: Problem) -> Contestant:
    from nngeometry import Hessian
    from nngeometry.object import PMatDense

    loader = _loader(p)
    return lambda: Hessian(p.model, loader, PMatDense, function=LOSS), lambda r: _dense(p, r.to_torch())


def _asdl(p: Problem, shape: str):
    from asdl.hessian import HessianConfig, HessianMaker

    model = p.copy()

    def run() -> nn.Module:
        maker = HessianMaker(model, HessianConfig(hessian_shapes=[shape]))
        maker.setup_loss_call(LOSS, maker.setup_model_call(model, p.x), p.y)
        maker.forward_and_backward()
        return model

    return run


def asdl_dense(p: Problem) -> Contestant:
    return _asdl(p, "full"), lambda r: _dense(p, r.hessian.data)


def asdl_blocks(p: Problem) -> Contestant:
    def canonical(model: nn.Module) -> Tensor:
        found = {}
        for name in problems.weights(p):
            size = p.model.get_parameter(name).numel()
            found[name] = model.get_submodule(name.rpartition(".")[0]).hessian.data[:size, :size]
        return _blocks(p, found)

    return _asdl(p, "layer_wise"), canonical
