"""This package, and the same in plain torch operations as one would write them by hand.

A contestant is made for a problem and gives ``(run, canonical)``: ``run()`` is timed, ``canonical(result)`` brings its
result into the form of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import torch_curvature as tc

from . import problems
from .problems import LOSS, Problem

Contestant = tuple[Callable[[], Any], Callable[[Any], Tensor]]


def _flat(p: Problem, pieces: dict[str, Tensor]) -> Tensor:
    return torch.cat([pieces[n].reshape(-1) for n in p.names])


def _blocks(p: Problem, blocks: dict[str, Tensor]) -> Tensor:
    found = []
    for name in problems.weights(p):
        block = blocks[name].double()
        found += list((block @ p.probes(block.shape[1])).T)
    return torch.cat(found)


def _dense(p: Problem, matrix: Tensor) -> Tensor:
    return matrix.double() @ p.probes(p.size)


# ---------------------------------------------------------------------- this package


def blocks(p: Problem) -> Contestant:
    return lambda: tc.GaussNewton(p.model, LOSS, (p.x, p.y)).blocks(), lambda r: _blocks(p, r)


def dense(p: Problem) -> Contestant:
    return lambda: tc.GaussNewton(p.model, LOSS, (p.x, p.y)).dense(), lambda r: _dense(p, r)


def diagonal(p: Problem) -> Contestant:
    return lambda: tc.GaussNewton(p.model, LOSS, (p.x, p.y)).diagonal(), lambda r: _flat(p, r)


def product(p: Problem) -> Contestant:
    v = p.probes(p.size)[:, 0].to(p.x.dtype)
    return lambda: tc.GaussNewton(p.model, LOSS, (p.x, p.y)) @ v, lambda r: r


def kernel(p: Problem) -> Contestant:
    return lambda: tc.Jacobian(p.model, p.x).gram(), lambda r: r.reshape(r.shape[0] * r.shape[1], -1)


def kronecker(p: Problem) -> Contestant:
    return lambda: tc.GaussNewton(p.model, LOSS, (p.x, p.y)).kronecker(), lambda r: factors(
        p, {n: (A, B) for n, (A, B) in r.items()}
    )


def hessian(p: Problem) -> Contestant:
    return lambda: tc.Hessian(p.model, LOSS, (p.x, p.y)).dense(), lambda r: _dense(p, r)


def hessian_blocks(p: Problem) -> Contestant:
    return lambda: tc.Hessian(p.model, LOSS, (p.x, p.y)).blocks(), lambda r: _blocks(p, r)


def _tracked(p: Problem, ask: Callable[[Any], Tensor], parameter_gradients: bool) -> Contestant:
    """A step of training, with the gradients of the parameters or without (which the peers cannot leave out)."""

    def run() -> Tensor:
        if parameter_gradients:  # else .grad is left as it is
            p.model.zero_grad()
        with tc.track(p.model, parameter_gradients=parameter_gradients) as t:
            LOSS(p.model(p.x), p.y).backward()
        return ask(t)

    return run, lambda r: r


def norms(p: Problem) -> Contestant:
    return lambda: tc.EmpiricalFisher(p.model, LOSS, (p.x, p.y)).gradient_norms(), lambda r: r / len(p.x)


def gram(p: Problem) -> Contestant:
    return lambda: tc.EmpiricalFisher(p.model, LOSS, (p.x, p.y)).gram(), lambda r: r / len(p.x)


def tracked_norms(p: Problem) -> Contestant:
    return _tracked(p, lambda t: t.gradient_norms(), False)


def tracked_gram(p: Problem) -> Contestant:
    return _tracked(p, lambda t: t.gradient_gram(), False)


def norms_of_step(p: Problem) -> Contestant:
    return _tracked(p, lambda t: t.gradient_norms(), True)


def gram_of_step(p: Problem) -> Contestant:
    return _tracked(p, lambda t: t.gradient_gram(), True)


def factors(p: Problem, found: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Kronecker factors of the weights, each scaled to trace one: libraries put the scale in one or the other."""
    pieces = []
    for name in problems.weights(p):
        A, B = found[name.rpartition(".")[0]]
        weight = p.model.get_parameter(name)
        I = weight[0].numel()
        for factor in (A[:I, :I], B):
            pieces.append((factor / factor.diagonal().sum()).reshape(-1))
    return torch.cat(pieces)


