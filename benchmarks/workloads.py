"""Every workload: its problem, its contestants, its reference, and what it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import functional, hessians, operators, ours, passes, peers, problems
from .counting import count, count_hessian, count_hessian_blocks, flops_of_passes
from .ours import Contestant
from .problems import Problem


@dataclass
class Case:
    """A workload on a device: makers of the contestants, the float64 reference, counted flops and bytes moved, and the
    ways of torch to make the passes through the model that the quantity is made of."""

    contestants: dict[str, Callable[[], Contestant]]
    reference: Callable[[], Tensor]
    flops: float
    bytes: float
    tolerance: float = 1e-3
    passes: dict[str, Callable[[], object]] = field(default_factory=dict)
    flops_of_passes: float = 0.0


@dataclass
class Workload:
    name: str
    title: str
    target: str  # ratio to the best other contestant of its kind that is aimed at
    build: Callable[[torch.device], Case]
    quick: bool = True  # small enough for --quick


OURS = "torch_curvature"
Maker = Callable[[Problem], Contestant]

QUANTITIES: dict[str, tuple[Callable[[Problem], Tensor], dict[str, Maker]]] = {
    "blocks": (
        problems.reference_blocks,
        {
            OURS: ours.blocks,
            "plain torch": ours.plain_blocks,
            "nngeometry": peers.nngeometry_blocks,
            "asdfghjkl": peers.asdl_blocks,
            "curvlinops": peers.curvlinops_blocks,
        },
    ),
    "dense": (
        problems.reference_dense,
        {
            OURS: ours.dense,
            "laplace (curvlinops)": peers.laplace_dense,
            "laplace (asdl)": peers.laplace_asdl_dense,
            "nngeometry": peers.nngeometry_dense,
            "curvlinops": peers.curvlinops_dense,
        },
    ),
    "diagonal": (
        problems.reference_diagonal,
        {
            OURS: ours.diagonal,
            "plain torch": ours.plain_diagonal,
            "BackPACK": peers.backpack_diagonal,
            "nngeometry": peers.nngeometry_diagonal,
            "asdfghjkl": peers.asdl_diagonal,
            "laplace (asdl)": peers.laplace_diagonal,
        },
    ),
    "norms": (
        problems.reference_norms,
        {
            OURS: ours.norms,
            f"{OURS}, a step": ours.tracked_norms,
            f"{OURS}, a step, .grad too": ours.norms_of_step,
            "plain torch": ours.plain_norms,
            "BackPACK": peers.backpack_norms,
            "opacus": peers.opacus_norms,
            "torch.func": functional.func_norms,
        },
    ),
    "gram": (
        problems.reference_gram,
        {
            OURS: ours.gram,
            f"{OURS}, a step": ours.tracked_gram,
            f"{OURS}, a step, .grad too": ours.gram_of_step,
            "plain torch": ours.plain_gram,
            "BackPACK": peers.backpack_gram,
            "torch.func": functional.func_gram,
        },
    ),
    "kernel": (
        problems.reference_kernel,
        {
            OURS: ours.kernel,
            "plain torch": ours.plain_kernel,
            "nngeometry": peers.nngeometry_kernel,
            "asdfghjkl": peers.asdl_kernel,
            "torch.func": functional.func_kernel,
        },
    ),
    "kronecker": (
        lambda p: ours.plain_kronecker(p)[1](ours.plain_kronecker(p)[0]()),
        {
            OURS: ours.kronecker,
            "plain torch": ours.plain_kronecker,
            "BackPACK": peers.backpack_kronecker,
            "curvlinops": peers.curvlinops_kronecker,
            "nngeometry": peers.nngeometry_kronecker,
            "asdfghjkl": peers.asdl_kronecker,
        },
    ),
    "product": (
        problems.reference_product,
        {
            OURS: ours.product,
            "torch.func": ours.plain_product,
            "curvlinops": peers.curvlinops_product,
            "hessian-eigenthings": peers.eigenthings_product,
        },
    ),
    "hessian": (
        problems.reference_hessian,
        {
            OURS: ours.hessian,
            "torch.func.hessian": functional.func_hessian,
            "jacrev(grad), chunked": functional.chunked_hessian,
            "curvlinops": peers.curvlinops_hessian,
            "nngeometry": hessians.nngeometry_dense,
            "asdfghjkl": hessians.asdl_dense,
        },
    ),
    "hessian-blocks": (
        hessians.reference_blocks,
        {
            OURS: ours.hessian_blocks,
            "torch.func.hessian": hessians.func_blocks,
            "jacrev(grad), chunked": hessians.chunked_blocks,
            "curvlinops": hessians.curvlinops_blocks,
            "asdfghjkl": hessians.asdl_blocks,
        },
    ),
}


def _case(kind: str, N: int, quantity: str, device: torch.device) -> Case:
    p = problems.make(kind, N, device)
    reference, makers = QUANTITIES[quantity]
    counted = {"hessian": count_hessian, "hessian-blocks": count_hessian_blocks}.get(quantity)
    flops, moved = counted(p) if counted else count(p, quantity)
    contestants = {label: (lambda maker=maker: maker(p)) for label, maker in makers.items()}
    ways = passes.of(p, quantity)
    within = flops_of_passes(p, quantity) if ways else 0.0
    return Case(contestants, lambda: reference(p.to(torch.float64)), flops, moved, passes=ways, flops_of_passes=within)


def _workload(quantity: str, kind: str, N: int, title: str, target: str, quick: bool = True) -> Workload:
    return Workload(f"{quantity}-{kind}", title, target, lambda device: _case(kind, N, quantity, device), quick)


MLP, WIDE, CNN, ENCODER = (
    "MLP 64-64-32-10, N=512",
    "MLP 784-512-256-10, N=512",
    "CNN 3-32-64-64 on 32x32, N=128",
    "Transformer encoder d=128, 4 layers, T=128, N=32",
)

WORKLOADS = [
    _workload("blocks", "mlp64", 512, f"Gauss-Newton blocks, {MLP}", "20"),
    _workload("blocks", "mlp784x16", 512, "Gauss-Newton blocks, MLP 784-16-10, N=512", "10", False),
    _workload("dense", "mlp64", 512, f"Gauss-Newton matrix, dense, {MLP}", "20", False),
    _workload("diagonal", "mlp64", 512, f"Gauss-Newton diagonal, {MLP}", "6"),
    _workload("diagonal", "cnn", 128, f"Gauss-Newton diagonal, {CNN}", "1.7", False),
    _workload("norms", "mlp64", 512, f"Gradient norms alone, {MLP}", "4"),
    _workload("norms", "mlp784", 512, f"Gradient norms alone, {WIDE}", "2"),
    _workload("norms", "cnn", 128, f"Gradient norms alone, {CNN}", "1.6"),
    _workload("norms", "transformer", 32, f"Gradient norms alone, {ENCODER}", "1.5", False),
    _workload("gram", "mlp64", 512, f"Gradient Gram matrix alone, {MLP}", "6"),
    _workload("gram", "mlp784", 512, f"Gradient Gram matrix alone, {WIDE}", "3"),
    _workload("gram", "cnn", 128, f"Gradient Gram matrix alone, {CNN}", "1.7"),
    _workload("gram", "transformer", 32, f"Gradient Gram matrix alone, {ENCODER}", "1.4", False),
    _workload("kernel", "mlp64", 128, "Neural tangent kernel, MLP 64-64-32-10, N=128", "12"),
    _workload("kernel", "cnn", 64, "Neural tangent kernel, CNN 3-32-64-64 on 32x32, N=64", "1.7", False),
    _workload("kronecker", "mlp64", 512, f"Exact Kronecker factors, {MLP}", "6"),
    _workload("kronecker", "cnn", 128, f"Exact Kronecker factors, {CNN}", "1.8", False),
    _workload("product", "mlp64", 512, f"Gauss-Newton product G v, {MLP}", "2"),
    _workload("product", "mlp784", 512, f"Gauss-Newton product G v, {WIDE}", "1.3"),
    _workload("product", "cnn", 128, f"Gauss-Newton product G v, {CNN}", "1.3"),
    _workload("hessian", "tanh16", 256, "Hessian, dense, tanh MLP 16-32-32-10, N=256", "20"),
    _workload("hessian", "tanh64", 512, "Hessian, dense, tanh MLP 64-64-32-10, N=512", "20", False),
    _workload("hessian-blocks", "tanh16", 256, "Hessian blocks, tanh MLP 16-32-32-10, N=256", "20"),
    _workload("hessian-blocks", "tanh64", 512, "Hessian blocks, tanh MLP 64-64-32-10, N=512", "20", False),
    *(
        Workload(o.name, o.title, o.target, lambda device, o=o: Case(*o.build(device)), o.quick)
        for o in operators.WORKLOADS
    ),
]
