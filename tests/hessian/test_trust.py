"""Functions whose second derivatives torch has wrong or not at all; and every error a user can meet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torch_curvature as tc
from tests.engine.models import Function
from tests.engine.test_matrices import close
from torch_curvature import reference
from torch_curvature.layers import MODULE_RULES
from torch_curvature.layers.bags import embedding_bag
from torch_curvature.recorder import UnsupportedModelError

LOSS = nn.CrossEntropyLoss()


def central_differences(model: nn.Module, data: Any, v: Tensor, step: float = 1e-4) -> Tensor:
    """``H v`` from gradients alone."""

    def gradient(shift: float) -> Tensor:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + shift * v, parameters)
        value = LOSS(model(data[0]), data[1])
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads)]
        )

    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach().clone()
    result = (8 * (gradient(step) - gradient(-step)) - gradient(2 * step) + gradient(-2 * step)) / (12 * step)
    gradient(0.0)
    return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, -1)
        return self.last(F.scaled_dot_product_attention(q, k, v)).mean(1)


HARD = {
    "weight_norm": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        4,
    ),
    "weight_norm over all": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5), dim=None), nn.Tanh(), nn.Linear(5, 3)),
        4,
    ),
    "fused attention": lambda: (Attention(), (3, 4)),
    "multi-head attention": lambda: (
        Function(
            lambda m, x: m.last(m.mix(x, x, x, need_weights=False)[0]).mean(1),
            mix=nn.MultiheadAttention(4, 2, batch_first=True),
            last=nn.Linear(4, 3),
        ),
        (3, 4),
    ),
    "Hardsigmoid": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3)), 4),
    "Hardsigmoid in place": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(inplace=True), nn.Linear(5, 3)), 4),
    "BatchNorm eval": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval(),
        4,
    ),
    "LayerNorm": lambda: (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)), 4),
    "InstanceNorm": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        (2, 4),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_functions_that_torch_differentiates_wrongly_or_once(name: str) -> None:
    model, shape = HARD[name]()
    x = torch.randn(6, *((shape,) if isinstance(shape, int) else shape))
    data = (x, torch.randint(0, 3, (6,)))
    truth = reference.hessian(model, LOSS, data)
    matrix = tc.Hessian(model, LOSS, data)
    close(matrix.dense(), truth)
    close(tc.Residual(model, LOSS, data).dense(), reference.residual(model, LOSS, data))
    v = torch.randn(len(truth))
    assert (matrix @ v - central_differences(model, data, v)).norm() <= 1e-6 * truth.norm()


@pytest.mark.parametrize(
    ("mode", "sparse"), [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)]
)
def test_embedding_bags(mode: str, sparse: bool) -> None:
    model = Function(
        lambda m, x: m.last(torch.tanh(m.table(x))),
        table=nn.EmbeddingBag(6, 3, mode=mode, sparse=sparse),
        last=nn.Linear(3, 3),
    )
    data, v = (torch.randint(0, 6, (5, 4)), torch.randint(0, 3, (5,))), torch.randn(30)
    ours = tc.Hessian(model, LOSS, data).dense()
    model.table.sparse = False
    close(ours, reference.hessian(model, LOSS, data))
    assert (ours @ v - central_differences(model, data, v)).norm() <= 1e-6 * ours.norm()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_unequal_length_written_out(mode: str, padding: int | None, last: bool) -> None:
    weight, index = torch.randn(6, 3, requires_grad=True), torch.randint(0, 6, (9,))
    offsets = torch.tensor([0, 2, 2, 5, 8] + [9] * last)
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
    if mode == "sum":
        options["per_sample_weights"] = torch.randn(9)
    ours, theirs = embedding_bag(index, weight, offsets, **options), F.embedding_bag(index, weight, offsets, **options)
    close(ours, theirs)
    seed = torch.randn(5, 3)
    close(torch.autograd.grad(ours, weight, seed)[0], torch.autograd.grad(theirs, weight, seed)[0])


def test_sparse_embedding() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3))
    data = (torch.randint(0, 5, (6, 2)), torch.randint(0, 3, (6,)))
    ours = tc.Hessian(model, LOSS, data).dense()
    model[0].sparse = False
    close(ours, reference.hessian(model, LOSS, data))


def test_recurrent_layers_in_single_precision() -> None:
    model = Function(
        lambda m, x: m.last(m.cell(x)[0][:, -1]), cell=nn.LSTM(3, 4, batch_first=True), last=nn.Linear(4, 3)
    )
    x, y = torch.randn(5, 4, 3), torch.randint(0, 3, (5,))
    truth = reference.hessian(model, LOSS, (x, y))
    ours = tc.Hessian(model.float(), LOSS, (x.float(), y)).dense().double()
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


# ---------------------------------------------------------------------- the probe


class WrongBackward(torch.autograd.Function):
    """``x^2 y`` whose gradient is right and differentiates wrongly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return 2 * g * x * y.detach(), g * x * x


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return WrongBackward.apply(x, self.gate.expand_as(x))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


USES = {
    "dense": lambda *problem: tc.Hessian(*problem).dense(),
    "blocks": lambda *problem: tc.Residual(*problem).blocks(),
    "diagonal": lambda *problem: tc.Residual(*problem).diagonal(),
    "trace": lambda *problem: tc.Hessian(*problem).trace(),
    "product": lambda *problem: tc.Residual(*problem) @ torch.ones(39),
    "split": lambda *problem: tc.hessian_split(*problem),
}


