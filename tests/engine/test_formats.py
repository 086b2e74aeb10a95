"""Images go channels last through sequences of torch's own modules, and through nothing else."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_curvature as tc
from torch_curvature import reference
from torch_curvature.matrices.formats import INDIFFERENT, in_faster_format

pytestmark = pytest.mark.usefixtures("on_the_cpu", "float32")

LOSS = nn.CrossEntropyLoss()
N = 4


@pytest.fixture
def float32(on_the_cpu: None) -> None:
    torch.set_default_dtype(torch.float32)  # that of the other tests comes back with them


def small(*more: nn.Module, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, stride=2), nn.ReLU(), *more, nn.Flatten(), nn.LazyLinear(5)
    )


def _with(kind: Any, channels: int) -> nn.Module:
    return small(kind(*MODULES.get(kind, ())), channels=channels).eval()


def nested(channels: int) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Sequential(nn.SiLU(), nn.MaxPool2d(2)))
    return nn.Sequential(small(block, nn.AdaptiveAvgPool2d(1), channels=channels), nn.Tanh(), nn.Linear(5, 5)).eval()


def turned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) == x.shape[1]


MODULES: dict[Any, tuple[Any, ...]] = {
    nn.Conv2d: (8, 4, 3), nn.BatchNorm2d: (8,), nn.GroupNorm: (2, 8), nn.AvgPool2d: (2,), nn.MaxPool2d: (2,),
    nn.AdaptiveAvgPool2d: ((3, 2),), nn.AdaptiveMaxPool2d: ((3, 2),), nn.ZeroPad2d: ((1, 0, 2, 1),),
}  # fmt: skip
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "nested": lambda channels: nested(channels),
    **{kind.__name__: partial(_with, kind) for kind in sorted(INDIFFERENT, key=str)},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_results_are_right(name: str, channels: int) -> None:
    model, x = MODELS[name](channels), torch.randn(N, channels, 11, 10)
    model(x)
    before = x.clone(), x.stride()
    assert turned(in_faster_format(model, x))
    data, exact = (x, torch.arange(N) % 5), deepcopy(model).double()
    precise = x.double(), data[1]
    assert not turned(in_faster_format(exact, precise[0]))  # torch convolves no faster there
    G = reference.gauss_newton(exact, LOSS, precise)
    ours = tc.GaussNewton(model, LOSS, data)
    close(torch.cat([d.flatten() for d in ours.diagonal().values()]), G.diagonal())
    v = torch.randn(len(G))
    close(ours @ v, G @ v.double())
    close(ours.dense(), G)
    blocks = {name: reference.gauss_newton(exact, LOSS, precise, only=[name]) for name, _ in exact.named_parameters()}
    for name, block in ours.blocks().items():
        close(block, blocks[name])
    H = reference.hessian(exact, LOSS, precise)
    close(tc.Hessian(model, LOSS, data) @ v, H @ v.double())
    kronecker = tc.GaussNewton(exact, LOSS, precise).kronecker()  # in float64 the general way
    for name, factors in ours.kronecker().items():
        for found, truth in zip(factors, kronecker[name], strict=True):
            close(found, truth)
    rows = gradients(exact, *precise)
    E = tc.EmpiricalFisher(model, LOSS, data)
    close(E.gradient_norms(), rows.norm(dim=1))
    close(E.gram(), rows @ rows.T / N)
    close(E.dense(), reference.empirical_fisher(exact, LOSS, precise))
    J = reference.jacobian(exact, precise[0])
    close(tc.Jacobian(model, x).gram(), torch.einsum("ncp,mdp->ncmd", J, J))
    assert torch.equal(x, before[0])
    assert x.stride() == before[1]


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[N, P], of each sample's loss."""
    losses = (LOSS(model(x[n : n + 1]), y[n : n + 1]) for n in range(len(x)))
    rows = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def close(ours: Tensor, truth: Tensor) -> None:
    assert float((ours.double() - truth).norm()) <= 2e-5 * float(truth.norm())


def hooked(add: Callable[[nn.Module], Any]) -> nn.Module:
    model = small()
    add(model[1])
    return model


class Own(nn.Sequential):
    pass


def with_own_forward() -> nn.Module:
    model = small()
    model[1].forward = lambda x: x.view(len(x), -1)
    return model


AS_THEY_ARE: dict[str, Callable[[], nn.Module]] = {
    "a class of one's own": lambda: Own(*small()),
    "a module of one's own": lambda: small(Own()),
    "a container of modules of one's own": lambda: small(nn.Sequential(Own())),
    "a forward of one's own": with_own_forward,
    "forward hook": lambda: hooked(lambda m: m.register_forward_hook(lambda *_: None)),
    "forward pre-hook": lambda: hooked(lambda m: m.register_forward_pre_hook(lambda *_: None)),
    "backward hook": lambda: hooked(lambda m: m.register_full_backward_hook(lambda *_: None)),
    "backward pre-hook": lambda: hooked(lambda m: m.register_full_backward_pre_hook(lambda *_: None)),
    "images come out": lambda: small()[:2],
    "flattened in part": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(2)),
    "rows flattened first": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(0, 1)),
    "no convolution first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)),
    "a parametrised convolution": lambda: nn.utils.parametrizations.weight_norm(small()[0]),
    "flattened at once": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)),
    "nothing": nn.Sequential,
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_others_get_them_as_they_are(name: str) -> None:
    x = torch.randn(N, 3, 6, 6)
    assert in_faster_format(AS_THEY_ARE[name](), x) is x


def test_hooks_of_all_modules() -> None:
    x, handle = torch.randn(N, 3, 6, 6), nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert in_faster_format(small(), x) is x
    finally:
        handle.remove()
    assert turned(in_faster_format(small(), x))


@pytest.mark.parametrize("x", [torch.randn(3, 6, 6), torch.randn(2, 3, 6, 6).half(), torch.ones(2, 3, 6, 6).int()])
def test_what_is_no_batch_of_images_stays(x: Tensor) -> None:
    assert in_faster_format(small(), x) is x


def test_the_modules_see_that_format() -> None:
    seen: list[bool] = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.conv2d:
                seen.append(turned(args[0]))
            return func(*args, **(kwargs or {}))

    with Watching():
        model, x = small(), torch.randn(N, 3, 6, 6)
        model(x)
        seen.clear()
        tc.GaussNewton(model, LOSS, (x, torch.zeros(N, dtype=torch.long))).diagonal()
    assert seen
    assert all(seen)
