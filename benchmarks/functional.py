"""torch.func as its documentation has it: gradients, kernels and Hessians by vmap, grad and jacrev."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

from . import problems
from .ours import Contestant, _dense
from .problems import LOSS, Problem


def func_gradients(p: Problem):
    parameters = {n: q.detach() for n, q in p.model.named_parameters()}
    loss = lambda q, x, y: LOSS(functional_call(p.model, q, (x[None],)), y[None]) / len(p.x)  # noqa: E731
    return lambda: vmap(grad(loss), (None, 0, 0))(parameters, p.x, p.y)


def func_norms(p: Problem) -> Contestant:
    gradients = func_gradients(p)
    return lambda: sum(g.flatten(1).square().sum(1) for g in gradients().values()).sqrt(), lambda r: r


def func_gram(p: Problem) -> Contestant:
    gradients = func_gradients(p)
    return lambda: sum(g.flatten(1) @ g.flatten(1).T for g in gradients().values()), lambda r: r


def func_kernel(p: Problem) -> Contestant:
    parameters = {n: q.detach() for n, q in p.model.named_parameters()}
    f = lambda q, x: functional_call(p.model, q, (x[None],))[0]  # noqa: E731

    def run() -> Tensor:
        J = vmap(jacrev(f), (None, 0))(parameters, p.x)
        return sum(j.flatten(2).flatten(0, 1) @ j.flatten(2).flatten(0, 1).T for j in J.values())

    return run, lambda r: r


def _flat_loss(p: Problem):
    start = torch.cat([q.detach().reshape(-1) for q in p.model.parameters()])
    return start, lambda w: LOSS(functional_call(p.model, problems.split(p, w), (p.x,)), p.y)


def func_hessian(p: Problem) -> Contestant:
    start, loss = _flat_loss(p)
    return lambda: hessian(loss)(start), lambda r: _dense(p, r)


def chunked_hessian(p: Problem) -> Contestant:
    start, loss = _flat_loss(p)
    return lambda: jacrev(grad(loss), chunk_size=256)(start), lambda r: _dense(p, r)
