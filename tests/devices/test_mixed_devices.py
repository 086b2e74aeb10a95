"""A model on one device and something else on another: an error that names what is where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_curvature as tc

from .stand_in import DeviceTensor, on_device, stand_in

OTHER = "meta"  # the second device that every machine has
N, P = 6, 43
MATRICES = {
    "GaussNewton": tc.GaussNewton,
    "Fisher": tc.Fisher,
    "sampled Fisher": partial(tc.Fisher, samples=2),
    "EmpiricalFisher": tc.EmpiricalFisher,
    "Hessian": tc.Hessian,
    "Residual": tc.Residual,
}
CELLS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda m: m.dense(),
    "blocks": lambda m: m.blocks(),
    "diagonal": lambda m: m.diagonal(),
    "trace": lambda m: m.trace(),
    "frobenius_norm": lambda m: m.frobenius_norm(),
    "@": lambda m: m @ torch.ones(P),
    "@ many": lambda m: m @ torch.ones(P, 9),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs() -> Tensor:
    return torch.randn(N, 4)


def targets() -> Tensor:
    return torch.randint(0, 3, (N,))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_data_elsewhere(matrix: str, cell: str) -> None:
    loss = nn.CrossEntropyLoss()
    for data in ((inputs().to(OTHER), targets()), [(inputs().to(OTHER), targets())]):
        with pytest.raises(
            ValueError, match=r"tensors on meta and the model is on cpu: move one of them, or pass forward"
        ):
            CELLS[cell](MATRICES[matrix](model(), loss, data))
    with pytest.raises(ValueError, match=r"target is on meta, the outputs are on cpu. Move one"):
        CELLS[cell](MATRICES[matrix](model(), loss, (inputs(), targets().to(OTHER))))


@pytest.mark.parametrize("matrix", MATRICES)
def test_vectors_elsewhere(matrix: str) -> None:
    made = MATRICES[matrix](model(), nn.CrossEntropyLoss(), (inputs(), targets()))
    with pytest.raises(ValueError, match="the vector is on meta, the model on cpu: move one"):
        made @ torch.ones(P, device=OTHER)
    named = {name: torch.ones_like(p) for name, p in made.parameters.items()}
    named["2.bias"] = named["2.bias"].to(OTHER)
    with pytest.raises(ValueError, match=r"vector\['2.bias'\] is on meta, the model on cpu: move one"):
        made @ named
    with pytest.raises(TypeError, match=r"vector\['2.bias'\] must be a tensor, got list"):
        made @ {**named, "2.bias": [0.0]}


def test_jacobian() -> None:
    with pytest.raises(ValueError, match="tensors on meta and the model is on cpu"):
        tc.Jacobian(model(), inputs().to(OTHER)).dense()
    J = tc.Jacobian(model(), inputs())
    with pytest.raises(ValueError, match="the vector is on meta"):
        J @ torch.ones(P, device=OTHER)
    with pytest.raises(ValueError, match="u is on meta, the model on cpu: move one"):
        J.transposed_product(torch.ones(N, 3, device=OTHER))
    for wrong, got in ((torch.ones(N, 3, dtype=torch.long), "torch.int64"), ([1.0], "list")):
        with pytest.raises(TypeError, match=rf"u must be a floating tensor \[N, C\], got {got}"):
            J.transposed_product(wrong)


LOSSES: dict[str, tuple[Callable[..., Any], Callable[[], Any], str]] = {
    "weight": (nn.CrossEntropyLoss(weight=torch.ones(3, device=OTHER)), targets, "weight is on meta"),
    "weight of a function": (partial(F.nll_loss, weight=torch.ones(3, device=OTHER)), targets, "weight is on meta"),
    "weight of elements": (
        nn.BCEWithLogitsLoss(weight=torch.ones(3, device=OTHER)), lambda: torch.rand(N, 3), "weight is on meta",
    ),
    "pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3, device=OTHER)), lambda: torch.rand(N, 3), "pos_weight is on meta",
    ),
    "variance": (
        partial(F.gaussian_nll_loss, var=torch.ones(N, 3, device=OTHER)), lambda: torch.rand(N, 3), "var is on meta",
    ),
    "target": (nn.MSELoss(), lambda: torch.rand(N, 3, device=OTHER), "target is on meta"),
    "target of a callable": (
        lambda u, y: (u - y).square().sum(), lambda: torch.rand(N, 3, device=OTHER), "targets are on meta",
    ),
    "target of a matching loss": (
        tc.MatchingLoss("sigmoid"), lambda: torch.rand(N, 3, device=OTHER), "'u' is on cpu and 'y' on meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LOSSES)
def test_losses(what: str) -> None:
    loss, draw, message = LOSSES[what]
    with pytest.raises(ValueError, match=message):
        tc.GaussNewton(model(), loss, (inputs(), draw())).diagonal()


def test_models_on_two_devices_or_without_values() -> None:
    split = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).to(OTHER))
    message = r"on several devices \('0.bias' on cpu, '1.bias' on meta\): move all to one"
    for call in (tc.Jacobian, lambda m, x: tc.GaussNewton(m, nn.MSELoss(), (x, x)), lambda m, x: tc.track(m)):
        with pytest.raises(ValueError, match=message):
            call(split, inputs())
        with pytest.raises(ValueError, match="parameters are on the meta device and have no values: load them"):
            call(model().to(OTHER), inputs().to(OTHER))


def test_outputs_elsewhere() -> None:
    with pytest.raises(
        ValueError, match="outputs are on meta and its parameters on cpu: give the data on cpu, and return"
    ):
        tc.Jacobian(model(), inputs(), forward=lambda m, x: (m(x).to(OTHER), None)).dense()


def test_another_error_of_the_model_stays_what_it_is() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("this device driver is out of order")

    with pytest.raises(RuntimeError, match=r"^this device driver is out of order$"):
        tc.Jacobian(Broken(4, 3), inputs()).dense()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tc.Jacobian(model(), torch.randn(N, 9)).dense()


def test_a_forward_function_may_move_the_data() -> None:
    """Batches on the host and a model on the device, as with a DataLoader."""
    net, x, y = model(), inputs(), targets()
    expected = tc.GaussNewton(net, nn.CrossEntropyLoss(), [(x[:2], y[:2]), (x[2:], y[2:])]).dense()
    with stand_in():
        moved = on_device(net)
        batches = [(x[:2], y[:2]), (x[2:], y[2:])]
        with pytest.raises(
            ValueError, match="the batch holds tensors on cpu and the model is on cuda:0: move one of them"
        ):
            tc.GaussNewton(moved, nn.CrossEntropyLoss(), batches).dense()

        def forward(m: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            return m(batch[0].to("cuda:0")), batch[1].to("cuda:0")

        found = tc.GaussNewton(moved, nn.CrossEntropyLoss(), batches, forward=forward).dense()
        assert isinstance(found, DeviceTensor)
        torch.testing.assert_close(found.host, expected)


PAIRS: dict[str, Callable[[], Any]] = {
    "tensor_product": lambda: tc.tensor_product(torch.ones(2, 3), torch.ones(3, 4, device=OTHER)),
    "inner": lambda: tc.inner(torch.ones(3), torch.ones(3, device=OTHER)),
    "outer": lambda: tc.outer(torch.ones(3), torch.ones(3, device=OTHER)),
    "frobenius_inner": lambda: tc.frobenius_inner(torch.ones(3, 2), torch.ones(3, 2, device=OTHER)),
    "compose_jacobian": lambda: tc.compose_jacobian(torch.ones(2, 3), torch.ones(3, 4, device=OTHER)),
    "compose_hessian": lambda: tc.compose_hessian(
        torch.ones(3), torch.ones(3, 3, device=OTHER), torch.ones(3, 2), torch.ones(3, 2, 2)
    ),
    "compose": lambda: tc.compose((torch.ones(2, 3), None), (torch.ones(3, 4, device=OTHER), None)),
    "MatchingLoss": lambda: tc.MatchingLoss("softmax")(torch.ones(2, 3), torch.ones(2, 3, device=OTHER)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_of_two_tensors(name: str) -> None:
    with pytest.raises(ValueError, match=r"'\w+' is on (cpu|meta) and '\w+' on (cpu|meta). Move one of them"):
        PAIRS[name]()


OUT: dict[str, Callable[..., Any]] = {
    "outer": lambda x: tc.ops.outer(torch.ones(2, 3), torch.ones(2, 4), out=x.new_empty(2, 3, 4)),
    "kronecker_sum": lambda x: tc.ops.kronecker_sum(torch.ones(5, 2, 2), torch.ones(5, 3), out=x.new_empty(6, 6)),
    "gauss_newton_block": lambda x: tc.ops.gauss_newton_block(
        torch.ones(2, 5, 1, 2), torch.ones(5, 1, 3), out=x.new_empty(6, 6)
    ),
    "jacobian_gram": lambda x: tc.ops.jacobian_gram(
        torch.ones(2, 5, 1, 2), torch.ones(5, 1, 3), add_to=x.new_zeros(2, 5, 2, 5)
    ),
}


@pytest.mark.parametrize("name", OUT)
def test_results_written_elsewhere(name: str) -> None:
    OUT[name](torch.empty(0))
    with pytest.raises(RuntimeError, match=r"'out' and 'the inputs' are on different devices. Move one of them"):
        OUT[name](torch.empty(0, device=OTHER))
