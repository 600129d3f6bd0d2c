"""Scores of the instances of one bag -> which are removed, kept or merged. Pure; no model, no learning.

Counts are Python numbers where they follow from the bag's size. Where they depend on the data (the cap on the removed
share) they are tensors with known bounds, so that shapes stay fixed and a GPU is never waited for: then index lists
come with a bool list that says which entries count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["ceil", "floor"]
FIXED_POINT = 2.0**40  # shares are added up as integers: exact, the same on every device, and deterministic on a GPU


def cosine(base: float, final: float, done: float) -> float:
    """final + (base - final) (1 + cos(pi done)) / 2: from base at done = 0 to final at done = 1."""
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * done))


def count(n: int, ratio: float, rounding: Rounding = "ceil") -> int:
    """ratio * n rounded up or down; a product that is a whole number up to 1e-9 is that number."""
    exact = round(n * ratio, 9)
    return math.ceil(exact) if rounding == "ceil" else math.floor(exact)


def votes(attention: Tensor, k: int) -> Tensor:
    """v1's fusion of heads: attention (H, N) -> float32 (N,), the number of heads that have an instance in their top k.
    Among equal votes the larger mean attention comes first (less than half a vote)."""
    chosen = attention.topk(min(k, attention.shape[1]), dim=1).indices
    found = torch.zeros_like(attention, dtype=torch.float32).scatter_(1, chosen, 1.0).sum(0)
    mean = attention.float().mean(0)
    return found + 0.49 * (mean - mean.amin()) / (mean.amax() - mean.amin()).clamp_min(1e-30)


def hardest(score: Tensor, n: int, random_share: float = 1.0, noise: Tensor | None = None) -> Tensor:
    """Indices of the n highest of `score` (N,), highest first; n is at most N - 1.

    random_share p < 1: n (for p = 1) grows to the pool of the ceil(n / p) highest, of which a random share p is taken,
    in the order of `noise` (N,). The pool is given by the caller through n; see `pool`.
    """
    order = score.topk(n).indices
    if random_share == 1.0:
        return order
    if noise is None:
        raise ValueError("a random share needs noise")
    taken = count(n, random_share)
    return order[noise[:n].argsort()[:taken].sort().values]


def pool(n: int, ratio: float, random_share: float, rounding: Rounding = "ceil") -> int:
    """Size of the top set of n instances from which `hardest` takes: ratio / random_share, leaving one at least."""
    return max(0, min(count(n, ratio / random_share, rounding), n - 1))


def within(share: Tensor, order: Tensor, limit: float) -> Tensor:
    """How many of `order`, from its front, may go before their summed `share` (N,) exceeds limit: int64 scalar."""
    fixed = (share[order].double() * FIXED_POINT).round().to(torch.int64)
    return (fixed.cumsum(0) <= round(limit * FIXED_POINT)).sum()


def numbers_known(device: torch.device) -> bool:
    """Whether the host may look at numbers on the device: on a GPU it would have to wait for them."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Removed:
    """flags: bool (N,). low, high: bounds of how many are set; equal when the number is known."""

    flags: Tensor
    low: int
    high: int


def remove(
    score: Tensor,
    share: Tensor,
    ratio_high: float,
    ratio_low: float = 0.0,
    ratio_random: float = 0.0,
    random_share: float = 1.0,
    share_max: float = 1.0,
    rounding: Rounding = "ceil",
    noise: Tensor | None = None,
    attention: Tensor | None = None,
) -> Removed:
    """Which instances the masks take; one always stays, and a bag of one is left whole.

    The highest of `score` (N,): ratio_high of N, but (share_max < 1) only so many from the top that their summed
    `share` (N,) stays within share_max; none, if the first alone exceeds it. Then ratio_low of N, lowest `attention`
    (N,) first, then ratio_random of N at random, both among those left. noise: (2, N) uniform numbers.
    """
    n = len(score)
    flags = torch.zeros(n, dtype=torch.bool, device=score.device)
    low = high = 0
    if ratio_high > 0 and n > 1:
        size = pool(n, ratio_high, random_share, rounding)
        order = hardest(score, size, random_share, None if noise is None else noise[0])
        low = high = len(order)
        if share_max < 1.0 and len(order):
            allowed = within(share, order, share_max)
            low = 0
            if numbers_known(score.device):
                low = high = int(allowed)
                flags.index_fill_(0, order[:low], True)
            else:
                flags[order] = torch.arange(len(order), device=score.device) < allowed
        else:
            flags.index_fill_(0, order, True)
    for ratio, value in ((ratio_low, attention), (ratio_random, None if noise is None else noise[1])):
        more = max(0, min(count(n, ratio, rounding), n - 1 - high)) if ratio > 0 else 0
        if more:
            if value is None:
                raise ValueError("masking at random needs noise, masking low attention needs the attention")
            flags.index_fill_(0, value.masked_fill(flags, torch.inf).topk(more, largest=False).indices, True)
            low, high = low + more, high + more
    return Removed(flags, low, high)


@dataclass(frozen=True)
class Split:
    """Which rows of a bag the student sees as they are, and which are merged.

    kept, merged: int64 indices. kept_counts, merged_counts: bool lists of the same lengths, False on filler entries,
    or None when every entry counts.
    """

    kept: Tensor
    merged: Tensor
    kept_counts: Tensor | None = None
    merged_counts: Tensor | None = None


def split(removed: Removed, keep_ratio: float, noise: Tensor, in_order: bool = True, min_kept: int = 1) -> Split:
    """Of the L instances left, a random floor(keep_ratio L) (min_kept at least) are kept, the others are merged.

    noise: (N,) in [0, 1): the kept ones are those with the smallest. in_order: kept ones come in the bag's order,
    else in that of the noise, as in the authors' program (which matters to models that use order).
    """
    n, device = len(noise), noise.device
    most_left, least_left = n - removed.low, n - removed.high
    if keep_ratio == 1.0:
        rank = torch.arange(n, dtype=torch.float32, device=device) / n if in_order else noise
    else:
        rank = noise
    order = rank.masked_fill(removed.flags, 2.0).argsort(stable=True)

    def keeps(left: int) -> int:
        return min(left, max(min_kept, math.floor(round(keep_ratio * left, 9))))

    if most_left == least_left:
        kept = order[: keeps(most_left)]
        return Split(kept.sort().values if in_order else kept, order[keeps(most_left) : most_left])
    left = n - removed.flags.sum()
    number = torch.floor(keep_ratio * left.double() + 1e-9).to(torch.int64).clamp_min(min_kept).minimum(left)
    position = torch.arange(n, device=device)
    kept, merged = order[: keeps(most_left)], order[keeps(least_left) : most_left]
    counts = position[: len(kept)] < number
    if in_order:  # filler goes to the end
        kept = torch.where(counts, kept, kept + n).sort().values
        kept = torch.where(kept < n, kept, kept - n)
    place = position[keeps(least_left) : most_left]
    return Split(kept, merged, counts, (place >= number) & (place < left))
