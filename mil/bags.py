"""Arrays of single bags -> one padded `Bag`. Knows no file, no model, no label.

In: per bag features (N, D), coords (N, 2) in level-0 px and the tile edge in level-0 px. Out: a `mhim.mil.models.Bag`
whose mask is a tensor, never a value among the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mhim.mil.models import Bag


def collate(
    bags: Sequence[tuple[np.ndarray, np.ndarray, float]],
    mpp: float,
    device: torch.device | str = "cpu",
    scale: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Bag:
    """Bags of any length (0 too) padded to the longest, real instances first.

    bags: features float16 or float32 (N, D), coords (N, 2), level-0 px, x then y, and tile edge in level-0 px.
    Features travel as stored (half the bytes in float16) and become float32 on `device`, less the mean and over the sd
    of `scale`, float32 (D,) each and there already. On a GPU nothing is waited for: the work is queued on the stream in
    use. Raises ValueError for no bag at all, for features that are not (N, D) with one D, and for coords that do not
    fit.
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
        x = _standard(to_device(_tensor(bags[0][0]), device).float(), scale)[None]
        xy = to_device(_tensor(bags[0][1]), device).float()[None]
        mask = torch.ones(1, longest, dtype=torch.bool, device=device)
    else:
        x = torch.zeros(len(bags), longest, width, dtype=torch.float32, device=device)
        xy = torch.zeros(len(bags), longest, 2, dtype=torch.float32, device=device)
        for b, (features, coords, _) in enumerate(bags):
            x[b, : sizes[b]] = _standard(to_device(_tensor(features), device).float(), scale)
            xy[b, : sizes[b]] = to_device(_tensor(coords), device)
        mask = torch.arange(longest, device=device)[None] < to_device(torch.tensor(sizes), device)[:, None]
    tile_l0 = to_device(torch.tensor([float(t) for _, _, t in bags], dtype=torch.float32), device)
    return Bag(x, mask, xy, tile_l0, float(mpp), sizes)


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device`. A copy to a GPU goes through pinned memory, so that the host queues it and goes on."""
    if torch.device(device).type != "cuda" or not tensor.numel():
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def _standard(x: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """(x - mean) / sd; a new tensor, since x may be the memory of an array that is used again."""
    return x if scale is None else (x - scale[0]).div_(scale[1])


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's memory; copied where torch cannot take it as it is (read-only or reversed)."""
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