# ---------------------------------------------------------------------- plain torch


class Captured:
    """Inputs and outputs of the layers with weights, kept by hooks in one forward pass."""

    def __init__(self, p: Problem) -> None:
        self.layers: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        hooks = []
        for name, module in p.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
                keep = lambda m, i, o, name=name: self.layers.append((name, m, i[0].detach(), o))  # noqa: E731
                hooks.append(module.register_forward_hook(keep))
        self.outputs = p.model(p.x)
        for hook in hooks:
            hook.remove()

    def gradients(self, columns: Tensor) -> list[Tensor]:
        """Derivatives of each column [V, N, C] with respect to the layers' outputs."""
        outs = [o for *_, o in self.layers]
        if len(columns) == 1:
            found = torch.autograd.grad(self.outputs, outs, columns[0])
            return [g.unsqueeze(0) for g in found]
        return list(torch.autograd.grad(self.outputs, outs, columns, is_grads_batched=True))

    def factors(self, columns: Tensor):
        """(name, module, a [N, S, I], g [V, N, S, O])."""
        for (name, module, a, _), g in zip(self.layers, self.gradients(columns)):
            if isinstance(module, nn.Conv2d):
                a = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride).mT
                g = g.flatten(3).mT
            elif a.dim() == 2:
                a, g = a.unsqueeze(1), g.unsqueeze(2)
            yield name, module, a, g

    def loss_columns(self) -> Tensor:
        """[C, N, C] with sum_v s s^T the Hessian of the mean cross entropy."""
        q = self.outputs.detach().softmax(1)
        root = torch.diag_embed(q.sqrt()) - q.unsqueeze(2) * q.sqrt().unsqueeze(1)
        return root.permute(2, 0, 1) / len(q) ** 0.5

    def loss_gradient(self, y: Tensor) -> Tensor:
        q = self.outputs.detach().softmax(1)
        return ((q - F.one_hot(y, q.shape[1])) / len(q)).unsqueeze(0)


def plain_blocks(p: Problem) -> Contestant:
    def run() -> dict[str, Tensor]:
        captured, found = Captured(p), {}
        for name, _, a, g in captured.factors(captured.loss_columns()):
            if a.shape[1] == 1:
                O, I, N = g.shape[3], a.shape[2], len(a)
                B = torch.einsum("vno,vnp->nop", g[:, :, 0], g[:, :, 0]).reshape(N, O * O)
                pairs = (a[:, 0, :, None] * a[:, 0, None, :]).reshape(N, I * I)
                found[name + ".weight"] = (B.T @ pairs).view(O, O, I, I).transpose(1, 2).reshape(O * I, O * I)
            else:
                J = (g.mT @ a).flatten(2).flatten(0, 1)
                found[name + ".weight"] = J.T @ J
            bias = g.sum(2).flatten(0, 1)
            found[name + ".bias"] = bias.T @ bias
        return found

    return run, lambda r: _blocks(p, r)


def plain_diagonal(p: Problem) -> Contestant:
    def run() -> dict[str, Tensor]:
        captured, found = Captured(p), {}
        for name, module, a, g in captured.factors(captured.loss_columns()):
            if a.shape[1] == 1:
                diagonal = g[:, :, 0].square().sum(0).T @ a[:, 0].square()
            else:
                diagonal = torch.zeros(g.shape[3], a.shape[2], dtype=a.dtype, device=a.device)
                for column in g:
                    for start in range(0, len(a), 8):
                        J = column[start : start + 8].mT @ a[start : start + 8]
                        diagonal += J.square_().sum(0)
            found[name + ".weight"] = diagonal.view_as(module.weight)
            found[name + ".bias"] = g.sum(2).square().sum((0, 1))
        return found

    return run, lambda r: _flat(p, r)


