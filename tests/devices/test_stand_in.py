"""The stand-in refuses what a GPU refuses and counts what a GPU waits for; else the tests on it would show nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .stand_in import DEVICE, DeviceTensor, StandIn, on_device, same, stand_in

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a sum with a tensor of the CPU": lambda x: x + torch.ones(3, 3),
    "a product with one": lambda x: torch.zeros(3) @ x,
    "writing into one": lambda x: torch.zeros(3, 3).add_(x),
    "a lookup of rows by one": lambda x: x.index_select(0, torch.tensor([0])),
    "adding at rows of one": lambda x: x.index_add(0, torch.tensor([0]), x[:1]),
    "an embedding of one": lambda x: nn.functional.embedding(torch.tensor([0]), x),
    "joining with one": lambda x: torch.cat([x, torch.ones(1, 3)]),
    "out= on the CPU": lambda x: torch.mm(x, x, out=torch.empty(3, 3)),
    "a loss with targets on the CPU": lambda x: nn.functional.cross_entropy(x, torch.zeros(3, dtype=torch.long)),
    "draws with a generator of the CPU": lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
    "draws in place with one": lambda x: x.normal_(generator=torch.Generator()),
    "its memory": lambda x: x.numpy(),
    "a gradient on the CPU": lambda x: torch.autograd.grad(x.requires_grad_().square(), x, torch.ones(3, 3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with stand_in():
        x = DeviceTensor(torch.rand(3, 3))
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[what](x)


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x[0, 0]),
    "a condition": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("what", READS)
def test_reads_are_counted(what: str) -> None:
    with stand_in() as gpu:
        x = DeviceTensor(torch.rand(3, 3))
        assert not gpu.reads
        READS[what](x)
        assert sum(gpu.reads.values()) == 1


def test_sends_are_counted() -> None:
    with stand_in() as gpu:
        x = torch.ones(3).to(DEVICE)
        assert x[torch.tensor([0, 2])].shape == (2,)
        x.copy_(torch.zeros(3))
        torch.tensor([1.0, 2.0], device=DEVICE)
        assert sum(gpu.sends.values()) == 4


def test_tensors_say_where_they_are() -> None:
    with stand_in():
        for x in (torch.zeros(2, device="cuda"), torch.arange(3, device="cuda"), torch.eye(2, device="cuda").mT):
            assert isinstance(x, DeviceTensor)
            assert x.device == DEVICE
            assert x.is_cuda
            assert x.new_zeros(2).device == x.new_tensor(1.0).device == torch.empty_like(x).device == DEVICE
        assert torch.zeros(2).device.type == "cpu"
        x = torch.zeros(2, 3, device="cuda")
        assert x.data_ptr() == x.view(6).data_ptr() != torch.zeros(2, 3, device="cuda").data_ptr()
        assert DeviceTensor(torch.arange(4.0))[[3, 1]].tolist() == [3.0, 1.0]
        model = on_device(nn.LSTM(2, 3))
        assert {p.device for p in model.parameters()} == {DEVICE}
        assert model._flat_weights[0] is model.weight_ih_l0


def test_draws_come_from_the_device() -> None:
    with stand_in() as gpu:
        before, state = torch.get_rng_state(), gpu.generator.get_state()
        x = DeviceTensor(torch.rand(3, 3))
        before = torch.get_rng_state()
        first = nn.functional.dropout(x)
        assert torch.equal(torch.get_rng_state(), before)
        gpu.generator.set_state(state)
        assert torch.equal(nn.functional.dropout(x).host, first.host)
        a, b = (torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) for _ in range(2))
        assert torch.equal(a.host, b.host)


def test_values_and_gradients_are_those_of_the_cpu() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with stand_in():
        moved, y = on_device(model), on_device(x)
        same(torch.autograd.grad(moved(y).square().sum(), list(moved.parameters())), expected)
    with pytest.raises(AssertionError, match="outside of the stand-in"):
        moved(y)


def test_what_is_compared() -> None:
    with stand_in() as gpu:
        assert isinstance(gpu, StandIn)
        with pytest.raises(AssertionError, match="a result on cpu"):
            same(torch.ones(2), torch.ones(2))
        with pytest.raises(AssertionError):
            same(DeviceTensor(torch.ones(2)), torch.ones(2) + 1e-9)
