"""Matching losses: values by closed forms, derivatives by those of the transfer function, and who matches whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.integration import quadrature

from .transfers import TRANSFERS, softplus

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "tanh": torch.tanh,
}


def targets_of(name: str, u: Tensor) -> Tensor:
    """Within the range of the transfer."""
    return {"identity": lambda: 3 * torch.randn_like(u), "exp": lambda: 4 * torch.rand_like(u)}.get(
        name, lambda: torch.rand_like(u) if name == "sigmoid" else 2 * torch.rand_like(u) - 1
    )()


def points() -> Tensor:
    u = torch.cat([5 * torch.randn(60), torch.randn(20) / 50, torch.tensor([0.0, 1.0, -1.0, 169.9, 300.0, -1e3, 1e4])])
    return u.double()


@pytest.mark.parametrize("name", TRANSFERS)
def test_the_integral_of_any_monotone_function(name: str) -> None:
    h, truth = TRANSFERS[name]
    u = points()
    found = quadrature(h, u)
    expected = truth(u)
    error = (found - expected).abs()
    # Rounding of the truth where its terms cancel: a few units of the last place of u times h.
    assert (error <= 1e-14 * expected.abs() + 4e-16 * u.abs() + 1e-300).all(), float(
        (error / expected.abs()).nan_to_num().max()
    )


@pytest.mark.parametrize("name", TRANSFERS)
def test_a_loss_of_a_user_has_the_error_for_its_gradient(name: str) -> None:
    h, truth = TRANSFERS[name]
    loss_fn = tc.MatchingLoss(h, reduction="none")
    u = points()
    if name == "cube root":  # its slope is infinite at zero
        u = u[u != 0]
    y = torch.randn_like(u)
    torch.testing.assert_close(loss_fn(u, y), truth(u) - y * u, rtol=1e-13, atol=1e-13)
    variable = u.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_fn(variable, y).sum(), variable, create_graph=True)
    torch.testing.assert_close(first, h(u) - y, rtol=1e-14, atol=1e-14)
    if name == "jump":
        assert not first.requires_grad
        return
    (second,) = torch.autograd.grad(first.sum(), variable)
    (slope,) = torch.autograd.grad(h(variable).sum(), variable)
    torch.testing.assert_close(second, slope, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_named_losses_have_the_error_for_their_gradient(name: str) -> None:
    h = ELEMENTWISE[name]
    u = 4 * torch.randn(50, dtype=torch.float64)
    y = targets_of(name, u)
    named, own = tc.MatchingLoss(name, reduction="sum"), tc.MatchingLoss(h, reduction="sum")
    torch.testing.assert_close(named.output(u), h(u))
    for loss_fn in (named, own):
        torch.testing.assert_close(grad(loss_fn)(u, y), h(u) - y, rtol=1e-13, atol=1e-14)
        slope = vmap(grad(h))(u)
        torch.testing.assert_close(hessian(loss_fn)(u, y), torch.diag(slope), rtol=1e-12, atol=1e-14)
        assert (slope >= 0).all()
        for forward in (jacfwd(jacfwd(loss_fn)), jacrev(jacrev(loss_fn)), jacrev(jacfwd(loss_fn))):
            torch.testing.assert_close(forward(u, y), torch.diag(slope), rtol=1e-12, atol=1e-14)
    # The same up to a constant in u.
    difference = named(u, y) - own(u, y)
    other = 2 * torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(named(other, y) - own(other, y), difference, rtol=1e-12, atol=1e-11)


def test_named_losses_are_those_of_torch() -> None:
    u, y = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    assert_close = torch.testing.assert_close
    for reduction in ("mean", "sum", "none"):
        assert_close(tc.MatchingLoss("identity", reduction=reduction)(u, y), F.mse_loss(u, y, reduction=reduction) / 2)
        expected = F.binary_cross_entropy_with_logits(u, y, reduction=reduction)
        assert_close(tc.MatchingLoss("sigmoid", reduction=reduction)(u, y), expected)
        assert_close(tc.MatchingLoss("exp", reduction=reduction)(u, y), F.poisson_nll_loss(u, y, reduction=reduction))
        softmax = tc.MatchingLoss("softmax", reduction=reduction)
        classes = torch.randint(4, (6,))
        assert_close(softmax(u, classes), F.cross_entropy(u, classes, reduction=reduction))
        assert_close(softmax(u, F.one_hot(classes, 4)), F.cross_entropy(u, classes, reduction=reduction))
        soft = y.softmax(-1)
        assert_close(softmax(u, soft), F.cross_entropy(u, soft, reduction=reduction))
        tokens, image = torch.randint(4, (6, 5)), torch.randn(6, 4, 5, dtype=torch.float64)
        assert_close(softmax(image, tokens), F.cross_entropy(image, tokens, reduction=reduction))
        last = tc.MatchingLoss("softmax", reduction=reduction, dim=-1)
        assert_close(last(image.mT, tokens), F.cross_entropy(image, tokens, reduction=reduction))


def test_softmax_matches_targets_that_do_not_sum_to_one() -> None:
    u, y = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    loss_fn = tc.MatchingLoss("softmax", reduction="sum")
    torch.testing.assert_close(grad(loss_fn)(u, y), u.softmax(-1) - y)
    matrix = hessian(loss_fn)(u, y)
    blocks = torch.stack([matrix[n, :, n] for n in range(3)])
    torch.testing.assert_close(blocks, tc.softmax_jacobian(u))


@pytest.mark.parametrize("name", ["identity", "sigmoid", "tanh", "exp"])
def test_single_precision_up_to_ten_thousand(name: str) -> None:
    extremes = torch.tensor([0.0, 1e-3, 0.1, 1, 8, 17, 30, 80, 200, 1e3, 1e4])
    u = torch.cat([extremes, -extremes])
    if name == "exp":
        u = u[u <= 80]
    ends = {"identity": (-2.0, 3.0), "sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "exp": (0.0, 5.0)}[name]
    for y in (torch.full_like(u, end) for end in ends):
        loss_fn = tc.MatchingLoss(name, reduction="none")
        double = u.double()
        truth = {
            "identity": lambda v, t: (v - t) ** 2 / 2,
            "sigmoid": lambda v, t: softplus(v if t[0] == 0 else -v),
            "tanh": lambda v, t: softplus(-2 * v * t) - math.log(2),
            "exp": lambda v, t: v.exp() - t * v,
        }[name](double, y.double())
        found = loss_fn(u, y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=3e-7 if name == "tanh" else 1e-37)
        variable = u.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss_fn(variable, y).sum(), variable, create_graph=True)
        torch.testing.assert_close(first.double(), ELEMENTWISE[name](double) - y.double(), rtol=1e-6, atol=2e-7)
        (second,) = torch.autograd.grad(first.sum(), variable)
        assert second.isfinite().all()
        torch.testing.assert_close(second.double(), vmap(grad(ELEMENTWISE[name]))(double), rtol=1e-5, atol=1e-7)


def test_softmax_in_single_precision_up_to_ten_thousand() -> None:
    u = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4 - 2, -1e4], [-1e4, -1e4, -1e4]])
    for c in range(3):
        y = torch.full((3,), c)
        loss_fn = tc.MatchingLoss("softmax", reduction="none")
        truth = F.cross_entropy(u.double(), y, reduction="none")
        torch.testing.assert_close(loss_fn(u, y).double(), truth, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(loss_fn(u, F.one_hot(y, 3)).double(), truth, rtol=1e-6, atol=1e-7)
        gradient = grad(lambda v, y=y: tc.MatchingLoss("softmax", reduction="sum")(v, y))(u)
        torch.testing.assert_close(gradient, u.softmax(-1) - F.one_hot(y, 3))
    masked = torch.tensor([[0.3, -torch.inf, 1.0]])
    assert tc.MatchingLoss("softmax")(masked, torch.tensor([[0.0, 0.0, 1.0]])).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_numerical_loss_keeps_the_type_and_shape_of_its_input(dtype: torch.dtype) -> None:
    loss_fn = tc.MatchingLoss(torch.atan, reduction="none")
    for shape in ((), (3,), (2, 0, 3), (2, 3, 4)):
        u = torch.randn(shape, dtype=dtype)
        found = loss_fn(u, torch.zeros_like(u))
        assert found.shape == u.shape
        assert found.dtype == dtype
        exact = TRANSFERS["arctan"][1](u.double())
        torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
    u = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0])
    found = quadrature(torch.atan, u.double())
    assert found[:2].tolist() == [torch.inf, torch.inf]
    assert found[2].isnan()
    assert loss_fn(u, torch.zeros(4))[3] == loss_fn(u[3], torch.zeros(()))


def test_derivatives_of_a_numerical_loss_of_every_order_in_every_mode() -> None:
    loss_fn = tc.MatchingLoss(torch.sigmoid, reduction="sum")
    y = torch.tensor(0.3, dtype=torch.float64)

    def plain(u: Tensor) -> Tensor:
        return -F.logsigmoid(-u) - 0.3 * u

    for transform in (grad, jacrev, jacfwd):
        found, truth = (lambda u: loss_fn(u, y)), plain
        for _ in range(6):
            found, truth = transform(found), transform(truth)
            u = torch.randn((), dtype=torch.float64)
            torch.testing.assert_close(found(u), truth(u), rtol=1e-11, atol=1e-13)
    u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss_fn, (u, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss_fn, (u, y), check_fwd_over_rev=True)
    many = vmap(hessian(loss_fn))(u.detach(), y)
    torch.testing.assert_close(many, torch.diag_embed(u.sigmoid() * (-u).sigmoid()).detach())
    across = vmap(lambda v, t: loss_fn(v, t), in_dims=1)(u.detach(), y)
    torch.testing.assert_close(across, torch.stack([loss_fn(u[:, k], y[:, k]) for k in range(4)]).detach())


def test_training_with_a_matching_loss_of_the_user_is_training_with_that_of_torch() -> None:
    x = torch.randn(64, 3, dtype=torch.float64)
    y = (x.sum(1, keepdim=True) > 0).double()
    weights = []
    for loss_fn in (tc.MatchingLoss(torch.sigmoid), tc.MatchingLoss("sigmoid"), nn.BCEWithLogitsLoss()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(25):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert losses[-1] < losses[0]  # it did learn
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("transfer", "whole"), [("sigmoid", True), ("softmax", True), (torch.atan, False)])
def test_compiled(transfer: Any, whole: bool) -> None:
    loss_fn = tc.MatchingLoss(transfer)
    compiled = torch.compile(loss_fn, fullgraph=whole, backend="aot_eager")
    u, y = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    found, truth = (u.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(found, y), loss_fn(truth, y))
    gradients = (torch.autograd.grad(f(v, y), v)[0] for f, v in ((compiled, found), (loss_fn, truth)))
    torch.testing.assert_close(*gradients)


def test_the_residual_of_a_perfect_fit_vanishes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for transfer in ("sigmoid", torch.atan, "tanh"):
        loss_fn = tc.MatchingLoss(transfer)
        data = (x, loss_fn.output(model(x)).detach())
        assert reference.residual(model, loss_fn, data).abs().max() < 1e-15
        whole = reference.hessian(model, loss_fn, data)
        torch.testing.assert_close(whole, reference.gauss_newton(model, loss_fn, data), rtol=1e-10, atol=1e-14)
        assert torch.linalg.eigvalsh(whole).min() > -1e-14


@pytest.mark.parametrize("name", TRANSFERS)
def test_every_matching_loss_matches_its_transfer(name: str) -> None:
    """Seen from the inputs u: the derivative of the loss is the output of the transfer, plus what y gives."""
    h = TRANSFERS[name][0]
    u = 2 * torch.randn(30, dtype=torch.float64)
    y = torch.randn(30, dtype=torch.float64)
    torch.testing.assert_close(grad(tc.MatchingLoss(h, reduction="sum"))(u, y) + y, h(u))


BAD_TRANSFERS: dict[str, tuple[Any, str]] = {
    "unknown name": ("relu6", "one of .*'softmax'"),
    "decreasing": (lambda t: -t, "must not decrease"),
    "not monotone": (torch.sin, "must not decrease"),
    "mixes elements": (lambda t: t.cumsum(0).tanh(), "elementwise"),
    "sums": (torch.sum, r"elementwise.*\(\)"),
    "undefined": (torch.log, "must not decrease"),
    "trainable": (nn.PReLU(), "trainable"),
    "captures a parameter": (lambda t: t * SLOPE, "requires grad"),
}
SLOPE = torch.tensor(2.0, requires_grad=True)


@pytest.mark.parametrize("name", BAD_TRANSFERS)
def test_transfers_that_are_refused(name: str) -> None:
    transfer, message = BAD_TRANSFERS[name]
    with pytest.raises(ValueError, match=message):
        tc.MatchingLoss(transfer)


def test_inputs_that_are_refused() -> None:
    loss_fn = tc.MatchingLoss("sigmoid")
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3,\)"):
        loss_fn(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(TypeError, match="int64"):
        loss_fn(torch.zeros(3).long(), torch.zeros(3))
    with pytest.raises(ValueError, match="reduction"):
        tc.MatchingLoss("sigmoid", reduction="average")
    softmax = tc.MatchingLoss("softmax")
    with pytest.raises(ValueError, match=r"\(3, 2\) and y \(4,\)"):
        softmax(torch.zeros(3, 2), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 5\)"):
        softmax(torch.zeros(3, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="dim=1"):
        softmax(torch.zeros(3), torch.tensor(1))
