"""The position encoding of TransMIL (Shao et al., NeurIPS 2021, arXiv 2106.00908): PPEG, on the list or on the slide.

In: a sequence (n, E) without class token, and where its instances lie if that counts. Out: the sequence with its
surroundings added. Knows no bag and no model.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _around(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depth-wise 7 x 7 convolution, channels last: image (a, b, E), weight (E, 1, 7, 7) -> (a, b, E)."""
    out = F.conv2d(image[None].permute(0, 3, 1, 2), weight, bias, padding=3, groups=len(weight))
    return out.permute(0, 2, 3, 1)[0]


class _Around(torch.autograd.Function):
    """`_around` with its weight gradient as sums of 49 shifted products: a third of the time of the library's."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(image, weight)
        return _around(image, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, weight = ctx.saved_tensors
        g = grads[0].contiguous()
        side, across, width = image.shape
        padded = F.pad(image, (0, 0, 3, 3, 3, 3))
        rows = max(1, 512 // across)  # so many at a time that products stay in the cache
        room = g.new_empty(rows, across, width)
        found = g.new_zeros(49, width)
        for top in range(0, side, rows):
            part = g[top : top + rows]
            size = len(part)
            for tap in range(49):
                y, x = divmod(tap, 7)
                shifted = padded[top + y : top + y + size, x : x + across]
                found[tap] += torch.mul(shifted, part, out=room[:size]).flatten(0, 1).sum(0)
        return _around(g, weight.flip(2, 3), None), found.t().reshape(weight.shape), g.sum((0, 1))


class Ppeg(nn.Module):
    """Pyramid position encoding: the sequence folded into a square, row by row, plus its depth-wise convolutions with
    kernels 7, 5 and 3. They are summed, so they are one convolution with the sum of the kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for size in (7, 5, 3):
            self.register_module(f"conv{size}", nn.Conv2d(width, width, size, padding=size // 2, groups=width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, E) -> (n, E). The square is filled up with the first rows; below 7 x 7, with zeros beyond it."""
        n = len(x)
        side = math.isqrt(n - 1) + 1
        full = torch.cat([x, x[: side * side - n]]) if side * side > n else x
        if side < 7:
            side = 7
            full = F.pad(full, (0, 0, 0, side * side - len(full)))
        weight, bias = self.kernel()
        image = full.view(side, side, -1)
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            out = cast(Tensor, _Around.apply(image, weight, bias))
        else:
            out = _around(image, weight.to(x.dtype), bias.to(x.dtype))
        return out.flatten(0, 1)[:n]

    def on_grid(self, x: Tensor, grid: Tensor, weight: Tensor | None = None) -> Tensor:
        """The same convolutions where the instances really lie. x: (n, E); grid: (n, 2), tile edges, x then y;
        weight: (n,), 0 for instances that are to count as absent. Returns (n, E).

        Every instance takes the nearest cell; several in one cell are averaged, and each keeps its own x. More than
        three empty rows or columns in a row are cut to three, which no 7 x 7 kernel can tell, so that the distance
        between pieces of tissue, or slides, costs nothing.
        """
        column, row = (_close(grid[:, axis]) for axis in (0, 1))
        width, height = int(column.max()) + 1, int(row.max()) + 1
        cell = row * width + column
        counts = x.new_ones(len(x)) if weight is None else weight.to(x.dtype)
        held = x.new_zeros(height * width).index_add(0, cell, counts).clamp_min(1e-6)
        total = x.new_zeros(height * width, x.shape[1]).index_add(0, cell, x * counts[:, None])
        image = total / held[:, None]
        kernel, bias = self.kernel()
        spread = image.view(1, height, width, -1).permute(0, 3, 1, 2)  # channels last
        out = F.conv2d(spread, kernel.to(x.dtype), bias.to(x.dtype), padding=3, groups=x.shape[1])
        return out.permute(0, 2, 3, 1).flatten(0, 2)[cell] + (x - image[cell])

    def kernel(self) -> tuple[Tensor, Tensor]:
        """The one 7 x 7 kernel (E, 1, 7, 7), the identity included, and its bias (E,)."""
        parts = [cast(nn.Conv2d, getattr(self, f"conv{size}")) for size in (7, 5, 3)]
        weight = sum(F.pad(c.weight, ((7 - c.kernel_size[0]) // 2,) * 4) for c in parts)
        bias = sum(c.bias for c in parts if c.bias is not None)
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return weight + F.pad(weight.new_ones(1, 1), (3, 3, 3, 3)), bias


def _close(place: Tensor) -> Tensor:
    """int64 (n,) whole places from 0 on, in which no two neighbouring values are more than 4 apart."""
    values, which = torch.unique(place.round().long(), return_inverse=True)
    return F.pad(values.diff().clamp_max(4).cumsum(0), (1, 0))[which]
