"""Parameters that share a layer's output: weight and bias as one, the input with a column of ones behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..ops import Places
from ..second_order import Node


@dataclass(slots=True)
class Layer:
    """``z = W a`` with one position per sample, and where its parameters' entries are in a matrix.

    Attributes:
        names: of the parameters: a weight, a bias or both.
        a: [N, I], its last column ones where there is a bias.
        places: of the entries (o, i).
        input: the use whose input ``a`` is, None where there is a bias alone.
    """

    names: tuple[str, ...]
    a: Tensor
    places: Places
    input: Node | None


def joined(
    a: Tensor | None, weight: int | None, bias: int | None, transposed: bool, like: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Places]:
    """Input [N, I] and places of a layer whose weight and bias start there in a matrix.

    Args:
        a: [N, I] input of the weight, None where there is a bias alone.
        transposed: the weight is stored as [I, O].
        like: of the matrix's dtype.
        shape: [N, O] of the layer's output.
    """
    if a is None or weight is None:
        assert bias is not None
        return like.new_ones(shape[0], 1), Places(bias, 1, 1)
    inputs = a.shape[1]
    per_output, per_input = (1, shape[1]) if transposed else (inputs, 1)
    if bias is None:
        return a, Places(weight, per_output, per_input)
    with_ones = a.new_empty(a.shape[0], inputs + 1)
    with_ones[:, :inputs] = a
    with_ones[:, inputs] = 1
    return with_ones, Places(weight, per_output, per_input, bias)


def layer_of(
    nodes: Sequence[Node], used: Iterable[str], start: dict[str, int], like: Tensor, shape: tuple[int, int]
) -> Layer | None:
    """The uses at one edge as a layer; None where one of them has several positions, or a parameter several uses.

    Args:
        used: the parameters' names, once for every use of them.
        start: of each parameter in the matrix.
        like: of the matrix's dtype.
        shape: [N, O] of the output.
    """
    counts = list(used)
    weights = [node for node in nodes if node.a is not None]
    biases = [node for node in nodes if node.a is None]
    if len(weights) > 1 or len(biases) > 1 or any(counts.count(node.name) > 1 for node in nodes):
        return None
    for node in nodes:
        if not node.plain or node.rows is not None or (node.a is not None and node.a.shape[1] != 1):
            return None
    weight, bias = (found[0] if found else None for found in (weights, biases))
    a, places = joined(
        None if weight is None or weight.a is None else weight.a[:, 0].to(like.dtype),
        None if weight is None else start[weight.name],
        None if bias is None else start[bias.name],
        weight is not None and weight.transposed,
        like,
        shape,
    )
    return Layer(tuple(node.name for node in (weight, bias) if node is not None), a, places, weight)
