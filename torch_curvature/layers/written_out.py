"""Composite functions written out while a model is observed.

Some functions hide the layers inside them (attention's projections), have derivatives that batched or second-order
differentiation cannot use (fused attention), or second derivatives that are silently wrong (weight normalisation).
During a call of the package they are replaced by the same computation in simpler functions.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .bags import embedding_bag, one_bag_a_row
from .recurrent import RECURRENT_CELLS, RECURRENT_LAYERS, is_padded


def _open_attention() -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` without its dispatch to overrides, so that what it calls is seen."""
    source = F.multi_head_attention_forward
    scope = {**vars(F), "has_torch_function": lambda operands: False}
    opened = types.FunctionType(source.__code__, scope, source.__name__, source.__defaults__, source.__closure__)
    opened.__kwdefaults__ = source.__kwdefaults__
    return opened


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot product attention by plain matrix products: every derivative exists."""
    result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return result


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, the norm over all axes but ``dim`` (all axes when it is -1)."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


Applies = Callable[..., bool]

# Keyed by the function as a torch function mode sees it: whether the replacement takes a call, and the replacement.
# These are replaced in every observed pass, since the layers inside them are to be seen,
OPENED: dict[Callable[..., Any], tuple[Applies, Callable[..., Any]]] = {
    F.multi_head_attention_forward: (_always, _open_attention()),
    F.embedding_bag: (one_bag_a_row, embedding_bag),
    **{function: (is_padded, written) for function, written in RECURRENT_LAYERS.items()},
    **{function: (_always, written) for function, written in RECURRENT_CELLS.items()},
}
# and these where other derivatives than the gradient are taken.
WRITTEN_OUT: dict[Callable[..., Any], tuple[Applies, Callable[..., Any]]] = {
    **OPENED,
    F.scaled_dot_product_attention: (_always, math_attention),
    torch._weight_norm: (_always, weight_norm),
}
