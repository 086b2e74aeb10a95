"""The contexts a call can be made in: without gradients, in threads, compiled, distributed, in any precision."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_curvature as tc
from torch_curvature import reference

from .test_losses_and_splits import close
from .test_state import LOSS, data, net


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(context: Any) -> None:
    model, batch = net(), data()
    truth = reference.gauss_newton(model, LOSS, batch)
    with context():
        matrix = tc.GaussNewton(model, LOSS, batch)
        close(matrix.dense().clone(), truth)
        close(matrix.diagonal()["0.weight"].flatten(), truth.diagonal()[:12])
        close(matrix @ torch.ones(len(truth)), truth.sum(1))
        assert not torch.is_grad_enabled()


def test_threads_on_different_models() -> None:
    problems = [(net(), data(n)) for n in range(3, 9)]
    truths = [reference.gauss_newton(m, LOSS, d) for m, d in problems]
    found: list[Any] = [None] * len(problems)

    def work(k: int) -> None:
        torch.set_default_dtype(torch.float64)
        for _ in range(5):
            found[k] = tc.GaussNewton(problems[k][0], LOSS, problems[k][1]).dense()
            with tc.track(problems[k][0]) as t:
                LOSS(problems[k][0](problems[k][1][0]), problems[k][1][1]).backward()
            assert t.gradient_norms().shape == (len(problems[k][1][0]),)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, truth in zip(found, truths):
        close(ours, truth)


def test_compiled_models_go_through_the_original() -> None:
    model, batch = net(), data()
    truth = reference.gauss_newton(model, LOSS, batch)
    close(tc.GaussNewton(torch.compile(model), LOSS, batch).dense(), truth)
    inner = nn.Sequential(torch.compile(model[0]), model[1], model[2])
    close(tc.GaussNewton(inner, LOSS, batch).dense(), truth)
    in_place = copy.deepcopy(model)
    in_place.compile()
    close(tc.GaussNewton(in_place, LOSS, batch).dense(), truth)
    compiled = torch.compile(model, backend="eager")
    with tc.track(compiled) as t:
        LOSS(compiled(batch[0]), batch[1]).backward()
    close(t.gradients()["0.weight"], reference.per_sample_gradients(model, LOSS, batch)["0.weight"])


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, batch = net(), data()
        wrapped = nn.parallel.DistributedDataParallel(model)
        close(tc.GaussNewton(wrapped, LOSS, batch).dense(), reference.gauss_newton(model, LOSS, batch))
        with tc.track(wrapped) as t:
            LOSS(wrapped(batch[0]), batch[1]).backward()
        close(t.gradients()["0.weight"].sum(0), model[0].weight.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_autocast_keeps_statistics_in_float32() -> None:
    model, (x, y) = net().float(), data(32)
    x = x.float()
    truth = reference.gauss_newton(copy.deepcopy(model).double(), LOSS, (x.double(), y))
    with torch.autocast("cpu", torch.bfloat16):
        matrix = tc.GaussNewton(model, LOSS, (x, y))
        dense, product = matrix.dense(), matrix @ torch.ones(len(truth), dtype=torch.float32)
        with tc.track(model) as t:
            loss = LOSS(model(x), y)
        with t:
            pass
    assert dense.dtype == product.dtype == torch.float32
    assert float((dense - truth).norm() / truth.norm()) < 0.05
    assert float((product - truth.sum(1)).norm() / truth.sum(1).norm()) < 0.05
    assert set(matrix.coverage().values()) == {"closed rule"}
    assert torch.isfinite(loss)


def test_contractions_ignore_the_callers_autocast() -> None:
    """The model here runs in float32, whatever is around it; so must all that is made of its factors."""

    class Exact(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                z = self.layers(x)
                return z.sum(1) if z.dim() == 3 else z

    model = Exact().float()
    for x in (torch.randn(6, 3), torch.randn(6, 5, 3)):
        batch = x.float(), torch.randint(4, (6,))
        truth = reference.gauss_newton(copy.deepcopy(model).double(), LOSS, (x, batch[1]))
        V = torch.randn(len(truth), 17, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            matrix = tc.GaussNewton(model, LOSS, batch)
            found = [
                matrix.dense(),
                matrix @ V,
                matrix @ V[:, 0],
                torch.cat(list(tc.Jacobian(model, batch).blocks().values()), 2),
            ]
        found[-1] = found[-1].flatten(0, 1).T @ found[-1].flatten(0, 1)
        J = reference.jacobian(copy.deepcopy(model).double(), x).flatten(0, 1)
        for ours, expected in zip(found, (truth, truth @ V.double(), truth @ V[:, 0].double(), J.T @ J), strict=True):
            assert ours.dtype == torch.float32
            assert float((ours - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    model, (x, y) = net().to(dtype), data(16)
    x = x.to(dtype)
    truth = reference.gauss_newton(copy.deepcopy(model).double(), LOSS, (x.double(), y))
    matrix = tc.GaussNewton(model, LOSS, (x, y))
    for ours, expected in (
        (matrix.dense(), truth),
        (matrix.trace(), truth.trace()),
        (torch.cat([d.flatten() for d in matrix.diagonal().values()]), truth.diagonal()),
        (matrix @ torch.ones(len(truth), dtype=torch.float32), truth.sum(1)),
    ):
        assert ours.dtype == torch.float32
        assert float((ours - expected).norm() / expected.norm()) < tolerance
    assert set(matrix.coverage().values()) == {"closed rule"}
