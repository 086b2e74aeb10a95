"""Rule of embedding tables: a dense layer whose input is one-hot, ``z = W^T e_index``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from .linear import positions_last
from .rules import Use, register_rule


@register_rule(F.embedding)
def embedding(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterator[Use]:
    if scale_grad_by_freq:
        raise ValueError(
            "embedding with scale_grad_by_freq=True: what autograd returns for it is not the derivative; set "
            "scale_grad_by_freq=False on the Embedding module"
        )

    def index() -> Tensor:
        flat = input.reshape(-1, 1)
        if padding_idx is None:
            return flat
        return flat.masked_fill(flat == padding_idx % weight.shape[0], -1)

    yield Use(weight, input.dim(), positions_last, index, transposed=True, is_lookup=True)
