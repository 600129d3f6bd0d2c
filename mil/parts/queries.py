"""Multi-head attention of a few learned queries over the instances of a bag, as several newer models share it.

In: embedded instances (N, h) and queries (K, h). Out: scores per head, and pooled values. Knows no bag and no model.

q = W_q Q + b_q, k = W_k z + b_k, scores = q k / sqrt(d) for each of H heads of d = h / H; values v = W_v z + b_v.
Queries are few, so they are taken to the instances' space, and the values' map follows the pooling: a bag of N
instances costs N H K h products instead of 2 N h h, and no second copy of the bag. The numbers are the same but for
rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def whole_heads(width: int, heads: int) -> None:
    """Raises ValueError unless `width` can be cut into `heads`."""
    if width % heads:
        raise ValueError(f"width {width} must be a multiple of heads ({heads})")


class Scores(nn.Module):
    """Scaled dot products of queries with instances, before the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, queries: Tensor, z: Tensor) -> Tensor:
        """queries: (K, h). z: (N, h). Returns (H, K, N)."""
        q = self.query(queries).unflatten(1, (self.heads, -1))  # (K, H, d)
        weight = self.key.weight.unflatten(0, (self.heads, -1))  # (H, d, h)
        bias = self.key.bias.unflatten(0, (self.heads, -1))  # (H, d)
        asked = torch.einsum("khd,hdw->hkw", q, weight.to(q.dtype))  # (H, K, h)
        same = torch.einsum("khd,hd->hk", q, bias.to(q.dtype))
        found: Tensor = (asked.flatten(0, 1) @ z.T).unflatten(0, (self.heads, -1)) + same[..., None]
        return found / math.sqrt(q.shape[2])


class Pool(nn.Module):
    """Values of each head averaged with its own weights, through an output map and a norm."""

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """p: (H, K, N), each row of sum one. z: (N, h). Returns (K, h)."""
        mixed = p.to(z.dtype) @ z  # (H, K, h)
        weight = self.value.weight.unflatten(0, (self.heads, -1))  # (H, d, h)
        v = torch.einsum("hkw,hdw->khd", mixed, weight.to(mixed.dtype)).flatten(1) + self.value.bias
        pooled: Tensor = self.norm(self.out(v))
        return pooled

    def evidence(self, classifier: Tensor, z: Tensor) -> Tensor:
        """What an instance would add to each class if it were the whole bag of a head, past the norm, which mixes
        channels, and without biases. classifier: (C, h). z: (N, h). Returns (N, H, C)."""
        weight = self.value.weight.unflatten(0, (self.heads, -1))  # (H, d, h)
        path = (classifier @ self.out.weight).unflatten(1, (self.heads, -1))  # (C, H, d)
        maps = torch.einsum("chd,hdw->hcw", path, weight).flatten(0, 1)  # (H C, h)
        found: Tensor = (z @ maps.T.to(z.dtype)).unflatten(1, (self.heads, -1))
        return found
