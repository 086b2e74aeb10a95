"""Bad input gets an error that names the argument, what was got, and what to do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_curvature.losses import interpret

partial = functools.partial
NAN = float("nan")


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


INTERPRET: dict[str, tuple[Any, type[Exception], str]] = {
    "not callable": ("cross_entropy", TypeError, r"a callable \(outputs, targets\), got str"),
    "no reduction": (nn.MSELoss(reduction="none"), ValueError, "got 'none'"),
    "reduce=False": (partial(F.mse_loss, reduce=False), ValueError, "got 'none'"),
    "batchmean elsewhere": (partial(F.mse_loss, reduction="batchmean"), ValueError, "got 'batchmean'"),
    "unknown option": (partial(F.cross_entropy, smoothing=0.1), TypeError, "smoothing"),
    "gaussian module": (nn.GaussianNLLLoss(), TypeError, "third argument, the variance"),
    "gaussian without variance": (F.gaussian_nll_loss, TypeError, "var"),
}


@pytest.mark.parametrize("name", INTERPRET)
def test_interpret(name: str) -> None:
    loss_fn, kind, message = INTERPRET[name]
    with pytest.raises(kind, match=message):
        interpret(loss_fn)


def test_unknown_reduction_of_a_callable() -> None:
    with pytest.raises(ValueError, match="reduction must be 'sum', 'mean' or None"):
        interpret(lambda u, y: u.sum(), reduction="none")


Y = torch.tensor([0, 1, 2])
BIND: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "outputs a tuple": (F.mse_loss, (logits(3, 2),), logits(3, 2), TypeError, "one tensor, got tuple"),
    "integer outputs": (F.mse_loss, Y, Y, TypeError, r"floating dtype, got torch\.int64"),
    "complex outputs": (F.mse_loss, logits(3).cfloat(), Y, TypeError, "real floating dtype"),
    "no batch axis": (F.mse_loss, logits(), logits(), ValueError, "must have a batch axis"),
    "NaN outputs": (F.mse_loss, logits(3, 2) * NAN, logits(3, 2), ValueError, "outputs holds? NaN"),
    "NaN logits": (F.cross_entropy, logits(3, 4) * NAN, Y, ValueError, "outputs hold NaN"),
    "infinite logits": (F.cross_entropy, torch.full((3, 4), torch.inf), Y, ValueError, "infinity"),
    "NaN log probabilities": (F.nll_loss, logits(3, 4) * NAN, Y, ValueError, "outputs hold NaN"),
    "NaN targets": (F.mse_loss, logits(3, 2), logits(3, 2) * NAN, ValueError, "target holds NaN"),
    "NaN probabilities": (F.cross_entropy, logits(3, 4), logits(3, 4) * NAN, ValueError, "target probabilities"),
    "NaN weight": (partial(F.cross_entropy, weight=logits(4) * NAN), logits(3, 4), Y, ValueError, "weight holds NaN"),
    "NaN callable": (lambda u, y: u.sum(), logits(3, 4) * NAN, None, ValueError, "outputs hold NaN"),
    "target no tensor": (F.cross_entropy, logits(3, 4), [0, 1, 2], TypeError, "target must be a tensor, got list"),
    "target elsewhere": (F.cross_entropy, logits(3, 4), Y.to("meta"), ValueError, "target is on meta"),
    "weight elsewhere": (
        partial(F.cross_entropy, weight=logits(4).to("meta")), logits(3, 4), Y, ValueError, "is on meta"),
    "weight too short": (partial(F.cross_entropy, weight=logits(3)), logits(3, 4), Y, ValueError, "of the 4 classes"),
    "no class axis": (F.cross_entropy, logits(3), Y, ValueError, r"\[N, C, \.\.\.\]"),
    "classes last": (F.cross_entropy, logits(3, 7, 4), torch.zeros(3, 7).long(), ValueError, r"shape \[3, 4\]"),
    "int32 target": (F.cross_entropy, logits(3, 4), Y.int(), TypeError, "dtype int64"),
    "float target": (F.cross_entropy, logits(3, 4), Y.float(), TypeError, "or probabilities of shape"),
    "index too large": (F.cross_entropy, logits(3, 2), Y, ValueError, r"outside \[0, 1\]"),
    "index negative": (F.nll_loss, logits(3, 4), Y - 1, ValueError, r"outside \[0, 3\]"),
    "ignore_index and probabilities": (
        partial(F.cross_entropy, ignore_index=1), logits(3, 4), logits(3, 4), ValueError, "no meaning for probability"),
    "smoothing": (partial(F.cross_entropy, label_smoothing=1.5), logits(3, 4), Y, ValueError, r"in \[0, 1\]"),
    "broadcast to a square": (F.mse_loss, logits(3, 1), logits(3), ValueError, "mixed"),
    "target larger": (F.mse_loss, logits(3, 1), logits(3, 2), ValueError, "does not match"),
    "batch sizes": (F.l1_loss, logits(3, 2), logits(4, 2), ValueError, "does not match"),
    "bce broadcast": (F.binary_cross_entropy_with_logits, logits(3, 2), torch.ones(3, 1), ValueError, "the shape"),
    "pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), logits(3, 2), torch.ones(3, 2), ValueError, "pos_weight of"),
    "mse weight": (
        partial(F.mse_loss, weight=torch.ones(2)), logits(3, 2), torch.ones(3, 2), ValueError, "weight must have"),
    "probability outside": (F.binary_cross_entropy, logits(3, 2) + 2, torch.ones(3, 2), ValueError, "strictly between"),
    "rate negative": (nn.PoissonNLLLoss(log_input=False), -torch.ones(3), torch.ones(3), ValueError, "be positive"),
    "variance negative": (partial(F.gaussian_nll_loss, var=-1.0), logits(3), logits(3), ValueError, "negative entries"),
    "delta": (partial(F.huber_loss, delta=0.0), logits(3), logits(3), ValueError, "delta must be positive"),
    "callable without samples": (lambda u, y: u.sum(), logits(0, 3), None, ValueError, "batch of no samples"),
    "callable's targets": (lambda u, y: (u * y.sum()).sum(), logits(3, 2), logits(2, 2), ValueError, "on axis 0"),
    "targets of text": (lambda u, y: (u * len(y)).sum(), logits(3, 2), "abc", TypeError, "targets hold a str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BIND)
def test_bind(name: str) -> None:
    loss_fn, outputs, targets, kind, message = BIND[name]
    with pytest.raises(kind, match=message):
        interpret(loss_fn).bind(outputs, targets)


def test_arguments_of_a_bound_loss() -> None:
    for loss_fn, targets in ((F.cross_entropy, Y), (F.mse_loss, logits(3, 4)), (F.nll_loss, Y)):
        bound = interpret(loss_fn).bind(logits(3, 4), targets)
        with pytest.raises(ValueError, match=r"u must have shape \[K, 3, 4\], got \[3, 4\]"):
            bound.hessian_product(logits(3, 4))
    with pytest.raises(ValueError, match="max_columns must be at least 1"):
        list(interpret(F.cross_entropy).bind(logits(3, 4), Y).columns(0))


def test_masked_classes_are_legitimate() -> None:
    """A logit of -infinity is a class of probability zero."""
    outputs = logits(3, 4)
    outputs[:, 3] = -torch.inf
    bound = interpret(F.cross_entropy).bind(outputs, Y)
    small = interpret(F.cross_entropy).bind(outputs[:, :3], Y)
    torch.testing.assert_close(bound.value(), small.value())
    torch.testing.assert_close(bound.gradient()[:, :3], small.gradient())
    u = logits(2, 3, 4)
    torch.testing.assert_close(bound.hessian_product(u)[..., :3], small.hessian_product(u[..., :3]))
    (s, _), (t, _) = next(bound.columns()), next(small.columns())
    torch.testing.assert_close(torch.einsum("vni,vnj->nij", s, s)[:, :3, :3], torch.einsum("vni,vnj->nij", t, t))
    assert not s[..., 3].any()


def test_empty_batches() -> None:
    for loss_fn, outputs, targets in (
        (F.cross_entropy, logits(0, 4, 2), torch.zeros(0, 2).long()),
        (F.mse_loss, logits(0, 4), logits(0, 4)),
        (F.nll_loss, logits(0, 4), torch.zeros(0).long()),
    ):
        loss = interpret(loss_fn)
        bound = loss.bind(outputs, targets)
        assert bound.value() == 0
        assert bound.num_columns == 0
        assert list(bound.columns()) == []
        assert bound.gradient().shape == outputs.shape
        assert bound.sample_columns(2).shape == (2, *outputs.shape) if loss_fn is not F.nll_loss else True
        with pytest.raises(ValueError, match="over nothing"):
            loss.combine([bound.denominator])
