"""The peers, each by the call that its documentation gives for the quantity; see ``ours`` for what a contestant is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from . import problems
from .ours import Contestant, _blocks, _dense, _flat, factors
from .problems import LOSS, Problem


def _loader(p: Problem) -> DataLoader:
    return DataLoader(TensorDataset(p.x, p.y), batch_size=len(p.x))


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


# ---------------------------------------------------------------------- BackPACK


def _backpack(p: Problem, extension, attribute: str, combine) -> Contestant:
    from backpack import backpack, extend

    model, loss = extend(p.copy()), extend(nn.CrossEntropyLoss())

    def run() -> dict:
        model.zero_grad()
        with backpack(extension):
            loss(model(p.x), p.y).backward()
        return {n: getattr(q, attribute) for n, q in model.named_parameters()}

    return lambda: combine(run()), lambda r: r


def backpack_diagonal(p: Problem) -> Contestant:
    from backpack.extensions import DiagGGNExact

    return _backpack(p, DiagGGNExact(), "diag_ggn_exact", lambda found: _flat(p, found))


def backpack_norms(p: Problem) -> Contestant:
    from backpack.extensions import BatchL2Grad

    return _backpack(p, BatchL2Grad(), "batch_l2", lambda found: sum(found.values()).sqrt())


def backpack_gram(p: Problem) -> Contestant:
    from backpack.extensions import BatchGrad

    return _backpack(
        p, BatchGrad(), "grad_batch", lambda found: sum(g.flatten(1) @ g.flatten(1).T for g in found.values())
    )


def backpack_kronecker(p: Problem) -> Contestant:
    from backpack.extensions import KFLR

    run, _ = _backpack(p, KFLR(), "kflr", lambda found: found)

    def canonical(found: dict) -> Tensor:
        pairs = {}
        for name in problems.weights(p):
            B, A = found[name]
            pairs[name.rpartition(".")[0]] = (A, B)
        return factors(p, pairs)

    return run, canonical


# ---------------------------------------------------------------------- curvlinops


def _curvlinops(p: Problem, kind: str, parameters: list[nn.Parameter]):
    import curvlinops

    return getattr(curvlinops, kind)(p.model, LOSS, parameters, [(p.x, p.y)], check_deterministic=False)


def curvlinops_blocks(p: Problem) -> Contestant:
    def run() -> dict[str, Tensor]:
        found = {}
        for name, q in p.model.named_parameters():
            found[name] = _curvlinops(p, "GGNLinearOperator", [q]) @ torch.eye(q.numel(), device=q.device)
        return found

    return run, lambda r: _blocks(p, r)


def _curvlinops_dense(p: Problem, kind: str) -> Contestant:
    operator = _curvlinops(p, kind, _parameters(p.model))
    return lambda: operator @ torch.eye(p.size, device=p.x.device), lambda r: _dense(p, r)


def curvlinops_dense(p: Problem) -> Contestant:
    return _curvlinops_dense(p, "GGNLinearOperator")


def curvlinops_hessian(p: Problem) -> Contestant:
    return _curvlinops_dense(p, "HessianLinearOperator")


def curvlinops_product(p: Problem) -> Contestant:
    v, operator = p.probes(p.size)[:, 0].to(p.x.dtype), _curvlinops(p, "GGNLinearOperator", _parameters(p.model))
    return lambda: operator @ v, lambda r: r


def curvlinops_kronecker(p: Problem) -> Contestant:
    from curvlinops import FisherType, KFACLinearOperator

    def run():
        operator = KFACLinearOperator(
            p.model, LOSS, _parameters(p.model), [(p.x, p.y)], check_deterministic=False,
            fisher_type=FisherType.TYPE2, num_per_example_loss_terms=1, num_data=len(p.x),
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    def canonical(operator) -> Tensor:
        return factors(p, {n: (operator._input_covariances[n], B) for n, B in operator._gradient_covariances.items()})

    return run, canonical


# ---------------------------------------------------------------------- nngeometry


def _nngeometry(p: Problem, representation: str):
    from nngeometry import object as objects
    from nngeometry.metrics import FIM

    loader = _loader(p)
    return lambda: FIM(p.model, loader, getattr(objects, representation), "classif_logits", device=p.x.device)


def nngeometry_blocks(p: Problem) -> Contestant:
    def canonical(matrix) -> Tensor:
        found = {}
        for name in problems.weights(p):
            layer = next(k for k in matrix.data if k.split(".")[0] == name.rpartition(".")[0])
            size = p.model.get_parameter(name).numel()
            found[name] = matrix.data[layer][:size, :size]
        return _blocks(p, found)

    return _nngeometry(p, "PMatBlockDiag"), canonical


def nngeometry_dense(p: Problem) -> Contestant:
    return _nngeometry(p, "PMatDense"), lambda r: _dense(p, r.to_torch())


def nngeometry_diagonal(p: Problem) -> Contestant:
    return _nngeometry(p, "PMatDiag"), lambda r: r.get_diag()


def nngeometry_kronecker(p: Problem) -> Contestant:
    def canonical(matrix) -> Tensor:
        return factors(p, {k.split(".")[0]: (pair[0], pair[1]) for k, pair in matrix.data.items()})

    return _nngeometry(p, "PMatKFAC"), canonical


def nngeometry_kernel(p: Problem) -> Contestant:
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import FMatDense

    loader = _loader(p)

    def run():
        generator = TorchHooksJacobianBackend(
            layer_collection=LayerCollection.from_model(p.model), model=p.model, function=lambda *d: p.model(d[0])
        )
        return FMatDense(generator=generator, examples=loader)

    return run, lambda r: r.data.permute(1, 0, 3, 2).reshape(len(p.x) * 10, -1)


# ---------------------------------------------------------------------- ASDL


def _asdl(p: Problem, shape: str):
    from asdl.fisher import FisherConfig, get_fisher_maker

    model = p.copy()

    def run() -> nn.Module:
        config = FisherConfig(
            fisher_type="fisher_exact", fisher_shapes=[shape], loss_type="cross_entropy", data_size=len(p.x)
        )
        maker = get_fisher_maker(model, config)
        maker.setup_model_call(model, p.x)
        maker.forward_and_backward()
        return model

    return run, model


def asdl_blocks(p: Problem) -> Contestant:
    run, _ = _asdl(p, "layer_wise")

    def canonical(model: nn.Module) -> Tensor:
        found = {}
        for name in problems.weights(p):
            size = p.model.get_parameter(name).numel()
            found[name] = model.get_submodule(name.rpartition(".")[0]).fisher.data[:size, :size]
        return _blocks(p, found)

    return run, canonical


def asdl_diagonal(p: Problem) -> Contestant:
    run, _ = _asdl(p, "diag")

    def canonical(model: nn.Module) -> Tensor:
        found = {}
        for name in p.names:
            layer, _, kind = name.rpartition(".")
            found[name] = getattr(model.get_submodule(layer).fisher.diag, kind)
        return _flat(p, found)

    return run, canonical


def asdl_kronecker(p: Problem) -> Contestant:
    run, _ = _asdl(p, "kron")

    def canonical(model: nn.Module) -> Tensor:
        found = {}
        for name in problems.weights(p):
            layer = name.rpartition(".")[0]
            kron = model.get_submodule(layer).fisher.kron
            found[layer] = (kron.A, kron.B)
        return factors(p, found)

    return run, canonical


def asdl_kernel(p: Problem) -> Contestant:
    from asdl.kernel import empirical_direct_ntk

    return lambda: empirical_direct_ntk(p.model, p.x), lambda r: r.permute(0, 2, 1, 3).reshape(len(p.x) * 10, -1)


# ---------------------------------------------------------------------- laplace-torch, opacus, hessian-eigenthings


def laplace_dense(p: Problem) -> Contestant:
    from laplace.curvature import CurvlinopsGGN

    backend = CurvlinopsGGN(p.copy(), "classification")
    scale = 1 / len(p.x)
    return lambda: backend.full(p.x, p.y, N=len(p.x))[1], lambda r: _dense(p, r * scale)


def laplace_asdl_dense(p: Problem) -> Contestant:
    from laplace.curvature import AsdlGGN

    backend = AsdlGGN(p.copy(), "classification")
    scale = 1 / len(p.x)
    return lambda: backend.full(p.x, p.y)[1], lambda r: _dense(p, r * scale)


def laplace_diagonal(p: Problem) -> Contestant:
    from laplace.curvature import AsdlGGN

    backend = AsdlGGN(p.copy(), "classification")
    scale = 1 / len(p.x)
    return lambda: backend.diag(p.x, p.y)[1], lambda r: r * scale


def opacus_norms(p: Problem) -> Contestant:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    model = GradSampleModuleFastGradientClipping(p.copy(), max_grad_norm=1.0, use_ghost_clipping=True)

    def run() -> Tensor:
        model.zero_grad()
        LOSS(model(p.x), p.y).backward()
        return model.get_norm_sample()

    return run, lambda r: r / len(p.x)


def eigenthings_product(p: Problem) -> Contestant:
    from hessian_eigenthings.operators.ggn import GGNOperator

    v = p.probes(p.size)[:, 0].to(p.x.dtype)
    operator = GGNOperator(p.model, [(p.x, p.y)], lambda m, b: m(b[0]), lambda z, b: LOSS(z, b[1]))
    return lambda: operator.matvec(v), lambda r: r
