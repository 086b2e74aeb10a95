"""What must hold of a Hessian whatever the model: ``H = G + R``, where R vanishes, precision, nothing left behind."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from tests.engine.models import CASES
from tests.engine.test_matrices import close, own_rule, problem  # noqa: F401
from torch_curvature import reference

SOME = ["mlp", "U-shaped skip", "LSTM classifier", "GPT block", "tied embedding", "weight normalisation", "branches"]
LOSS = nn.CrossEntropyLoss()


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("name", SOME)
def test_split_is_the_sum_of_both_parts(name: str) -> None:
    model, x, y = problem(name)
    data = (x, y)
    H, G = reference.hessian(model, LOSS, data), reference.gauss_newton(model, LOSS, data)
    parts = tc.hessian_split(model, LOSS, data)
    close(parts.gauss_newton, G)
    close(parts.residual, H - G, H)
    close(parts.hessian, tc.Hessian(model, LOSS, data).dense())
    close(parts.gauss_newton_norm, G.norm())
    close(parts.residual_norm, (H - G).norm(), H)
    close(tc.GaussNewton(model, LOSS, data).dense() + tc.Residual(model, LOSS, data).dense(), H)
    for by in ("parameter", "module"):
        blocks = tc.hessian_split(model, LOSS, data, "blocks", by=by)
        whole = tc.Hessian(model, LOSS, data).blocks(by)
        theirs = tc.GaussNewton(model, LOSS, data).blocks(by)
        for key, block in blocks.hessian.items():
            close(block, whole[key], H)
            close(blocks.gauss_newton[key], theirs[key], G)
            close(blocks.residual_norm[key], (whole[key] - theirs[key]).norm(), H)
    diagonals = tc.hessian_split(model, LOSS, data, "diagonal")
    close(torch.cat([d.flatten() for d in diagonals.hessian.values()]), H.diagonal(), H)
    close(torch.cat([d.flatten() for d in diagonals.gauss_newton.values()]), G.diagonal(), G)


def test_residual_vanishes_for_a_network_linear_in_its_parameters() -> None:
    model = nn.Linear(4, 3)
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    assert float(tc.Residual(model, LOSS, data).frobenius_norm()) == 0.0
    features = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 3))
    split = tc.hessian_split(features, LOSS, data)
    assert float(split.residual_norm) == 0.0
    assert float(split.gauss_newton_norm) > 0.1
    assert all(float(d.abs().max()) == 0.0 for d in tc.Residual(features, LOSS, data).diagonal().values())
    assert float((tc.Residual(features, LOSS, data) @ torch.randn(27)).norm()) == 0.0


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (nn.MSELoss(), lambda u: u),
        (nn.CrossEntropyLoss(), lambda u: u.softmax(1)),
        (nn.BCEWithLogitsLoss(), torch.sigmoid),
        (nn.PoissonNLLLoss(), torch.exp),
    ],
)
def test_residual_vanishes_at_a_perfect_fit_under_a_matching_loss(loss: Any, target: Any) -> None:
    model, x = mlp(4, 6, 5, 3), torch.randn(9, 4)
    y = target(model(x)).detach()
    split = tc.hessian_split(model, loss, (x, y))
    assert float(split.residual_norm) <= 1e-14 * float(split.gauss_newton_norm)
    far = tc.hessian_split(model, loss, (x, y.roll(1, 0)))
    assert float(far.residual_norm) > 1e-2 * float(far.gauss_newton_norm)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_piecewise_linear_networks_have_no_residual_within_a_layer(activation: type[nn.Module]) -> None:
    model = mlp(4, 8, 6, 3, activation=activation)
    data = (torch.randn(9, 4), torch.randint(0, 3, (9,)))
    residual = tc.Residual(model, LOSS, data)
    assert all(float(block.abs().max()) == 0.0 for block in residual.blocks().values())
    assert float(residual.trace()) == 0.0
    assert float(residual.frobenius_norm()) > 1e-3  # between layers it does not vanish
    close(residual.dense(), reference.residual(model, LOSS, data))


def test_bias_and_weight_of_any_order_and_kind_meet() -> None:
    """Parameters registered in another order than they are used in."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(3, 3), nn.Linear(5, 3), nn.Linear(4, 5)
            self.scale = nn.Parameter(torch.rand(3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.middle(torch.tanh(self.first(x))) * self.scale.exp()))

    model, data = Backwards(), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    close(tc.Hessian(model, LOSS, data).dense(), reference.hessian(model, LOSS, data))