def _norm_parameters(module: nn.LayerNorm, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample gradients of a LayerNorm's weight and bias."""
    x = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    return (g[0] * x).sum(1), g[0].sum(1)


def plain_norms(p: Problem) -> Contestant:
    def run() -> Tensor:
        captured = Captured(p)
        total = torch.zeros(len(p.x), dtype=p.x.dtype, device=p.x.device)
        for _, module, a, g in captured.factors(captured.loss_gradient(p.y)):
            if isinstance(module, nn.LayerNorm):
                total += sum(x.square().sum(1) for x in _norm_parameters(module, a, g))
                continue
            (S, I), O = a.shape[1:], g.shape[3]
            if S == 1:
                total += g[0].square().sum((1, 2)) * a.square().sum((1, 2))
            elif S * (O + I) < O * I:
                total += (torch.bmm(a, a.mT) * torch.bmm(g[0], g[0].mT)).sum((1, 2))
            else:
                total += torch.bmm(g[0].mT, a).square().sum((1, 2))
            total += g[0].sum(1).square().sum(1)
        return total.sqrt()

    return run, lambda r: r


def plain_gram(p: Problem) -> Contestant:
    def run() -> Tensor:
        captured, N = Captured(p), len(p.x)
        total = torch.zeros(N, N, dtype=p.x.dtype, device=p.x.device)
        for _, module, a, g in captured.factors(captured.loss_gradient(p.y)):
            if isinstance(module, nn.LayerNorm):
                for x in _norm_parameters(module, a, g):
                    total += x @ x.T
                continue
            if a.shape[1] == 1:
                total += (g[0, :, 0] @ g[0, :, 0].T) * (a[:, 0] @ a[:, 0].T)
            else:
                J = torch.bmm(g[0].mT, a).flatten(1)
                total += J @ J.T
            bias = g[0].sum(1)
            total += bias @ bias.T
        return total

    return run, lambda r: r


def plain_kernel(p: Problem) -> Contestant:
    def run() -> Tensor:
        captured = Captured(p)
        N, C = captured.outputs.shape
        columns = torch.eye(C, dtype=p.x.dtype, device=p.x.device)[:, None].expand(C, N, C)
        total = torch.zeros(C * N, C * N, dtype=p.x.dtype, device=p.x.device)
        for _, _, a, g in captured.factors(columns):
            if a.shape[1] == 1:
                rows = g[:, :, 0].reshape(C * N, -1)
                total += (rows @ rows.T) * (a[:, 0] @ a[:, 0].T).repeat(C, C)
            else:
                J = (g.mT @ a).flatten(2).flatten(0, 1)
                total += J @ J.T
            bias = g.sum(2).flatten(0, 1)
            total += bias @ bias.T
        return total.view(C, N, C, N).permute(1, 0, 3, 2).reshape(N * C, N * C)

    return run, lambda r: r


def plain_kronecker(p: Problem) -> Contestant:
    def run() -> dict[str, tuple[Tensor, Tensor]]:
        captured, found = Captured(p), {}
        for name, _, a, g in captured.factors(captured.loss_columns()):
            rows, columns = a.flatten(0, 1), g.flatten(0, 2)
            found[name] = (rows.T @ rows, columns.T @ columns)
        return found

    return run, lambda r: factors(p, r)


def plain_product(p: Problem) -> Contestant:
    v = problems.split(p, p.probes(p.size)[:, 0].to(p.x.dtype).clone())
    parameters = {n: q.detach() for n, q in p.model.named_parameters()}

    def run() -> dict[str, Tensor]:
        f = lambda q: functional_call(p.model, q, (p.x,))  # noqa: E731
        outputs, back = vjp(f, parameters)
        u = jvp(f, (parameters,), (v,))[1]
        probability = outputs.softmax(1)
        u = probability * (u - (probability * u).sum(1, keepdim=True)) / len(p.x)
        return back(u)[0]

    return run, lambda r: _flat(p, r)
