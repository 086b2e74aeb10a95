"""What is easy to get wrong, one named test each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_curvature as tc
from torch_curvature import reference

from .models import Function
from .test_losses_and_splits import close


def check(model: nn.Module, loss: Any, x: Any, y: Tensor) -> None:
    truth = reference.gauss_newton(model, loss, (x, y))
    matrix = tc.GaussNewton(model, loss, (x, y))
    close(matrix.dense(), truth)
    close(torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal())
    for block, p in zip(matrix.blocks().values(), reference.parameters(model).values()):
        assert block.shape == (p.numel(), p.numel())
    per_sample = reference.per_sample_gradients(model, loss, (x, y))
    with tc.track(model) as t:
        loss(model(x), y).backward()
    for name, gradient in t.gradients().items():
        close(gradient, per_sample[name])


def net(outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def test_ignored_targets_count_neither_above_nor_below() -> None:
    y = torch.tensor([0, -100, 2, -100, 3])
    model, x = net(), torch.randn(5, 3)
    check(model, nn.CrossEntropyLoss(), x, y)
    kept = y != -100
    close(
        tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)).dense(),
        tc.GaussNewton(model, nn.CrossEntropyLoss(), (x[kept], y[kept])).dense(),
    )


def test_class_weights_normalise_the_mean() -> None:
    check(
        net(),
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 3.0, 1.0, 0.5])),
        torch.randn(5, 3),
        torch.tensor([0, 1, 1, 2, 3]),
    )


def test_pos_weight() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.1, 5.0, 1.0, 2.0]))
    check(net(), loss, torch.randn(5, 3), torch.randint(0, 2, (5, 4)).double())


def test_mean_over_batches_of_unequal_size_is_not_the_mean_of_means() -> None:
    model, loss, x, y = net(), nn.CrossEntropyLoss(), torch.randn(5, 3), torch.tensor([0, -100, -100, 2, 3])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    close(tc.GaussNewton(model, loss, batches).dense(), reference.gauss_newton(model, loss, (x, y)))


def test_a_weight_used_twice_has_cross_terms() -> None:
    layer = nn.Linear(3, 3)
    model = Function(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=layer)
    check(model, nn.MSELoss(), torch.randn(5, 3), torch.randn(5, 3))


def test_tied_weights_of_two_kinds() -> None:
    model = Function(lambda m, i: F.linear(torch.tanh(m.table(i)).mean(1), m.table.weight), table=nn.Embedding(4, 3))
    check(model, nn.CrossEntropyLoss(), torch.randint(0, 4, (5, 3)), torch.randint(0, 4, (5,)))
    assert set(tc.Jacobian(model, torch.randint(0, 4, (5, 3))).coverage().values()) == {"closed rule"}


def test_circular_padding() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=2, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)
    )
    check(model, nn.CrossEntropyLoss(), torch.randn(4, 1, 4, 4), torch.randint(0, 3, (4,)))


def test_no_module_is_left_out_in_silence() -> None:
    """A module with a parameter of its own and no rule is covered exactly, and coverage() says how."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.expit(x) ** self.rate.abs()

    model = nn.Sequential(nn.Linear(3, 4), Odd(), nn.Linear(4, 4))
    x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
    check(model, nn.CrossEntropyLoss(), x, y)
    coverage = tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)).coverage()
    assert coverage["1.rate"].startswith("fallback")
    assert coverage["0.weight"] == "closed rule"


