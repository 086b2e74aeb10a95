"""The main job on real data: exact Gauss-Newton blocks of a network that reads handwritten digits.

    make demo            or            python -m examples.digits [--output FOLDER]

Trains a small network on the 1,797 digits that scikit-learn ships, takes the exact Gauss-Newton block of every
parameter over all of them, checks each against the reference in float64, and draws what they look like.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_curvature as tc


def load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise SystemExit("The digits come with scikit-learn: pip install scikit-learn matplotlib") from error
    digits = load()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def train(model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int = 40) -> float:
    """Full epochs of Adam with a progress line; returns the accuracy on the training data."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
        print(f"\rtraining: epoch {epoch + 1}/{epochs}, loss {loss.item():.4f}", end="", flush=True)
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
    print(f"\rtraining: {epochs} epochs, accuracy {accuracy:.1%}          ")
    return accuracy


def timed(function: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result, and the shortest time of ``repeats`` runs in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return result, best


def reference_block(model: nn.Module, data: tuple[Tensor, Tensor], name: str) -> Tensor:
    """The same block by ``torch.func``: the Jacobian of every sample, then ``J^T h_L J``; slow and obvious.

    The Hessian of the softmax cross entropy with respect to the outputs of one sample is ``diag(p) - p p^T``, and the
    mean over samples divides by their number.
    """
    inputs, _ = data
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def output(value: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**parameters, name: value}, (sample.unsqueeze(0),)).squeeze(0)

    jacobian = torch.func.vmap(torch.func.jacrev(output), in_dims=(None, 0))(parameters[name], inputs).flatten(2)
    p = torch.softmax(model(inputs).detach(), 1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nci,ncd,ndj->ij", jacobian, hessian, jacobian) / len(inputs)


def oracle_blocks(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Blocks of tc.reference.gauss_newton in float64: small batches, weighted by their share of the mean."""
    double = copy.deepcopy(model).double()
    inputs, targets = data
    total = torch.zeros(())
    for done, batch in enumerate(torch.arange(len(inputs)).split(60), 1):
        part = tc.reference.gauss_newton(double, loss, (inputs[batch].double(), targets[batch]))
        total = total + part * (len(batch) / len(inputs))
        print(f"\rtc.reference in float64: batch {done}", end="", flush=True)
    print()
    sizes = [p.numel() for p in model.parameters()]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return {
        name: total[start : start + size, start : start + size]
        for (name, _), start, size in zip(model.named_parameters(), starts, sizes)
    }


def time_of_one_block(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], name: str) -> float:
    """Seconds for the block of one parameter, all others frozen."""
    alone = copy.deepcopy(model)
    for key, parameter in alone.named_parameters():
        parameter.requires_grad_(key == name)
    return timed(lambda: tc.GaussNewton(alone, loss, data).blocks(), repeats=3)[1]


def report(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], blocks: dict[str, Tensor]) -> None:
    """One line a block: size, trace, extreme eigenvalues, distance from the oracle, our time and torch.func's."""
    oracle = oracle_blocks(model, loss, data)
    print(
        f"\n{'parameter':10}{'block':>13}{'trace':>10}{'largest eig.':>14}{'smallest eig.':>15}{'error':>10}"
        f"{'this package':>14}{'torch.func':>13}"
    )
    for name, block in blocks.items():
        error = ((block.double() - oracle[name]).norm() / oracle[name].norm()).item()
        eigenvalues = torch.linalg.eigvalsh(block.double())
        ours = time_of_one_block(model, loss, data, name)
        _, theirs = timed(functools.partial(reference_block, model, data, name))
        print(
            f"{name:10}{block.shape[0]:6} x {block.shape[1]:4}{block.trace().item():10.4f}"
            f"{eigenvalues[-1].item():14.5f}{eigenvalues[0].item():15.1e}{error:10.0e}"
            f"{ours * 1e3:11.1f} ms{theirs * 1e3:10.1f} ms"
        )
        if error > 1e-4 or eigenvalues[0] < -1e-5 * eigenvalues[-1]:
            raise SystemExit(
                f"{name}: not the Gauss-Newton block (distance {error:.1e} from the reference). Please report."
            )
    print("every block agrees with tc.reference and is positive semi-definite to float32 rounding\n")


def draw(blocks: dict[str, Tensor], folder: Path) -> list[Path]:
    """A heat map of the largest block and of the last one, and the spectra of all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "gauss_newton_block.png", folder / "spectrum.png"]

    figure, axes = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for axis, name in zip(axes, ("0.weight", "4.weight")):
        block = blocks[name]
        scale = block.abs().max().item()
        picture = axis.imshow(
            block, cmap="RdBu_r", norm=SymLogNorm(scale * 1e-4, vmin=-scale, vmax=scale), interpolation="nearest"
        )
        axis.set_title(f"Gauss-Newton block of {name}: {block.shape[0]} x {block.shape[1]}")
        axis.set_xlabel("parameter (output, input)")
        decades = [scale * 10.0**-k for k in range(4)]
        figure.colorbar(
            picture, ax=axis, shrink=0.8, ticks=[*(-d for d in decades), 0, *decades], format="%.0e", extend="neither"
        ).minorticks_off()
    axes[0].set_ylabel("parameter (output, input)")
    figure.savefig(paths[0], dpi=130)

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, block in blocks.items():
        eigenvalues = torch.linalg.eigvalsh(block.double()).flip(0)
        floor = eigenvalues[0] * torch.finfo(torch.float32).eps
        axis.semilogy(torch.arange(1, len(eigenvalues) + 1), eigenvalues.clamp(min=floor), label=name)
    axis.set_xscale("log")
    axis.set_xlabel("rank")
    axis.set_ylabel("eigenvalue (clipped where float32 ends)")
    axis.set_title("Few directions carry the curvature: spectra of the Gauss-Newton blocks")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(paths[1], dpi=130)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    folder = parser.parse_args().output

    torch.manual_seed(0)
    inputs, targets = load_digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
    print(f"{len(inputs)} digits of 8 x 8 pixels; {sum(p.numel() for p in model.parameters())} parameters")
    train(model, inputs, targets)

    loss = nn.CrossEntropyLoss()
    data = (inputs, targets)
    blocks, seconds = timed(tc.GaussNewton(model, loss, data).blocks, repeats=3)
    print(f"tc.GaussNewton(model, loss, data).blocks(): all {len(blocks)} blocks, exact, in {seconds * 1e3:.1f} ms")
    report(model, loss, data, blocks)
    for path in draw(blocks, folder):
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
