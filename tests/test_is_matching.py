"""Which loss matches which transfer function, with the coefficients; and the Jacobian of the softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacfwd, jacrev, vmap

import torch_curvature as tc


def test_softmax_jacobian_is_that_of_autograd() -> None:
    u = 3 * torch.randn(2, 5, 4, dtype=torch.float64)
    found = tc.softmax_jacobian(u)
    truth = vmap(vmap(jacrev(lambda v: v.softmax(-1))))(u)
    torch.testing.assert_close(found, truth)
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found.sum(-1), torch.zeros(2, 5, 4, dtype=torch.float64))
    assert torch.linalg.eigvalsh(found).min() > -1e-15
    torch.testing.assert_close(
        vmap(vmap(jacfwd(tc.softmax_jacobian)))(u), vmap(vmap(hessian(lambda v: v.softmax(-1))))(u)
    )
    with pytest.raises(ValueError, match="axis"):
        tc.softmax_jacobian(torch.tensor(1.0))


def log_likelihood(n: Tensor, y: Tensor) -> Tensor:
    return -(y * n.log()).sum()


MATCHING: dict[str, tuple[Any, Any, float]] = {
    "softmax, log likelihood": (log_likelihood, "softmax", 1.0),
    "identity, squared error": (lambda n, y: ((n - y) ** 2).sum() / 2, "identity", 1.0),
    "identity, mean squared error of torch": (nn.MSELoss(), "identity", 0.5),
    "sigmoid, cross entropy": (nn.BCELoss(reduction="sum"), "sigmoid", 1.0),
    "sigmoid, mean cross entropy": (nn.BCELoss(), torch.sigmoid, 0.25),
    "exp, Poisson": (nn.PoissonNLLLoss(log_input=False, eps=0, reduction="sum"), "exp", 1.0),
    "tanh, its cross entropy": (
        lambda n, y: -((1 + y) * (1 + n).log() + (1 - y) * (1 - n).log()).sum() / 2,
        "tanh",
        1.0,
    ),
    "scaled": (lambda n, y: 3 * log_likelihood(n, y), "softmax", 3.0),
}


@pytest.mark.parametrize("name", MATCHING)
def test_pairs_that_match(name: str) -> None:
    loss_fn, transfer, slope = MATCHING[name]
    found = tc.is_matching(loss_fn, transfer)
    assert found
    assert found.error < 1e-12
    torch.testing.assert_close(found.slope, torch.full((len(found.targets),), slope, dtype=torch.float64))
    torch.testing.assert_close(found.offset, -slope * found.targets, rtol=1e-9, atol=1e-11)


def test_a_weight_for_each_output_is_a_matrix() -> None:
    w = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    found = tc.is_matching(lambda n, y: (w * (n - y) ** 2).sum() / 2, "identity")
    assert found
    torch.testing.assert_close(found.slope, torch.diag(w).expand(3, 4, 4), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.offset, -w * found.targets)
    classes = tc.is_matching(nn.BCELoss(weight=w[:1]), "sigmoid", torch.ones(1, 1, dtype=torch.float64), size=1)
    torch.testing.assert_close(classes.slope, w[:1])


NOT_MATCHING: dict[str, tuple[Any, Any]] = {
    "softmax, squared error": (lambda n, y: ((n - y) ** 2).sum(), "softmax"),
    "sigmoid, squared error": (nn.MSELoss(), "sigmoid"),
    "tanh, squared error": (nn.MSELoss(), "tanh"),
    "exp, squared error": (nn.MSELoss(), "exp"),
    "identity, absolute error": (nn.L1Loss(), "identity"),
    "identity, a constant derivative": (lambda n, y: (n * y).sum(), "identity"),
    "softmax of two, squared error": (lambda n, y: ((n - y) ** 2).sum(), lambda u: u.softmax(-1)),
}


@pytest.mark.parametrize("name", NOT_MATCHING)
@pytest.mark.parametrize("size", [2, 4])
def test_pairs_that_do_not_match(name: str, size: int) -> None:
    found = tc.is_matching(*NOT_MATCHING[name], size=size)
    assert not found
    assert found.slope is None
    assert found.offset is None


def test_pairs_that_cannot_be_tried() -> None:
    with pytest.raises(ValueError, match=r"scalar.*\(1, 4\)"):
        tc.is_matching(nn.MSELoss(reduction="none"), "identity")
    with pytest.raises(ValueError, match="transfer must be one of"):
        tc.is_matching(nn.MSELoss(), "linear")
