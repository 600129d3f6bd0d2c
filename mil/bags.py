"""Arrays of single bags -> one padded `Bag`. Knows no file, no model, no label.

In: per bag features (N, D), coords (N, 2) in level-0 px and the tile edge in level-0 px. Out: a `mil.models.Bag`
whose mask is a tensor, never a value among the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mil.models import Bag


def collate(
    bags: Sequence[tuple[np.ndarray, np.ndarray, float]], mpp: float, device: torch.device | str = "cpu"
) -> Bag:
    """Bags of any length (0 too) padded to the longest, real instances first.

    bags: features float16 or float32 (N, D), coords (N, 2), level-0 px, x then y, and tile edge in level-0 px.
    Features travel as stored (half the bytes in float16) and become float32 on `device`. Raises ValueError for no bag
    at all, for features that are not (N, D) with one D, and for coords that do not fit.
    """
    if not bags:
        raise ValueError("a batch needs at least one bag")
    width = bags[0][0].shape[-1]
    for i, (features, coords, _) in enumerate(bags):
        if features.ndim != 2 or features.shape[1] != width:
            raise ValueError(f"bag {i} of the batch: features are {features.shape}, expected (N, {width})")
        if coords.shape != (len(features), 2):
            raise ValueError(f"bag {i} of the batch: {len(features)} features but coords {coords.shape}")
    sizes = tuple(len(f) for f, _, _ in bags)
    longest = max(sizes)
    if len(bags) == 1:  # the usual case: no copy beyond the one to the device
        x = _tensor(bags[0][0])[None].to(device, torch.float32)
        xy = _tensor(bags[0][1])[None].to(device, torch.float32)
    else:
        x = torch.zeros(len(bags), longest, width, dtype=torch.float32, device=device)
        xy = torch.zeros(len(bags), longest, 2, dtype=torch.float32, device=device)
        for b, (features, coords, _) in enumerate(bags):
            x[b, : sizes[b]] = _tensor(features).to(device)
            xy[b, : sizes[b]] = _tensor(coords).to(device)
    mask = torch.arange(longest, device=device)[None] < torch.tensor(sizes, device=device)[:, None]
    tile_l0 = torch.tensor([float(t) for _, _, t in bags], dtype=torch.float32, device=device)
    return Bag(x, mask, xy, tile_l0, float(mpp), sizes)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's memory; copied where torch cannot take it as it is (read-only or reversed)."""
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
