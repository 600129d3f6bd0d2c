"""MHIM-MIL's recycling: the instances that the random mask takes, compressed to a few tokens.

In: embedded merged instances (M, h) of one bag. Out: k tokens of width h with their places and counts. Two kinds: the
global recycle network of v2, and plain weighted means. Knows no bag, no mask and no teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhim.mil.parts.layers import dropout, initialise

HEADS, HEAD_WIDTH = 8, 64


@dataclass(frozen=True)
class Merged:
    """Tokens. z: (k, h). grid: (k, 2) or None. log_count: (k,), the log of how many instances each stands for, or None
    (one)."""

    z: Tensor
    grid: Tensor | None = None
    log_count: Tensor | None = None


class Recycle(nn.Module):
    """Cross-attention of k global queries to the merged instances (v2, global recycle network).

    z = Out(softmax(Q(LN q) K(LN x)^T / 8) V(LN x)), 8 heads x 64, Q, K, V without bias, one LayerNorm for both. The
    queries are few, so they are taken to the instances' space, (Q K) LN x, and the mixture back, V (softmax LN x): for
    k = 5 a twelfth of the work of K and V for every instance.
    The queries are not trained: q <- m q + (1 - m) z after each use (`move`). They start uniform in +-sqrt(6/(768+h)).
    """

    queries: Tensor

    def __init__(self, width: int, k: int, drop: float) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.drop = drop
        initialise(self)
        bound = math.sqrt(6.0 / (768 + width))
        self.register_buffer("queries", torch.empty(k, width).uniform_(-bound, bound))

    def alone(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each instance x (M, h) by itself: LN x (M, h), and its logits (M, H k)."""
        x = self.norm(x)
        q = self.to_q(self.norm(self.queries)).unflatten(1, (HEADS, HEAD_WIDTH)).transpose(0, 1)  # (H, k, 64)
        to_k, _ = self.to_kv.weight.unflatten(0, (2, HEADS, HEAD_WIDTH))  # (H, 64, h) each
        asked = (q @ to_k).flatten(0, 1)  # (H k, h)
        return x, (F.linear(asked, x) / math.sqrt(HEAD_WIDTH)).T

    def forward(self, x: Tensor, grid: Tensor | None = None, counts: Tensor | None = None) -> Merged:
        """x: (M, h), M > 0. counts: bool (M,), False on filler rows, or None."""
        return self.pooled(*self.alone(x), grid, counts)

    def pooled(self, x: Tensor, logits: Tensor, grid: Tensor | None = None, counts: Tensor | None = None) -> Merged:
        """The tokens of instances, of which `alone` has told these rows."""
        p = self.drop if self.training else 0.0
        _, to_v = self.to_kv.weight.unflatten(0, (2, HEADS, HEAD_WIDTH))
        logits = logits.T  # (H k, M)
        if counts is not None:
            logits = logits.masked_fill(~counts, torch.finfo(logits.dtype).min)
        read = (dropout(torch.softmax(logits, dim=1), p) @ x).unflatten(0, (HEADS, -1))  # (H, k, h)
        mixed = read @ to_v.transpose(1, 2)  # (H, k, 64)
        z = dropout(self.to_out(mixed.transpose(0, 1).flatten(1)), p)
        place = None if grid is None else _center(grid, counts).expand(len(z), 2)
        # With filler only (known on the device alone) the tokens must not count.
        log_count = None if counts is None else torch.where(counts.any(), 0.0, -torch.inf).expand(len(z))
        return Merged(z, place, log_count)

    @torch.no_grad()
    def move(self, result: Tensor, momentum: float) -> None:
        """q <- momentum q + (1 - momentum) result. Written past autograd's version check on purpose: MHIM calls it
        between forward and backward only when asked to repeat the authors' order."""
        self.queries.data.mul_(momentum).add_(result.to(self.queries.dtype), alpha=1.0 - momentum)


def _center(grid: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return grid.mean(0)
    w = counts.to(grid.dtype)
    return (w @ grid) / w.sum().clamp_min(1.0)


def mean_tokens(x: Tensor, share: Tensor, k: int, grid: Tensor | None = None, counts: Tensor | None = None) -> Merged:
    """min(k, M) tokens, each the mean of every k-th of the merged instances x (M, h), weighted by share (M,) >= 0.

    A token stands for as many instances as it was made of (log_count), and lies in their convex hull: what reads it
    meets nothing in training that does not exist at test. Merged instances come in random order, so groups are random.
    Instances of no share at all still weigh a thousandth of the mean.
    """
    groups = min(k, len(x))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    member = torch.arange(len(x), device=x.device) % groups == torch.arange(groups, device=x.device)[:, None]
    mean = share.mean()
    if counts is not None:
        member = member & counts
        mean = (share * counts).sum() / counts.sum().clamp_min(1)
    weight = member * (share + 1e-3 * mean + 1e-12).to(wide)  # (k, M)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
    number = member.sum(1).to(wide)
    return Merged(weight.to(x.dtype) @ x, None if grid is None else weight.to(grid.dtype) @ grid, number.log())
