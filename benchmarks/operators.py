"""Workloads of single operators, against the plain torch operations that they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_curvature as tc

OURS = "torch_curvature"
Built = tuple[dict[str, Callable], Callable[[], Tensor], float, float, float]


@dataclass
class OperatorWorkload:
    name: str
    title: str
    target: str
    build: Callable[[torch.device], Built]  # contestants, reference, flops, bytes, tolerance
    quick: bool = True


def _contest(calls: dict[str, Callable[[], Tensor]], check: Callable[[Tensor], Tensor]) -> dict[str, Callable]:
    return {name: (lambda call=call: (call, check)) for name, call in calls.items()}


def _sample(result: Tensor) -> Tensor:
    """A few thousand entries spread over the result: all of a GiB in float64 would take longer than all runs."""
    flat = result.reshape(-1)
    return flat[:: max(1, flat.numel() // 5000)].double()


def _outer(B: int, n: int, dtype: torch.dtype, reuse: bool) -> Callable[[torch.device], Built]:
    def build(device: torch.device) -> Built:
        torch.manual_seed(0)
        u, v = (torch.randn(B, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(B, n, n, dtype=dtype, device=device) if reuse else None
        if out is None:
            calls = {
                OURS: lambda: tc.ops.outer(u, v),
                "u[:, :, None] * v[:, None, :]": lambda: u[:, :, None] * v[:, None, :],
                "einsum": lambda: torch.einsum("bi,bj->bij", u, v),
            }
        else:
            calls = {
                OURS: lambda: tc.ops.outer(u, v, out=out),
                "u[:, :, None] * v[:, None, :]": lambda: u[:, :, None] * v[:, None, :],
                "torch.mul(out=)": lambda: torch.mul(u[:, :, None], v[:, None, :], out=out),
            }
        size = B * n * n
        reference = lambda: _sample(u.double()[:, :, None] * v.double()[:, None, :])  # noqa: E731
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        return _contest(calls, _sample), reference, float(size), float(size * u.element_size()), tolerance

    return build


def _frobenius(kind: str) -> Callable[[torch.device], Built]:
    def build(device: torch.device) -> Built:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        a, b = (torch.randn(4096, 128, 128, device=device).to(dtype) for _ in range(2))
        if kind == "transposed":
            b = b.mT.contiguous().mT
        calls = {
            OURS: lambda: tc.ops.frobenius_inner(a, b),
            "(a * b).sum((-2, -1))": lambda: (a * b).sum((-2, -1)),
            "einsum": lambda: torch.einsum("bij,bij->b", a, b),
        }
        moved = 2.0 * a.numel() * a.element_size()
        reference = lambda: torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b)])  # noqa: E731
        tolerance = 2e-2 if kind == "bf16" else 1e-4
        return _contest(calls, lambda r: r.double()), reference, 2.0 * a.numel(), moved, tolerance

    return build


def _norms(N: int, S: int, width: int) -> Callable[[torch.device], Built]:
    def build(device: torch.device) -> Built:
        torch.manual_seed(0)
        g, a = torch.randn(1, N, S, width, device=device), torch.randn(N, S, width, device=device)
        calls = {
            OURS: lambda: tc.ops.jacobian_norms(g, a),
            "bmm of overlaps": lambda: (torch.bmm(g[0], g[0].mT) * torch.bmm(a, a.mT)).sum((1, 2))[None],
            "bmm, materialised": lambda: torch.bmm(g[0].mT, a).square().sum((1, 2))[None],
        }
        overlaps, formed = 2.0 * N * width * S * (S + 1), 2.0 * N * S * width * width
        reference = lambda: torch.stack([(x.double().mT @ y.double()).square().sum() for x, y in zip(g[0], a)])[None]  # noqa: E731
        moved = float((g.numel() + a.numel()) * g.element_size())
        return _contest(calls, lambda r: r.double()), reference, min(overlaps, formed), moved, 1e-4

    return build


def _all() -> Iterator[OperatorWorkload]:
    big, many = "4096 x 128 x 128", "1e6"
    yield OperatorWorkload("outer-fresh", f"outer, {big}", "3", _outer(4096, 128, torch.float32, False))
    yield OperatorWorkload("outer-out", f"outer, {big}, out=", "6", _outer(4096, 128, torch.float32, True))
    yield OperatorWorkload("outer-8", f"outer, {many} x 8 x 8", "3", _outer(10**6, 8, torch.float32, False))
    yield OperatorWorkload("outer-3", f"outer, {many} x 3 x 3", "3", _outer(10**6, 3, torch.float32, False))
    yield OperatorWorkload("outer-bf16", f"outer, {big}, bfloat16", "3", _outer(4096, 128, torch.bfloat16, False))
    yield OperatorWorkload("frobenius", f"frobenius_inner, {big}", "2.2", _frobenius("contiguous"))
    yield OperatorWorkload("frobenius-transposed", f"frobenius_inner, {big}, transposed", "3", _frobenius("transposed"))
    yield OperatorWorkload("frobenius-bf16", f"frobenius_inner, {big}, bfloat16", "20", _frobenius("bf16"))
    for N, S, width in ((256, 16, 64), (64, 16, 512), (64, 64, 128), (64, 128, 256), (32, 256, 128), (32, 256, 512),
                        (16, 1024, 64), (8, 1024, 512)):  # fmt: skip
        title = f"squared norms of sums of outer products, N={N}, S={S}, O=I={width}"
        target = "1.5" if width > S else "1"
        yield OperatorWorkload(f"sums-{S}-{width}", title, target, _norms(N, S, width))


WORKLOADS = list(_all())
