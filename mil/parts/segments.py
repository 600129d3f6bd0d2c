"""Several bags in one row of instances: what is of one bag is a segment, and nothing crosses its borders.

In: numbers of instances one bag after the other, and for each the number of its bag. Out: softmax inside segments, sums
over them. The same numbers as bag by bag, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_sizes(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int64 (M,): 0 for the first bag's instances, then 1 ..."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device))


def softmax(logits: Tensor, bag: Tensor, bags: int) -> Tensor:
    """(M,) softmax inside each bag, in float32 (or wider); every bag has at least one instance."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    highest = wide.new_full((bags,), -torch.inf).scatter_reduce(0, bag, wide.detach(), "amax")
    above = torch.exp(wide - highest[bag])
    return above / wide.new_zeros(bags).index_add(0, bag, above)[bag]


def total(rows: Tensor, bag: Tensor, bags: int) -> Tensor:
    """(bags, h) sum of the rows (M, h) of each bag; of half precision too added up in float32, as a matrix product
    does, and not as a device happens to add."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide.new_zeros(bags, rows.shape[1]).index_add(0, bag, wide).to(rows.dtype)
