"""Derivatives of networks, functions and losses: shapes, orders, subsets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from torch_curvature import reference
from torch_curvature.reference import rows
from torch_curvature.reference.evaluation import differentiable_forward


class Grid(nn.Module):
    """Outputs `[N, 2, 3]`, positional, keyword and integer inputs, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, token: Tensor, scale: float = 1.0) -> Tensor:
        hidden = (self.first(x) + self.embedding(token)).tanh()
        return torch.stack([scale * self.second(hidden), hidden.exp()], dim=1)


def grid_inputs(samples: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3), torch.randint(5, (samples,))


def test_jacobian_is_that_of_torch_func_and_of_each_sample_alone() -> None:
    model, inputs = Grid(), grid_inputs()
    named = {k: p.detach() for k, p in model.named_parameters()}
    assert list(named) == ["embedding.weight", "first.weight", "first.bias"]
    found = reference.jacobian(model, inputs)
    assert found.shape == (4, 6, 15 + 9 + 3)
    truth = jacrev(lambda p: functional_call(model, p, inputs))(named)
    truth = torch.cat([truth[k].reshape(4, 6, -1) for k in named], dim=-1)
    torch.testing.assert_close(found, truth)
    alone = torch.cat([reference.jacobian(model, (inputs[0][n : n + 1], inputs[1][n : n + 1])) for n in range(4)])
    torch.testing.assert_close(found, alone)
    by_name = reference.jacobian_by_name(model, inputs)
    assert {k: tuple(v.shape) for k, v in by_name.items()} == {
        "embedding.weight": (4, 6, 5, 3),
        "first.weight": (4, 6, 3, 3),
        "first.bias": (4, 6, 3),
    }
    torch.testing.assert_close(torch.cat([v.flatten(2) for v in by_name.values()], dim=-1), found)


def test_inputs_by_keyword_and_parameters_in_a_subset() -> None:
    model, (x, token) = Grid(), grid_inputs()
    whole = reference.jacobian(model, {"token": token, "x": x, "scale": 2.0})
    torch.testing.assert_close(whole, reference.jacobian(model, (x, token, 2.0)))
    part = reference.jacobian(model, (x, token, 2.0), only=["first.bias", "embedding.weight"])
    torch.testing.assert_close(part, torch.cat([whole[..., :15], whole[..., -3:]], dim=-1))
    model.first.bias.requires_grad_(False)
    torch.testing.assert_close(reference.jacobian(model, (x, token, 2.0)), whole[..., :-3])
    target = torch.randn(4, 2, 3)
    data = ((x, token, 2.0), target)
    matrix = reference.hessian(model, nn.MSELoss(), data)
    part = reference.hessian(model, nn.MSELoss(), data, only=["first.weight"])
    torch.testing.assert_close(part, matrix[15:, 15:])
    for function in (reference.gauss_newton, reference.residual, reference.fisher, reference.empirical_fisher):
        whole, part = (function(model, nn.MSELoss(), data, only=only) for only in (None, ["first.weight"]))
        torch.testing.assert_close(part, whole[15:, 15:])
    with pytest.raises(ValueError, match=r"second\.weight.*first\.weight"):
        reference.jacobian(model, (x, token), only=["second.weight"])


def test_input_jacobian() -> None:
    model, (x, token) = Grid(), grid_inputs()
    found = reference.input_jacobian(model, (x, token), argument=0)
    assert found.shape == (4, 6, 3)
    for n in range(4):
        one = jacrev(lambda u, n=n: model(u, token[n : n + 1]))(x[n : n + 1])
        torch.testing.assert_close(found[n], one.reshape(6, 3))
    torch.testing.assert_close(reference.input_jacobian(model, {"token": token, "x": x}, argument="x"), found)
    layer = nn.Linear(3, 2)
    torch.testing.assert_close(reference.input_jacobian(layer, x), layer.weight.expand(4, 2, 3))
    relu = nn.ReLU()
    torch.testing.assert_close(reference.input_jacobian(relu, x), torch.diag_embed((x > 0).to(x)))
    with pytest.raises(ValueError, match="argument"):
        reference.input_jacobian(model, (x, token))
    with pytest.raises(ValueError, match="argument"):
        reference.input_jacobian(model, (x, token), argument=1)


