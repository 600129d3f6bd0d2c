"""Tissue mask -> tile grid, by pure arithmetic: no image, no file, no settings object.

In: sizes in level-0 px and a boolean mask with its scale. Out: integer corners and exact tissue fractions.

The grid is anchored at the corner of the scanned bounds, so that on most slides tiles fall on the file's own tiles. A
tile lies wholly inside the bounds: what is left over at the right and bottom edge, less than one step, is not tiled.
"""

from __future__ import annotations

import numpy as np

_BAND_ROWS = 256


def positions(start_l0: int, extent_l0: int, tile_l0: float, step_l0: float) -> np.ndarray:
    """int64 (K,): corners along one axis, `start_l0 + round(k * step_l0)`, so that rounding never adds up."""
    if tile_l0 > extent_l0 + 0.5:
        return np.zeros(0, np.int64)
    count = int(np.floor((extent_l0 + 0.5 - tile_l0) / step_l0 + 1e-9)) + 1
    return start_l0 + np.rint(np.arange(count) * step_l0).astype(np.int64)


def box_means(mask: np.ndarray, x: np.ndarray, y: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Mean of `mask` over the boxes of a grid, exact by integral image: a px cut by an edge counts by its area.

    mask: (H, W), bool or fractions. x: (Nx,), y: (Ny,) left and top edges in mask px (float); size: (w, h) in mask px.
    Returns float32 (Ny, Nx); what lies outside the mask counts as 0.
    """
    h, w = mask.shape
    # Separable: the sums along x first, in bands of rows, so that the full integral image (8 bytes a px) never exists.
    along_x = np.empty((h, len(x)), np.float64)  # (H, Nx)
    left, right = np.clip(x, 0, w), np.clip(x + size[0], 0, w)
    for top in range(0, h, _BAND_ROWS):
        summed = _summed(mask[top : top + _BAND_ROWS].T)  # (W + 1, band)
        along_x[top : top + _BAND_ROWS] = (_at(summed, right) - _at(summed, left)).T
    summed = _summed(along_x)  # (H + 1, Nx)
    sums = _at(summed, np.clip(y + size[1], 0, h)) - _at(summed, np.clip(y, 0, h))  # (Ny, Nx)
    return np.clip(sums / (size[0] * size[1]), 0.0, 1.0).astype(np.float32)


def _summed(table: np.ndarray) -> np.ndarray:
    """Running sums over the rows with a row of zeros before: (R, C) -> float64 (R + 1, C)."""
    out = np.zeros((table.shape[0] + 1, table.shape[1]), np.float64)
    np.cumsum(table, axis=0, dtype=np.float64, out=out[1:])
    return out


def _at(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of `table` (R, C) at fractional row numbers (K,), by linear interpolation -> (K, C)."""
    low = np.minimum(rows.astype(np.int64), table.shape[0] - 2)
    part = (rows - low)[:, None]
    return table[low] * (1.0 - part) + table[low + 1] * part
