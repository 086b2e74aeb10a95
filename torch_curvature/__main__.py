"""``python -m torch_curvature``: how this copy was built, and a self-check in seconds."""

from __future__ import annotations

import sys

import torch

import torch_curvature as tc
from torch_curvature import _C


def _checks() -> dict[str, float]:
    """Largest error of each operator against plain torch operations in float64, relative to the largest entry."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got - want).abs().max() / want.abs().max())

    u, v, x, y, b, a = random(5, 3), random(5, 4), random(6, 9, 7), random(6, 9, 7), random(8, 3, 3), random(8, 5)
    d, a2 = random(8, 5, 3), random(8, 4)  # a layer's input by the outputs of an earlier one, and that one's input
    g, h = random(2, 6, 4, 3), random(6, 4, 5)  # columns [V, N, S, O] and activations [N, S, I]
    b = b + b.mT
    kronecker = torch.einsum("nop,ni,nj->oipj", b, a, a).reshape(15, 15)
    J = torch.einsum("vnso,nsi->vnoi", g, h).flatten(2)  # [V, N, O I]
    X = b[:, :, None] * a[:, None, :, None] + v[0, :3, None, None] * d[:, None]
    mixed = torch.einsum("noip,nj->oipj", X, a2).reshape(15, 12)
    matrix = tc.ops.curvature_block(
        torch.zeros(27, 27, dtype=torch.float64),
        b,
        a,
        a2,
        g=v[0, :3].expand(8, 3),
        d=d,
        rows=tc.ops.Places(12, 5, 1),
        columns=tc.ops.Places(0, 4, 1),
    )
    return {
        "curvature_block": error(matrix[12:, :12], mixed),
        "outer": error(tc.ops.outer(u, v), u[:, :, None] * v[:, None, :]),
        "frobenius_inner": error(tc.ops.frobenius_inner(x, y), (x * y).sum((-2, -1))),
        "kronecker_sum": error(tc.ops.kronecker_sum(b, a, symmetric=True), kronecker),
        "jacobian_norms": error(tc.ops.jacobian_norms(g, h), J.square().sum(2)),
        "jacobian_gram": error(tc.ops.jacobian_gram(g, h), torch.einsum("vnp,wmp->vnwm", J, J)),
        "gauss_newton_block": error(tc.ops.gauss_newton_block(g, h), torch.einsum("vnp,vnq->pq", J, J)),
        "gauss_newton_diagonal": error(tc.ops.gauss_newton_diagonal(g, h), J.square().sum((0, 1)).reshape(3, 5)),
    }


def main() -> int:
    facts = {"torch_curvature": tc.__version__, "torch": torch.__version__, **_C.build_info()}
    for name, value in facts.items():
        print(f"{name:22} {value}")
    worst = 0.0
    for name, value in _checks().items():
        worst = max(worst, value)
        print(f"{name:22} relative error {value:.1e}")
    passed = worst < 1e-13
    print("self-check passed" if passed else "SELF-CHECK FAILED: results are wrong. Rebuild, and report this.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