def test_per_sample_gradients_are_those_of_one_sample_and_sum_to_the_gradient() -> None:
    model, inputs, target = Grid(), grid_inputs(), torch.randn(4, 2, 3)
    for loss_fn, scale in ((nn.MSELoss(reduction="sum"), 1.0), (nn.MSELoss(), 1 / 4)):
        shares = reference.per_sample_gradients(model, loss_fn, (inputs, target))
        model.zero_grad()
        loss_fn(model(*inputs), target).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(shares[name].sum(0), p.grad)
        for n in range(4):
            alone = (inputs[0][n : n + 1], inputs[1][n : n + 1]), target[n : n + 1]
            gradient = reference.per_sample_gradients(model, loss_fn, alone)
            for name, share in shares.items():
                torch.testing.assert_close(share[n], scale * gradient[name][0])


def test_network_hessian_contracts_to_the_residual() -> None:
    model, inputs, target = Grid(), grid_inputs(2), torch.randn(2, 2, 3)
    loss_fn = nn.MSELoss()
    tensor = reference.network_hessian(model, inputs)
    assert tensor.shape == (2, 6, 27, 27)
    pull = reference.output_gradient(loss_fn, model(*inputs), target).reshape(2, 6)
    residual = torch.einsum("nc,ncij->ij", pull, tensor)
    torch.testing.assert_close(residual, reference.residual(model, loss_fn, (inputs, target)))
    subset = reference.network_hessian(model, inputs, only=["first.weight"])
    torch.testing.assert_close(subset, tensor[..., 15:24, 15:24])


def test_loss_jacobian_in_both_forms() -> None:
    outputs, targets = torch.randn(3, 4), torch.randint(4, (3,))
    row = reference.loss_jacobian(nn.CrossEntropyLoss(), outputs, targets)
    column = reference.loss_jacobian(nn.CrossEntropyLoss(), outputs, targets, form="column")
    truth = (outputs.softmax(-1) - F.one_hot(targets, 4)) / 3
    assert row.shape == (1, 12)
    torch.testing.assert_close(row, truth.reshape(1, 12))
    assert torch.equal(row.mT, column)
    with pytest.raises(ValueError, match="form"):
        reference.loss_jacobian(nn.CrossEntropyLoss(), outputs, targets, form="diagonal")  # type: ignore[arg-type]


def test_functions_of_a_tensor() -> None:
    a, x = torch.randn(3, 4), torch.randn(4)

    def f(u: Tensor) -> Tensor:
        return (a @ u).sin()

    torch.testing.assert_close(reference.function_jacobian(f, x), (a @ x).cos()[:, None] * a)
    truth = -torch.einsum("i,ij,ik->ijk", (a @ x).sin(), a, a)
    torch.testing.assert_close(reference.function_hessian(f, x), truth)
    many = torch.randn(6, 4)
    for derivative in (reference.function_jacobian, reference.function_hessian):
        torch.testing.assert_close(derivative(f, many, batched=True), torch.stack([derivative(f, u) for u in many]))
    assert reference.function_jacobian(torch.sum, x).shape == (1, 4)
    assert reference.function_hessian(lambda u: 3 * u, x).abs().max() == 0
    layered = reference.function_hessian(lambda u: F.layer_norm(u, (4,), a[0]).exp(), x)
    assert torch.equal(layered, layered.mT)
    with pytest.raises(TypeError, match="int64"):
        reference.function_jacobian(torch.sum, torch.arange(3))


def mlp(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 2))


