"""The graph of tiles that touch on the slide: who is whose neighbour, and sums over neighbours.

In: places of instances on the grid. Out: up to 8 neighbours each, and products with a symmetric matrix that is zero
elsewhere, in memory of the order of N. Knows no bag and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

AROUND = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dx or dy]


@dataclass(frozen=True)
class Graph:
    """A symmetric matrix A over N instances: A_nn = own[n], A_nm = weights[o, n] for m = rows[o, n], else 0.

    rows: int64 (8, N), the neighbour in each direction, n itself where there is none. weights: (8, N), 0 there.
    own: (N,).
    """

    rows: Tensor
    weights: Tensor
    own: Tensor

    def product(self, f: Tensor) -> Tensor:
        """A f for f (N,) or (N, h); differentiable in f, not in A."""
        if f.ndim == 1:
            return cast(Tensor, _Product.apply(f[:, None], *self._in(f)))[:, 0]
        return cast(Tensor, _Product.apply(f, *self._in(f)))

    def _in(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.weights.to(f.dtype), self.own.to(f.dtype)


class _Product(torch.autograd.Function):
    """A f; A is symmetric, so the gradient is A g."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, rows: Tensor, weights: Tensor, own: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, own)
        return _times(f, rows, weights, own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _times(grads[0], *ctx.saved_tensors), None, None, None


def _times(f: Tensor, rows: Tensor, weights: Tensor, own: Tensor) -> Tensor:
    out = own[:, None] * f
    for where, weight in zip(rows, weights, strict=True):
        out.addcmul_(weight[:, None], f.index_select(0, where))
    return out


def touching(grid: Tensor, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The neighbour of each instance in each of 8 directions: rows int64 (8, N), itself where there is none, and
    whether there is one, bool (8, N); the relation is symmetric.

    grid: (N, 2) in tile edges, x then y, rounded to whole places. Several instances in one place (slides of one
    patient, overlapping tiles) lie in layers, the first with the first of other places, and so on; only one layer's
    instances touch. gone: bool (N,), instances without neighbours.
    """
    place = grid.round().long()
    place = place - place.amin(0)
    across, down = (int(v) + 3 for v in place.amax(0))
    cell = (place[:, 1] + 1) * across + place[:, 0] + 1  # a free cell all around
    n = len(cell)
    order = cell.argsort(stable=True)
    ranked, at = cell[order], torch.arange(n, device=cell.device)
    begins = torch.ones(n, dtype=torch.bool, device=cell.device)
    begins[1:] = ranked[1:] != ranked[:-1]
    start = torch.where(begins, at, torch.zeros_like(at)).cummax(0).values
    layer = torch.empty_like(cell).scatter_(0, order, at - start)
    key = layer * (across * down) + cell
    order = key.argsort()
    ranked = key[order]
    rows, there = [], []
    for dx, dy in AROUND:
        wanted = key + dy * across + dx
        found = torch.searchsorted(ranked, wanted).clamp_max(n - 1)
        is_there = ranked[found] == wanted
        where = order[found]
        if gone is not None:
            is_there = is_there & ~gone & ~gone[where]
        rows.append(torch.where(is_there, where, at))
        there.append(is_there)
    return torch.stack(rows), torch.stack(there)


def normalised(grid: Tensor, like: Tensor, gone: Tensor | None = None) -> Graph:
    """D^-1/2 (A + I) D^-1/2 of the tiles that touch, D the row sums of A + I, in the dtype of `like`."""
    rows, there = touching(grid, gone)
    scale = (1.0 + there.sum(0).to(like.dtype)).rsqrt()
    return Graph(rows, scale * scale[rows] * there, scale * scale)
