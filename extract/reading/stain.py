"""Stain normalisation of tiles, each by itself: Reinhard (2001) or Macenko (2009), towards one fixed reference.

In and out: uint8 (n, H, W, 3) RGB, changed in place. Tiles with too little stain to measure stay as they are. Knows
nothing of slides or encoders. The statistics come from each tile alone, so that the result depends neither on the
order of tiles nor on where a run resumed; colour spaces are OpenCV's, the eigenvectors numpy's.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

MIN_PIXELS = 512  # stained pixels below which a tile's statistics mean nothing
_GLASS_DENSITY = 0.15  # optical density (natural logarithm) of what counts as stained, as in Macenko's paper

# Reference of Reinhard: mean and sd of L, a, b over the stained pixels of public H&E slides, rounded.
_LAB_MEAN = np.array([55.0, 32.0, -13.0], np.float32)
_LAB_SD = np.array([16.0, 11.0, 8.0], np.float32)
# Reference of Macenko: columns are the densities of pure haematoxylin and eosin in R, G, B; then the 99th percentiles
# of their concentrations.
_STAINS = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]], np.float32)
_STRENGTH = np.array([1.9705, 1.0308], np.float32)

_DENSITY = -np.log((np.arange(256, dtype=np.float64) + 1) / 240).astype(np.float32)  # 240: the glass of Macenko's demo


def normaliser(name: str) -> Callable[[np.ndarray], None] | None:
    """The function of that name, which changes tiles in place; None for `none`."""
    return {"none": None, "reinhard": _all(reinhard), "macenko": _all(macenko)}[name]


def _all(one: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], None]:
    def every(tiles: np.ndarray) -> None:
        for tile in tiles:
            tile[...] = one(tile)

    return every


def reinhard(tile: np.ndarray) -> np.ndarray:
    """Mean and sd of the stained pixels' L, a, b become the reference's. uint8 (H, W, 3) -> the same.

    Glass stays as it is; pixels between glass and stain (half to the full threshold) are blended.
    """
    density = _DENSITY[tile].mean(-1)
    stained = density > _GLASS_DENSITY
    if np.count_nonzero(stained) < MIN_PIXELS:
        return tile
    lab = cv2.cvtColor(tile.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    values = lab[stained]
    mean, sd = values.mean(0), np.maximum(values.std(0), 1e-3)
    share = np.clip(density / (_GLASS_DENSITY / 2) - 1, 0, 1)[..., None]
    moved = (lab - mean) / sd * _LAB_SD + _LAB_MEAN
    lab = np.ascontiguousarray(lab + share * (moved - lab), np.float32)
    lab[..., 0] = np.clip(lab[..., 0], 0, 100)
    rgb = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    return np.asarray(np.rint(np.clip(rgb, 0, 1) * 255), np.uint8)


def macenko(tile: np.ndarray) -> np.ndarray:
    """The tile's own two stains and their strength become the reference's. uint8 (H, W, 3) -> the same.

    Stains: the plane of the two largest principal directions of optical density, in it the 1st and 99th percentile of
    the angle. Concentrations: least squares. The least dense of the three channels decides what counts as stained.
    """
    density = _DENSITY[tile].reshape(-1, 3)  # (pixels, 3)
    stained = density[density.min(1) > _GLASS_DENSITY]
    if len(stained) < MIN_PIXELS:
        return tile
    _, vectors = np.linalg.eigh(np.cov(stained.T.astype(np.float64)))
    plane = vectors[:, [2, 1]]
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)  # an eigenvector's sign is arbitrary
    projected = stained @ plane.astype(np.float32)
    angle = np.arctan2(projected[:, 1], projected[:, 0])
    low, high = np.percentile(angle, (1, 99))
    pair = np.stack([plane @ (np.cos(a), np.sin(a)) for a in (low, high)], axis=1)  # (3, 2)
    if pair[0, 0] < pair[0, 1]:
        pair = pair[:, ::-1]  # haematoxylin absorbs more red than eosin does
    gram = pair.T @ pair
    if abs(np.linalg.det(gram)) < 1e-4:  # one stain only
        return tile
    concentrations = density @ (pair @ np.linalg.inv(gram)).astype(np.float32)  # (pixels, 2)
    strength = np.percentile(concentrations, 99, axis=0)
    if (strength < 1e-3).any():
        return tile
    scaled = concentrations * (_STRENGTH / strength).astype(np.float32)
    rgb = 240 * np.exp(-(scaled @ _STAINS.T))
    return np.asarray(np.rint(np.clip(rgb, 0, 255)), np.uint8).reshape(tile.shape)
