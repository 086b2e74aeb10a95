"""What a convolution sees of images, met with derivatives without being unfolded, by helpers of the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.routing import takes_helpers

_norms = torch.ops.torch_curvature.convolution_norms.default._op
_diagonal = torch.ops.torch_curvature.convolution_diagonal.default._op
_jacobian = torch.ops.torch_curvature.convolution_jacobian.default._op


@dataclass(slots=True)
class Patches:
    """The patches ``a [N, S, C K]`` of images, position by position.

    Attributes:
        images: [N, C, H, W].
        geometry: kernel, stride, padding (top, left), dilation and output positions, two numbers each.
    """

    images: Tensor
    geometry: list[int]

    def suit(self, g: Tensor) -> bool:
        """Whether the helpers take them with such derivatives."""
        return takes_helpers(g) and takes_helpers(self.images) and self.images.dtype == g.dtype

    def norms(self, g: Tensor) -> Tensor:
        """``|sum_s g[v,n,s] (x) a[n,s]|^2`` [V, N] for g [V, N, S, O]."""
        found: Tensor = _norms(g, self.images, self.geometry)
        return found

    def jacobian(self, g: Tensor) -> Tensor:
        """``sum_s g[v,n,s] (x) a[n,s]`` [V, N, O C K]."""
        found: Tensor = _jacobian(g, self.images, self.geometry)
        return found

    def diagonal(self, g: Tensor, sign: Tensor | None) -> Tensor:
        """``sum_vn sign[v,n] (sum_s g[v,n,s] (x) a[n,s])^2``, entry by entry: [O, C K], for sign [V, N]."""
        found: Tensor = _diagonal(g, self.images, self.geometry, None if sign is None else sign.to(g.dtype))
        return found