def test_half_precision_is_accumulated_in_float32() -> None:
    """The sum of 4096 equal squares: accumulated in bfloat16 it would stop growing at 256."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    x = torch.ones(4096, 2, dtype=torch.bfloat16)
    y = torch.zeros(4096, 1, dtype=torch.bfloat16)
    diagonal = tc.GaussNewton(model, nn.MSELoss(reduction="sum"), (x, y)).diagonal()["weight"]
    assert diagonal.dtype == torch.float32
    assert torch.allclose(diagonal, torch.full((1, 2), 8192.0, dtype=torch.float32), rtol=1e-3)


def test_frozen_parameters_are_left_out_everywhere() -> None:
    model = net()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
    check(model, nn.CrossEntropyLoss(), x, y)
    matrix = tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y))
    assert matrix.dense().shape == (16, 16)
    assert list(matrix.blocks()) == list(matrix.diagonal()) == ["2.weight"]
    assert matrix.coverage() == {
        "0.weight": "frozen",
        "0.bias": "frozen",
        "2.weight": "closed rule",
        "2.bias": "frozen",
    }


def test_functional_calls_inside_a_module() -> None:
    model = Function(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.first)), m.second),
        first=nn.Parameter(torch.randn(4, 3)),
        second=nn.Parameter(torch.randn(4, 4)),
    )
    check(model, nn.CrossEntropyLoss(), torch.randn(5, 3), torch.randint(0, 4, (5,)))


# ---------------------------------------------------------------------- factors are not trusted unseen


@pytest.mark.parametrize("wrong", ["factor", "sample", "part"])
def test_a_wrong_rule_falls_back(wrong: str) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + (self.weight.sum(1) if wrong == "part" else 0)

    @tc.register_rule(Mine)
    def rule(module: Mine, output: Tensor, x: Tensor) -> Any:
        g = {
            "factor": lambda dz: 2 * dz.unsqueeze(2),
            "sample": lambda dz: dz.flip(1).unsqueeze(2),
            "part": lambda dz: dz.unsqueeze(2),
        }[wrong]
        a = (lambda: x.flip(0).unsqueeze(1)) if wrong == "sample" else (lambda: x.unsqueeze(1))
        yield tc.Use(module.weight, 1, g, a)

    try:
        model = nn.Sequential(Mine(), nn.Tanh(), nn.Linear(4, 4))
        x, y = torch.randn(5, 3), torch.randint(0, 4, (5,))
        check(model, nn.CrossEntropyLoss(), x, y)
        coverage = tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)).coverage()
        assert coverage["0.weight"] == "fallback: the rule's gradient differs from autograd's"
    finally:
        from torch_curvature.layers import MODULE_RULES

        del MODULE_RULES[Mine]


def test_a_use_without_a_rule_beside_one_with_a_rule_falls_back() -> None:
    """Also where the odd use vanishes on the first batch."""
    model = Function(
        lambda m, x: m.layer(x) + torch.relu(x[:, :1]) * m.layer.weight.pow(2).sum(), layer=nn.Linear(3, 4)
    )
    x, y = torch.randn(6, 3), torch.randint(0, 4, (6,))
    x[:3, 0] = -x[:3, 0].abs()
    x[3:, 0] = x[3:, 0].abs()
    loss = nn.CrossEntropyLoss()
    matrix = tc.GaussNewton(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    close(matrix.dense(), reference.gauss_newton(model, loss, (x, y)))
    assert matrix.coverage()["layer.weight"].startswith("fallback")


def test_control_flow_that_changes_with_the_data_is_seen() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        return m.last(h) if x.sum() > 0 else m.last(h * m.gate.exp())

    model = Function(run, first=nn.Linear(3, 4), last=nn.Linear(4, 4), gate=nn.Parameter(torch.rand(4)))
    x, y = torch.rand(6, 3), torch.randint(0, 4, (6,))
    x[3:] *= -1
    loss = nn.MSELoss(reduction="sum")
    y = torch.randn(6, 4)
    parts = [reference.gauss_newton(model, loss, (x[:3], y[:3])), reference.gauss_newton(model, loss, (x[3:], y[3:]))]
    close(tc.GaussNewton(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])]).dense(), parts[0] + parts[1])


def test_an_order_that_depends_on_the_data_is_checked_on_every_batch() -> None:
    """Sorted first batch, unsorted second: at the layer the samples stand in another order than at the output."""

    def run(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = torch.tanh(m.first(x[order]))
        return m.last(h[order.argsort()]) * x[:, :1]

    model = Function(run, first=nn.Linear(3, 4), last=nn.Linear(4, 4))
    x, y = torch.randn(8, 3), torch.randint(0, 4, (8,))
    x[:4] = x[:4][x[:4, 0].argsort()]
    x[4:] = x[4:][x[4:, 0].argsort(descending=True)]
    loss = nn.CrossEntropyLoss()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    close(tc.GaussNewton(model, loss, batches).dense(), reference.gauss_newton(model, loss, (x, y)))
    per_sample = reference.per_sample_gradients(model, loss, (x[4:], y[4:]))
    for part in (batches[0], batches[1]):
        with tc.track(model) as t:
            loss(model(part[0]), part[1]).backward()
    for name, gradient in t.gradients().items():
        close(gradient, per_sample[name])


def test_what_vanishes_on_the_first_call_is_checked_again() -> None:
    """With a zero last layer nothing arrives below it, and nothing can be learnt about the layout there."""
    model = Function(
        lambda m, x: m.last(torch.tanh(m.first(x.transpose(0, 1)))).sum(0), first=nn.Linear(3, 4), last=nn.Linear(4, 4)
    )
    nn.init.zeros_(model.last.weight)
    x, y = torch.randn(3, 3, 3), torch.randint(0, 4, (3,))  # three steps, three samples
    loss = nn.CrossEntropyLoss()
    close(tc.GaussNewton(model, loss, (x, y)).dense(), reference.gauss_newton(model, loss, (x, y)))
    nn.init.normal_(model.last.weight)
    check(model, loss, x, y)


def test_a_gradient_that_vanishes_identically() -> None:
    """A key bias of attention has no influence: only rounding arrives."""
    model = Function(
        lambda m, x: m.last(
            F.scaled_dot_product_attention(m.query(x), m.key(x), m.value(x))
        ).mean(1),
        query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4), last=nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(4, 3, 4), torch.randint(0, 3, (4,))
    matrix = tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y))
    assert set(matrix.coverage().values()) == {"closed rule"}
    close(matrix.dense(), reference.gauss_newton(model, nn.CrossEntropyLoss(), (x, y)))


def test_padding_index_in_forward_mode() -> None:
    """torch's forward mode gives the padding row a tangent, its backward pass none: the product must not notice."""
    model = Function(
        lambda m, i: m.last(m.table(i).mean(1)), table=nn.Embedding(4, 3, padding_idx=1), last=nn.Linear(3, 3)
    )
    i, y = torch.randint(0, 4, (6, 5)), torch.randint(0, 3, (6,))
    i[:, 0] = 1
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    close(
        tc.GaussNewton(model, nn.CrossEntropyLoss(), (i, y)) @ v,
        reference.gauss_newton(model, nn.CrossEntropyLoss(), (i, y)) @ v,
    )
    close(tc.Jacobian(model, i) @ v, reference.jacobian(model, i) @ v)


