"""Columns go through the layers a few at a time where that is faster; results do not depend on how many."""

import pytest
import torch
from torch import nn

import torch_curvature as tc
from torch_curvature.backprop import Backpropagation
from torch_curvature.matrices import base


@pytest.mark.parametrize("columns", [0, 1, 3, 7])
@pytest.mark.parametrize("what", ["diagonal", "kronecker", "trace", "gram"])
def test_few_columns_at_a_time(what: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("columns are cut for the CPU's allocator alone")
    conv = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*conv, nn.Linear(16, 5)).double()
    x, y = torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.randint(5, (6,))
    largest = 6 * 3 * 25 * 8
    at_once = []
    to_edges = Backpropagation.to_edges
    monkeypatch.setattr(Backpropagation, "to_edges", lambda b, c: at_once.append(len(c)) or to_edges(b, c))

    def ask(block: int) -> list[torch.Tensor]:
        monkeypatch.setattr(base, "RETURNED_BYTES", block)
        found = getattr(tc.GaussNewton(model, nn.CrossEntropyLoss(), (x, y)), what)()
        if isinstance(found, torch.Tensor):
            return [found]
        return [t for value in found.values() for t in (value if isinstance(value, tuple) else (value,))]

    ask(1 << 25)  # checks the rules with columns of its own
    at_once.clear()
    whole = ask(1 << 25)
    (total,) = at_once
    at_once.clear()
    cut = ask(columns * largest + 1)
    most = columns if 0 < columns < total else total
    assert max(at_once) == most
    assert sum(at_once) == total
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other)
