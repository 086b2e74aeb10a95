"""What a convolution sees of images, met with derivatives without being unfolded, by helpers of the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import jacobian_gram
from .ops.pages import in_large_pages
from .ops.routing import takes_helpers

_norms = torch.ops.torch_curvature.convolution_norms.default._op
_diagonal = torch.ops.torch_curvature.convolution_diagonal.default._op
_jacobian = torch.ops.torch_curvature.convolution_jacobian.default._op
_jacobian_ = torch.ops.torch_curvature.convolution_jacobian_.default._op


# Bytes of the Jacobians of a few outputs, which then go through the same memory: fresh pages cost more than to meet the
# images again. Outputs are taken in whole panels of the kernel.
SLAB_BYTES, PANEL_BYTES = 1 << 22, 128

REORDERED = 40  # multiply-adds, as measured, that bringing an entry in order for sums over pairs of positions is worth


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

    def _inputs(self) -> int:
        return self.images.shape[1] * self.geometry[0] * self.geometry[1]

    def by_sums(self, g: Tensor) -> bool:
        """Whether the norms of sums over positions cost less from images than over pairs of positions of what is
        unfolded: ``V S O I`` multiply-adds against ``S (S + 1) / 2 (V O + I)``. Few positions of many channels do not.
        """
        V, _, S, O = g.shape
        inputs = self._inputs()
        return V * O * inputs <= (V * O + inputs) * ((S + 1) / 2 + REORDERED)

    def norms(self, g: Tensor, with_bias: bool) -> Tensor:
        """``|sum_s g[v,n,s] (x) a[n,s]|^2`` [V, N] for g [V, N, S, O]; with the bias's ``|sum_s g[v,n,s]|^2`` added."""
        found: Tensor = _norms(g, self.images, self.geometry, with_bias)
        return found

    def jacobian(self, g: Tensor) -> Tensor:
        """``sum_s g[v,n,s] (x) a[n,s]`` [V, N, O C K]."""
        found: Tensor = _jacobian(g, self.images, self.geometry)
        return found

    def diagonal(self, g: Tensor, sign: Tensor | None) -> Tensor:
        """``sum_vn sign[v,n] (sum_s g[v,n,s] (x) a[n,s])^2``, entry by entry: [O, C K], for sign [V, N]."""
        found: Tensor = _diagonal(g, self.images, self.geometry, None if sign is None else sign.to(g.dtype))
        return found

    def gram(self, g: Tensor, add_to: Tensor | None, with_bias: bool) -> Tensor:
        """[V, N, V, N] inner products of the Jacobians, added to what is given; a few outputs at a time. With those of
        the bias, ``sum_s g[v,n,s]``, where it is asked for."""
        V, N, _, O = g.shape
        panel = PANEL_BYTES // g.element_size()
        each = V * N * (self._inputs() + with_bias) * panel  # entries of one panel
        panels = max(1, SLAB_BYTES // max(1, each * g.element_size()))
        room, ones = in_large_pages(g, min(panels, -(-O // panel)) * each), g.new_ones(1, 1, 1).expand(N, 1, 1)
        for start in range(0, O, panels * panel):
            some = g[..., start : start + panels * panel]
            J = room[: -(-some.shape[3] // panel) * each]
            _jacobian_(J, some, self.images, self.geometry, with_bias)  # entries in any order
            add_to = jacobian_gram(J.view(V, N, 1, -1), ones, add_to=add_to)
        assert add_to is not None
        return add_to