CONVEX = {
    "squared error": (nn.MSELoss(), lambda: torch.randn(5, 2)),
    "cross entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(2, (5,))),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)), lambda: torch.rand(5, 2)),
    "poisson": (nn.PoissonNLLLoss(), lambda: torch.randint(4, (5, 2)).double()),
    "soft margin": (nn.SoftMarginLoss(), lambda: torch.randint(2, (5, 2)).double() * 2 - 1),
    "huber": (nn.HuberLoss(), lambda: torch.randn(5, 2)),
}


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_is_positive_semi_definite_for_a_convex_loss(name: str, reduction: str) -> None:
    loss_fn, targets = CONVEX[name]
    loss_fn.reduction = reduction
    model, data = mlp(nn.Tanh()), (torch.randn(5, 3), targets())
    matrix = reference.gauss_newton(model, loss_fn, data)
    values = torch.linalg.eigvalsh(matrix)
    assert values.min() >= -1e-12 * values.max()
    assert values.max() > 0
    total = matrix + reference.residual(model, loss_fn, data)
    torch.testing.assert_close(total, reference.hessian(model, loss_fn, data), rtol=1e-10, atol=1e-12)


def test_gauss_newton_of_a_loss_that_is_not_convex_is_what_it_is() -> None:
    model, data = mlp(nn.Tanh()), (torch.randn(5, 3), torch.randn(5, 2))

    def loss_fn(u: Tensor, y: Tensor) -> Tensor:
        return -((u - y) ** 2).sum()

    matrix = reference.gauss_newton(model, loss_fn, data)
    assert torch.linalg.eigvalsh(matrix).max() < 1e-12
    assert torch.linalg.eigvalsh(matrix).min() < -0.1
    torch.testing.assert_close(
        matrix + reference.residual(model, loss_fn, data), reference.hessian(model, loss_fn, data)
    )


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(input)


def test_nothing_is_left_on_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model[1] = nn.Sequential(model[1], Counts())
    model[0].weight.grad = torch.ones(4, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    data = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 2))
    with torch.no_grad():
        for function in (reference.hessian, reference.gauss_newton, reference.per_sample_gradients, reference.fisher):
            function(model, nn.MSELoss(), data)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert model[2].weight.grad is None
    assert torch.backends.mha.get_fastpath_enabled()


def test_single_precision() -> None:
    model, x, y = mlp(nn.Tanh()).float(), torch.randn(5, 3), torch.randint(2, (5,))
    single = reference.hessian(model, nn.CrossEntropyLoss(), (x.float(), y))
    double = reference.hessian(model.double(), nn.CrossEntropyLoss(), (x.float().double(), y))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-6)


BAGS = [(m, f) for m in ("sum", "mean", "max") for f in ("two axes", "offsets", "last offset")] + [("sum", "weighted")]


def test_rows_that_vmap_has_wrong_are_found_and_done_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = rows._grad, []

    def wrong_in_one_row(*arguments: Any, batched: bool) -> tuple[Tensor | None, ...]:
        calls.append(batched)
        found = right(*arguments, batched=batched)
        if batched:
            found[0][3] *= 1 + 1e-6
        return found

    monkeypatch.setattr(rows, "_grad", wrong_in_one_row)
    a = torch.randn(5, 4)
    assert torch.equal(reference.function_jacobian(lambda x: a @ x, torch.randn(4)), a)
    assert calls == [True, False, *[False] * 5]


@pytest.mark.parametrize(("mode", "form"), BAGS)
def test_the_written_out_embedding_bag_is_that_of_torch(mode: str, form: str) -> None:
    bag = nn.EmbeddingBag(7, 3, mode=mode, padding_idx=2, include_last_offset=form == "last offset")
    tokens = torch.randint(7, (5, 4))
    tokens[3] = 2  # a bag of padding alone
    given: tuple[Any, ...] = (tokens,)
    if form in ("offsets", "last offset"):
        starts = torch.tensor([0, 3, 3, 9, 20]) if form == "last offset" else torch.tensor([0, 3, 3, 9])
        given = (tokens.flatten(), starts)
    if form == "weighted":
        given = (tokens, None, torch.randn(5, 4))
    expected = bag(*given)
    with differentiable_forward():
        found = bag(*given)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), bag.weight)[0],
        torch.autograd.grad((expected * weights).sum(), bag.weight)[0],
    )
    with pytest.raises(NotImplementedError, match="max_norm"):
        reference.jacobian(nn.EmbeddingBag(7, 3, max_norm=1.0, mode=mode), (tokens,))