def test_split_invariance_and_symmetry_to_the_bit() -> None:
    model, x, y = mlp(5, 7, 6, 3), torch.randn(11, 5), torch.randint(0, 3, (11,))
    whole = tc.Hessian(model, LOSS, (x, y)).dense()
    for sizes in ([11], [1, 10], [4, 4, 3], [1] * 11):
        batches = list(zip(x.split(sizes), y.split(sizes)))
        ours = tc.Hessian(model, LOSS, batches).dense()
        close(ours, whole)
        assert torch.equal(ours, ours.T)
    generator = (pair for pair in zip(x.split(4), y.split(4)))
    close(tc.Hessian(model, LOSS, generator).dense(), whole)


@pytest.mark.parametrize("name", ["mlp", "conv2d: circular padding", "LSTM classifier", "transformer encoder"])
def test_error_in_single_precision_is_a_small_multiple_of_machine_precision(name: str) -> None:
    model, x, y = problem(name)
    truth = tc.Hessian(model, LOSS, (x, y))
    dense, diagonal = truth.dense(), torch.cat([d.flatten() for d in truth.diagonal().values()])
    v = torch.randn(len(dense))
    single = tc.Hessian(model.float(), LOSS, (x.float() if x.is_floating_point() else x, y))
    ours = single.dense()
    assert ours.dtype == torch.float32
    bound = 50 * torch.finfo(torch.float32).eps * dense.norm()
    assert (ours.double() - dense).norm() <= bound
    assert (torch.cat([d.flatten() for d in single.diagonal().values()]).double() - diagonal).norm() <= bound
    assert ((single @ v.float()).double() - dense @ v).norm() <= bound * v.norm()


def test_half_precision_models_give_single_precision_results() -> None:
    model, data = mlp(4, 6, 3), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    truth = reference.hessian(model, LOSS, data)
    ours = tc.Hessian(model.bfloat16(), LOSS, (data[0].bfloat16(), data[1])).dense()
    assert ours.dtype == torch.float32
    assert (ours.double() - truth).norm() <= 0.05 * truth.norm()


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(name: str) -> None:
    model, x, y = problem(name)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        matrix = tc.Hessian(model, LOSS, (x, y))
        matrix.diagonal()
        matrix.blocks()
        product = matrix @ torch.ones(sum(p.numel() for p in matrix.parameters.values()))
    assert not product.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert not p.requires_grad or torch.equal(p.grad, torch.ones_like(p))
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


class ProductOfTwo(torch.autograd.Function):
    """``(x, y) -> (x y, y)``, whose backward takes x for a constant: right once, not symmetric twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.stack([x[:, 0] * x[:, 1], x[:, 1]], 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.stack([g[:, 0] * x[:, 1], g[:, 0] * x[:, 0].detach() + g[:, 1]], 1)


class WrongTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ProductOfTwo.apply(x)


def test_a_function_exchanged_after_the_symmetry_check_is_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    data = (torch.randn(6, 3), torch.randn(6, 2))
    tc.Hessian(model, nn.MSELoss(), data).dense()
    model[1] = WrongTwice()  # the calls on parameters stay what they were
    with pytest.raises(tc.UnsupportedModelError, match=r"1 \(WrongTwice\) has a wrong one"):
        tc.Hessian(model, nn.MSELoss(), data).dense()