@pytest.mark.parametrize("use", USES)
def test_a_wrong_second_derivative_is_found_and_its_module_named(use: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Gated(), nn.Linear(4, 3))
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    with pytest.raises(UnsupportedModelError, match=r"2 \(Gated\) has a wrong one.*check_symmetry=False"):
        USES[use](model, LOSS, data)
    assert tc.Hessian(model, LOSS, data, check_symmetry=False).dense().shape == (39, 39)


def test_a_missing_second_derivative_names_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Sine(), nn.Linear(4, 3))
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    for check in (True, False):
        with pytest.raises(UnsupportedModelError, match=r"no second derivative.*1 \(Sine\)"):
            tc.Hessian(model, LOSS, data, check_symmetry=check).dense()
    tc.GaussNewton(model, LOSS, data).dense()  # needs none


def test_a_function_outside_any_module_is_told_by_its_parameters() -> None:
    model = Function(
        lambda m, x: m.last(WrongBackward.apply(m.first(x), m.scale.expand(x.shape[0], 4))),
        first=nn.Linear(4, 4),
        scale=nn.Parameter(torch.rand(4) + 0.5),
        last=nn.Linear(4, 3),
    )
    with pytest.raises(UnsupportedModelError, match=r"No single module is to blame.*'scale'"):
        tc.Hessian(model, LOSS, (torch.randn(6, 4), torch.randint(0, 3, (6,)))).dense()


# ---------------------------------------------------------------------- rules that hide a dependence


class Hidden(nn.Module):
    """``z = W x``; a rule that hides how x depends on other parameters has a right gradient and wrong cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,ni->no", self.weight, x)


@pytest.fixture
def hiding_rule() -> Iterator[None]:
    @tc.register_rule(Hidden)
    def rule(module: Hidden, output: Tensor, x: Tensor) -> Iterator[tc.Use]:
        yield tc.Use(module.weight, 1, lambda dz: dz.unsqueeze(2), lambda: x.detach().unsqueeze(1))

    yield
    del MODULE_RULES[Hidden]


@pytest.mark.usefixtures("hiding_rule")
def test_a_rule_that_hides_a_dependence_falls_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Hidden(), nn.Tanh(), nn.Linear(4, 3))
    data = (torch.randn(6, 3), torch.randint(0, 3, (6,)))
    matrix = tc.Hessian(model, LOSS, data)
    close(matrix.dense(), reference.hessian(model, LOSS, data))
    assert matrix.coverage()["2.weight"] == "closed rule"
    assert matrix._distrusted == {""}
    batches = [(data[0][:2], data[1][:2]), (data[0][2:], data[1][2:])]
    close(tc.Residual(model, LOSS, batches).dense(), reference.residual(model, LOSS, data))


# ---------------------------------------------------------------------- errors


def test_messages_of_bad_input() -> None:
    model, data = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(0, 3, (5,)))
    for matrix in (tc.Hessian(model, LOSS, data), tc.Residual(model, LOSS, data)):
        with pytest.raises(NotImplementedError, match=r"kronecker\(\).*blocks\(\)"):
            matrix.kronecker()
        with pytest.raises(NotImplementedError, match=r"gram\(\).*GaussNewton"):
            matrix.gram()
        with pytest.raises(ValueError, match=r"\[P\] or \[P, K\] with P = 15"):
            matrix @ torch.randn(3)
        with pytest.raises(ValueError, match="'parameter' or 'module'"):
            matrix.blocks(by="layer")
    with pytest.raises(ValueError, match="'dense', 'blocks' or 'diagonal'"):
        tc.hessian_split(model, LOSS, data, "kronecker")
    with pytest.raises(TypeError, match="check_symetry"):
        tc.Hessian(model, LOSS, data, check_symetry=False)
    with pytest.raises(ValueError, match="no batch"):
        tc.Hessian(model, LOSS, []).dense()
    batchnorm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(UnsupportedModelError, match=r"model.eval\(\)"):
        tc.Hessian(batchnorm, LOSS, data).dense()
    dropout = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(UnsupportedModelError, match="random"):
        tc.Hessian(dropout, LOSS, data) @ torch.randn(15)
    with pytest.raises(ValueError, match="NaN"):
        tc.Hessian(model, LOSS, (torch.full((5, 4), torch.nan), data[1])).dense()


def test_a_matrix_that_cannot_fit_is_refused_before_the_model_runs() -> None:
    model = Function(lambda m, x: pytest.fail("the model ran"), layer=nn.Linear(300, 300))
    data = (torch.randn(2, 300), torch.randint(0, 300, (2,)))
    matrix = tc.Hessian(model, LOSS, data, memory_budget=0.5)
    with pytest.raises(MemoryError, match=r"Hessian.dense\(\).*90300 x 90300.*GiB.*diagonal\(\)"):
        matrix.dense()
    with pytest.raises(MemoryError, match=r"blocks\(\)"):
        matrix.blocks()
    with pytest.raises(MemoryError, match="2 block"):
        tc.hessian_split(model, LOSS, data, memory_budget=0.5)


def test_a_generator_is_read_once() -> None:
    model = nn.Linear(4, 3)
    matrix = tc.Hessian(model, LOSS, iter([(torch.randn(5, 4), torch.randint(0, 3, (5,)))]))
    matrix.dense()
    with pytest.raises(ValueError, match="only once"):
        matrix.diagonal()
