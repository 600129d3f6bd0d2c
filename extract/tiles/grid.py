"""Tissue mask -> tile grid, by pure arithmetic: no image, no file, no settings object.

In: sizes in level-0 px and a boolean mask with its scale. Out: integer corners and exact tissue fractions.

The grid is anchored at the corner of the scanned bounds, so that on most slides tiles fall on the file's own tiles. A
tile lies wholly inside the bounds: what is left over at the right and bottom edge, less than one step, is not tiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mhim.extract.units import Microns, Mpp, PxL0

_BAND_ROWS = 256
_NO_OVERLAP = Microns(0.0)


@dataclass(frozen=True)
class Grid:
    """Where tiles lie on one slide. bounds_l0: (x, y, w, h). slide_mpp: µm per level-0 px, (x, y)."""

    bounds_l0: tuple[int, int, int, int]
    slide_mpp: tuple[Mpp, Mpp]
    tile_px: int
    overlap_um: Microns = _NO_OVERLAP

    def tile_l0(self, mpp: Mpp) -> tuple[PxL0, PxL0]:
        """Exact size of a tile in level-0 px, (w, h)."""
        mx, my = self.slide_mpp
        return PxL0(self.tile_px * mpp / mx), PxL0(self.tile_px * mpp / my)

    def axes(self, mpp: Mpp) -> tuple[np.ndarray, np.ndarray]:
        """int64 (Nx,), (Ny,): corners along x and y, level-0 px. The grids of all mpp share their first corner."""
        (w, h), (mx, my) = self.tile_l0(mpp), self.slide_mpp
        x0, y0, extent_x, extent_y = self.bounds_l0
        x = positions(x0, extent_x, w, PxL0(w - self.overlap_um / mx))
        return x, positions(y0, extent_y, h, PxL0(h - self.overlap_um / my))

    def parents(self, fine_l0: np.ndarray, fine_mpp: Mpp, coarse_l0: np.ndarray, coarse_mpp: Mpp) -> np.ndarray:
        """int32 (N,): for each fine tile the row in `coarse_l0` (M, 2) of the tile whose centre is nearest among those
        that hold the fine tile's centre; -1 where that one is not kept, or none is there."""
        x, y = self.axes(coarse_mpp)
        if not len(x) or not len(y):
            return np.full(len(fine_l0), -1, np.int32)
        index = np.full((len(y), len(x)), -1, np.int32)
        index[np.searchsorted(y, coarse_l0[:, 1]), np.searchsorted(x, coarse_l0[:, 0])] = np.arange(len(coarse_l0))
        (fine_w, fine_h), (coarse_w, coarse_h) = self.tile_l0(fine_mpp), self.tile_l0(coarse_mpp)
        column, inside_x = _holder(x, coarse_w, fine_l0[:, 0] + fine_w / 2)
        row, inside_y = _holder(y, coarse_h, fine_l0[:, 1] + fine_h / 2)
        return np.where(inside_x & inside_y, index[row, column], -1).astype(np.int32)


def _holder(corners: np.ndarray, size: float, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: index of the interval [corner, corner + size) with the nearest centre, and whether it holds."""
    middle = corners + size / 2
    right = np.clip(np.searchsorted(middle, centre), 0, len(middle) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(centre - middle[left] <= middle[right] - centre, left, right)
    return nearest, (centre >= corners[nearest] - 0.5) & (centre < corners[nearest] + size + 0.5)


def positions(start_l0: int, extent_l0: int, tile_l0: PxL0, step_l0: PxL0) -> np.ndarray:
    """int64 (K,): corners along one axis, `start_l0 + round(k * step_l0)`, so that rounding never adds up."""
    if tile_l0 > extent_l0 + 0.5:
        return np.zeros(0, np.int64)
    count = int(np.floor((extent_l0 + 0.5 - tile_l0) / step_l0 + 1e-9)) + 1
    starts_l0: np.ndarray = start_l0 + np.rint(np.arange(count) * step_l0).astype(np.int64)
    return starts_l0


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
        summed = _summed(mask[top : top + _BAND_ROWS], 1)  # (band, W + 1)
        along_x[top : top + _BAND_ROWS] = _at(summed, right, 1) - _at(summed, left, 1)
    summed = _summed(along_x, 0)  # (H + 1, Nx)
    sums = _at(summed, np.clip(y + size[1], 0, h), 0) - _at(summed, np.clip(y, 0, h), 0)  # (Ny, Nx)
    shares: np.ndarray = np.clip(sums / (size[0] * size[1]), 0.0, 1.0).astype(np.float32)
    return shares


def _summed(table: np.ndarray, axis: int) -> np.ndarray:
    """Running sums along `axis`, with a zero before the first."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (1, 0)
    dtype = np.int32 if table.dtype == bool else np.float64
    return np.pad(np.cumsum(table, axis=axis, dtype=dtype), pad)


def _at(summed: np.ndarray, where: np.ndarray, axis: int) -> np.ndarray:
    """Running sums at fractional positions `where` (K,) along `axis`, by linear interpolation."""
    low = np.minimum(where.astype(np.int64), summed.shape[axis] - 2)
    part = (where - low)[None, :] if axis == 1 else (where - low)[:, None]
    return np.asarray(summed.take(low, axis) * (1.0 - part) + summed.take(low + 1, axis) * part)