def test_coverage_of_a_use_of_two_parameters_in_one_call() -> None:
    """A parameter as the input of a layer is no use that the layer's rule answers for."""
    model = Function(
        lambda m, x: x @ F.linear(m.code, m.weight).t(),
        code=nn.Parameter(torch.randn(4, 2)),
        weight=nn.Parameter(torch.randn(3, 2)),
    )
    model = Function(
        lambda m, x: x @ F.linear(m.code, m.weight), code=model.code, weight=nn.Parameter(torch.randn(3, 2))
    )
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    check(model, nn.CrossEntropyLoss(), x, y)
    assert all(how.startswith("fallback") for how in tc.Jacobian(model, x).coverage().values())


class Bags(nn.Module):
    """Bags of words of unequal length: the words have no axis of samples, so that no batch can be cut into samples."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(9, 4, mode="mean")
        self.head = nn.Linear(4, 3)

    def forward(self, words: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.words(words, offsets)))


def test_inputs_that_cannot_be_cut_into_samples() -> None:
    model = Bags().double()
    data = ((torch.randint(9, (10,)), torch.tensor([0, 3, 4, 8])), torch.randint(3, (4,)))
    loss = nn.CrossEntropyLoss()
    want = reference.gauss_newton(model, loss, data)
    G = tc.GaussNewton(model, loss, data)
    torch.testing.assert_close(G.dense(), want)
    torch.testing.assert_close(torch.cat([d.flatten() for d in G.diagonal().values()]), want.diagonal())
    torch.testing.assert_close(G @ torch.ones_like(want[0]), want.sum(1))
    assert G.coverage()["words.weight"].startswith("fallback")
    torch.testing.assert_close(tc.Hessian(model, loss, data).dense(), reference.hessian(model, loss, data))
