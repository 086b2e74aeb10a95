"""The result over batches equals the result over the concatenated data, however unequal the batches are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.loss_cases import GRID, IDS, Case, indices, normal
from tests.losses.loss_oracle import full_gradient, sum_of_columns
from torch_curvature.losses import interpret

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def totals(case: Case, reduction: str, outputs: Tensor, targets: Tensor, sizes: list[int]) -> list[Tensor]:
    """Value, gradient, Hessians of all samples, each divided by the combined denominator."""
    loss = interpret(case.loss(reduction))
    values, gradients, hessians, denominators = [], [], [], []
    for u, y in zip(outputs.split(sizes), targets.split(sizes)):
        bound = loss.bind(u, y)
        values.append(bound.value())
        gradients.append(bound.gradient())
        hessians.append(sum_of_columns(bound.columns(4), u.shape))
        denominators.append(bound.denominator)
    total = loss.combine(denominators)
    assert total.dtype == torch.float64
    assert total.shape == ()
    return [torch.stack(values).sum() / total, torch.cat(gradients) / total, torch.cat(hessians) / total]


@pytest.mark.parametrize(("case", "reduction"), GRID, ids=IDS)
def test_any_split(case: Case, reduction: str) -> None:
    outputs, targets = case.draw(9, torch.Generator().manual_seed(12))
    whole = totals(case, reduction, outputs, targets, [9])
    torch.testing.assert_close(whole[0], case.loss(reduction)(outputs, targets))
    for sizes in ([1, 8], [4, 3, 2], [1] * 9):
        for got, expected in zip(totals(case, reduction, outputs, targets, sizes), whole):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("flat", [False, True])
def test_one_batch_of_ignored_targets_among_others(flat: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    outputs, y = normal(generator, 6, 5, 4), indices(generator, 5, (6, 4), -100)
    y[2:4] = -100
    loss_fn = (lambda u, t: F.cross_entropy(u.mT.reshape(-1, 5), t.reshape(-1))) if flat else F.cross_entropy
    loss = interpret(loss_fn)
    parts = [loss.bind(u, t) for u, t in zip(outputs.split(2), y.split(2))]
    assert parts[1].num_columns == 0
    assert list(parts[1].columns()) == []
    total = loss.combine([b.denominator for b in parts])
    gradient = torch.cat([b.gradient() for b in parts]) / total
    torch.testing.assert_close(gradient, full_gradient(F.cross_entropy, outputs, y))
    with pytest.raises(ValueError, match="the mean is over nothing"):
        loss.combine([parts[1].denominator])
    with pytest.raises(ValueError, match="no batch"):
        loss.combine([])


def test_callables_combine_by_the_number_of_samples() -> None:
    generator = torch.Generator().manual_seed(3)
    outputs, y = normal(generator, 7, 3), normal(generator, 7, 3)

    def loss_fn(u: Tensor, t: Tensor) -> Tensor:
        return ((u - t) ** 4).mean()

    loss = interpret(loss_fn)
    parts = [loss.bind(u, t) for u, t in zip(outputs.split([1, 4, 2]), y.split([1, 4, 2]))]
    total = loss.combine([b.denominator for b in parts])
    assert total == 7
    torch.testing.assert_close(sum(b.value() for b in parts) / total, loss_fn(outputs, y))
    torch.testing.assert_close(torch.cat([b.gradient() for b in parts]) / total, full_gradient(loss_fn, outputs, y))
