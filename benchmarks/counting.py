"""Flops and bytes that a quantity cannot do without, counted over the layers that have weights.

Multiply-adds count as two flops. Symmetric products count half, packed symmetric pairs a quarter. What a layer's rule
saves (a first layer needs no derivative of its input) is counted; activations, losses and attention weights are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .passes import columns_of
from .problems import Problem


def layers(p: Problem) -> Iterator[tuple[int, int, int, int, bool]]:
    """(N, S, O, I, is first) of each layer."""
    found: list[tuple[int, int, int, int, bool]] = []

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        N, O = len(output), module.weight.shape[0]
        found.append((N, output.numel() // (N * O), O, module.weight[0].numel(), not found))

    hooks = [m.register_forward_hook(keep) for m in p.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        C = p.model(p.x).shape[1]
    for hook in hooks:
        hook.remove()
    p.classes = C
    return iter(found)


def _pairs(n: int) -> float:
    return n * (n + 1) / 2


def passes(p: Problem, columns: int) -> float:
    """One forward pass, and ``columns`` backward passes to the layers' outputs."""
    return sum(2.0 * N * S * O * I * (1 + columns * (not first)) for N, S, O, I, first in layers(p))


def flops_of_passes(p: Problem, quantity: str) -> float:
    """Those of the passes that a quantity is made of: one column for a gradient; all there is to a product."""
    if quantity == "product":
        return count(p, quantity)[0]
    return passes(p, 1 if quantity in ("norms", "gram") else columns_of(p.classes, quantity))


def count(p: Problem, quantity: str) -> tuple[float, float]:
    """(flops, bytes of the result) of a quantity of the mean cross entropy."""
    found = list(layers(p))
    V, element = columns_of(p.classes, quantity), p.x.element_size()
    P, N = p.size, len(p.x)
    flops = 0.0 if quantity == "product" else flops_of_passes(p, quantity)
    size = {"diagonal": P, "product": P, "norms": N, "gram": N * N, "kernel": (N * V) ** 2, "dense": P * P}.get(
        quantity
    )
    total = 0.0
    for n, S, O, I, first in found:
        formed = 2.0 * n * S * O * I
        if quantity in ("blocks", "dense"):
            total += (O * I) ** 2
            by_pairs = S * S * n * (2.0 * _pairs(O) * _pairs(I) + V * O * O)
            flops += by_pairs if S == 1 else min(by_pairs, V * (formed + n * (O * I) ** 2))
        elif quantity == "diagonal":
            flops += 2.0 * n * O * I + 3.0 * V * n * O if S == 1 else V * (formed + 2.0 * n * O * I)
        elif quantity == "norms":
            flops += 2.0 * n * (O + I) if S == 1 else min(n * S * S * (O + I), formed + 2.0 * n * O * I)
        elif quantity == "gram":
            flops += n * n * (O + I) if S == 1 else formed + n * n * O * I
        elif quantity == "kernel":
            flops += n * n * (V * V * O + I) if S == 1 else V * formed + (V * n) ** 2 * O * I
        elif quantity == "kronecker":
            total += O * O + I * I
            flops += n * S * I * I + V * n * S * O * O
        elif quantity == "product":
            flops += (3 if first else 5) * formed  # a tangent and a derivative of the input: not of the first
    if quantity == "dense":  # pairs of different layers: one product of unpacked pairs, mirrored
        for i, (n, S, O, I, _) in enumerate(found):
            for _, S2, O2, I2, _ in found[i + 1 :]:
                if S == S2 == 1:
                    flops += 2.0 * n * O * I * O2 * I2
    return flops, float(element * (total if size is None else size))


def _pushed(p: Problem, pairs: bool) -> float:
    """Second derivatives by the layers' outputs, of a multilayer perceptron: one pass forwards and one back, and those
    by each layer's output pulled back to the output before it, twice (the second product is symmetric, and counts
    half). ``pairs``: pulled back to all earlier outputs, and with them the derivatives of the layers' inputs; the first
    factor of these is a diagonal."""
    found = list(layers(p))
    flops = passes(p, 1)
    later, inputs = 0.0, 0.0  # columns that are pulled back: by later layers' outputs, and of their inputs
    for n, _, O, I, first in reversed(found):
        if not first:
            flops += 2.0 * n * O * I * (O + I / 2)
            if pairs:
                flops += 2.0 * n * O * I * (later + max(0.0, inputs - O)) + n * O * I * (inputs > 0)
        later, inputs = later + O, inputs + I
    return flops


def count_hessian(p: Problem) -> tuple[float, float]:
    """The dense Hessian of a multilayer perceptron: the second derivatives by the layers' outputs, the products of
    packed pairs of a layer with itself, and one product of unpacked pairs for two layers, which holds both terms."""
    found = list(layers(p))
    flops = _pushed(p, True)
    for i, (n, _, O, I, _) in enumerate(found):
        flops += 2.0 * n * _pairs(O) * _pairs(I)
        for _, _, O2, I2, _ in found[i + 1 :]:
            flops += 2.0 * n * O * I * O2 * I2
    return flops, float(p.size**2 * p.x.element_size())


def count_hessian_blocks(p: Problem) -> tuple[float, float]:
    """Only the blocks of the layers: no products of pairs of different layers."""
    found = list(layers(p))
    flops = _pushed(p, False) + sum(2.0 * n * _pairs(O) * _pairs(I) for n, _, O, I, _ in found)
    return flops, float(sum((O * I) ** 2 for _, _, O, I, _ in found) * p.x.element_size())
