"""A deterministic encoder without weights: stains, colour, nuclei-like blobs and texture at several scales.

In: uint8 RGB tiles of any size. Out: one vector of 124 numbers per tile, all within [-8, 8]. Knows nothing of slides,
and nothing it was not told: it is a baseline for smoke tests and for machines without weights, not a foundation model.

Haematoxylin, eosin and the residual come from scikit-image's separation matrix (Ruifrok and Johnston 2001) applied to
optical densities read from a table. Everything runs tile by tile, element-wise or in cache-sized arrays, so that a
tile's vector does not depend on its neighbours in the batch, on threads, or on a BLAS library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from mhim.extract.encoders import Encoder

VERSION = "texture-1"
DIM = 124

_WORK_PX = 128  # finest scale: 1 µm/px for 256 px tiles at 0.5, where a nucleus is still 6-12 px wide
_CHANNELS = 4  # haematoxylin, eosin, residual, mean optical density
_PERCENTILES = (0.05, 0.25, 0.50, 0.75, 0.95)
_BINS = 64
_LAGS = (1, 2, 4, 8)
_GLOBAL_CUTS = (0.15, 0.30, 0.45)  # haematoxylin density: any nucleus, a usual one, a hyperchromatic one


class Params(BaseModel):
    """No settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def build(params: Params) -> Encoder:
    """The encoder; see the module's docstring."""
    measure = _Measure()

    def encode(tiles: np.ndarray) -> np.ndarray:
        out = np.empty((len(tiles), DIM), np.float32)
        for i, tile in enumerate(tiles):
            out[i] = measure(tile)
        return out

    info = {
        "pooling": "statistics of the tile",
        "transform": f"area reduction to {_WORK_PX} px, optical density, haematoxylin-eosin separation",
        "precision": "float32",
        "licence": "Apache-2.0",
    }
    return Encoder("texture", encode, DIM, None, None, VERSION, info, threadsafe=True)


class _Measure:
    """The tables of the encoder, made once; calling it measures one tile."""

    def __init__(self) -> None:
        import cv2
        from skimage.color import hed_from_rgb

        self.cv2: Any = cv2
        # The unit of scikit-image's rgb2hed: density in units of -log(1e-6), never negative after separation.
        value = np.maximum(np.arange(256, dtype=np.float64) / 255, 1e-6)
        self.density = (np.log(value) / np.log(1e-6)).astype(np.float32)
        # rgb2hed's densities of a normally stained nucleus are 0.05-0.2: scaled so that it is around 0.5.
        self.unmix = (hed_from_rgb.astype(np.float32) * 5).T.copy()
        n = np.arange(_BINS, dtype=np.float32) + 0.5
        self.bin_value = n / _BINS * 1.5 - 0.25  # the histogram spans -0.25 .. 1.25
        self.ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))

    def planes(self, tile: np.ndarray) -> np.ndarray:
        """float32 (4, 128, 128): haematoxylin, eosin, residual and mean density of a uint8 (H, W, 3) tile."""
        cv2 = self.cv2
        small = cv2.resize(tile, (_WORK_PX, _WORK_PX), interpolation=cv2.INTER_AREA)
        density = self.density[small]  # (128, 128, 3)
        r, g, b = density[..., 0], density[..., 1], density[..., 2]
        out = np.empty((_CHANNELS, _WORK_PX, _WORK_PX), np.float32)
        for k in range(3):
            out[k] = r * self.unmix[k, 0] + g * self.unmix[k, 1] + b * self.unmix[k, 2]
        out[3] = (r + g + b) * (5 / 3)
        return out

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        planes = self.planes(tile)
        parts = [_distribution(planes, self.bin_value), *self._bands(planes), self._blobs(planes[0], planes[1])]
        parts += [_lags(planes[0]), _regions(planes), self._edges(planes[0])]
        vector = np.concatenate(parts)
        bounded: np.ndarray = np.clip(np.nan_to_num(vector, nan=0.0, posinf=8.0, neginf=-8.0), -8, 8).astype(np.float32)
        return bounded

    def _bands(self, planes: np.ndarray) -> list[np.ndarray]:
        """Energy of each octave (Laplacian pyramid of haematoxylin, eosin and density): 3 channels x 5 scales x 2."""
        cv2 = self.cv2
        image = np.ascontiguousarray(planes[[0, 1, 3]].transpose(1, 2, 0))  # (128, 128, 3)
        out = []
        for _ in range(5):
            size = image.shape[0] // 2
            coarse = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            band = image - cv2.resize(coarse, (2 * size, 2 * size), interpolation=cv2.INTER_LINEAR)
            flat = np.abs(band.reshape(-1, 3))
            out.append(flat.mean(0) * 10)
            out.append(np.sqrt(np.square(flat).mean(0)) * 6)
            image = coarse
        return out

    def _blobs(self, h: np.ndarray, e: np.ndarray) -> np.ndarray:
        """Nuclei-like blobs of haematoxylin: how many, how large, how dark, how uneven. 24 numbers.

        Found once by contrast with the surroundings (so that pale nuclei count) and by fixed cuts (so that dark ones
        stand out). Sizes are logarithms of areas in work px.
        """
        cv2 = self.cv2
        smooth = cv2.blur(h, (3, 3))
        contrast = smooth - cv2.blur(h, (31, 31))
        mask = (contrast > 0.04).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, self.ellipse)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        out = np.zeros(24, np.float32)
        inside = mask.astype(bool)
        out[0] = inside.mean() * 4
        if count > 1:
            area = stats[1:, cv2.CC_STAT_AREA].astype(np.float32)
            log_area = np.log2(area)
            order = np.sort(log_area)
            out[1] = np.sqrt(count - 1) / 5
            out[2] = log_area.mean() / 3
            out[3] = log_area.std()
            out[4] = order[(len(order) * 9) // 10] / 3
            out[5] = (area * area).sum() / area.sum() / 200
            box = stats[1:, cv2.CC_STAT_WIDTH] * stats[1:, cv2.CC_STAT_HEIGHT]
            out[6] = (area / box).mean() * 2
            out[7] = (area > 60).mean() * 2
            flat = labels.ravel()
            darkness = np.bincount(flat, weights=h.ravel(), minlength=count)[1:] / area
            out[8] = darkness.mean() * 3
            out[9] = darkness.std() * 8
            out[10] = np.sort(darkness)[(len(darkness) * 9) // 10] * 2
            out[11] = (darkness * area).sum() / area.sum() * 3
            values = h[inside]
            out[12] = values.std() * 6
            out[13] = (values.mean() - h[~inside].mean() if len(values) < h.size else values.mean()) * 4
            out[14] = e[inside].mean() * 3
        for k, cut in enumerate(_GLOBAL_CUTS):
            over = smooth > cut
            edge = int(np.count_nonzero(over[1:] != over[:-1])) + int(np.count_nonzero(over[:, 1:] != over[:, :-1]))
            covered = int(np.count_nonzero(over))
            out[15 + 3 * k] = covered / over.size * 4
            out[16 + 3 * k] = edge / over.size * 8
            out[17 + 3 * k] = covered / max(edge, 1) / 2  # mean radius, up to a factor
        return out

    def _edges(self, h: np.ndarray) -> np.ndarray:
        """Strength of haematoxylin's gradients over eight directions, sorted: fibres against cells. 9 numbers."""
        dx = h[1:-1, 2:] - h[1:-1, :-2]
        dy = h[2:, 1:-1] - h[:-2, 1:-1]
        strength = np.sqrt(dx * dx + dy * dy)
        octant = (dx > 0).astype(np.uint8) + 2 * (dy > 0) + 4 * (np.abs(dx) > np.abs(dy))
        total = np.bincount(octant.ravel().astype(np.intp), weights=strength.ravel(), minlength=8)
        per = total / max(float(total.sum()), 1e-6)
        return np.concatenate([np.sort(per) * 4, [strength.mean() * 8]]).astype(np.float32)


def _distribution(planes: np.ndarray, bin_value: np.ndarray) -> np.ndarray:
    """Mean, sd, skewness and five percentiles per channel: 4 x 8 numbers."""
    out = np.empty((_CHANNELS, 8), np.float32)
    index = np.clip((planes + 0.25) * (_BINS / 1.5), 0, _BINS - 1).astype(np.intp)
    for k in range(_CHANNELS):
        share = np.bincount(index[k].ravel(), minlength=_BINS) / index[k].size
        plane = planes[k].ravel()
        mean = plane.mean()
        centred = plane - mean
        square = centred * centred
        variance = square.mean()
        third = (square * centred).mean()
        out[k, :3] = mean * 3, np.sqrt(variance) * 6, np.cbrt(third) * 6
        cumulative = np.cumsum(share)
        out[k, 3:] = bin_value[np.minimum(np.searchsorted(cumulative, _PERCENTILES), _BINS - 1)] * 3
    return out.ravel()


def _lags(h: np.ndarray) -> np.ndarray:
    """Correlation of haematoxylin with itself at four distances, along x and along y: 8 numbers in [-2, 2]."""
    z = h - h.mean()
    power = max(float((z * z).mean()), 1e-5)
    out = []
    for lag in _LAGS:
        out.append((z[:, lag:] * z[:, :-lag]).mean() / power * 2)
        out.append((z[lag:] * z[:-lag]).mean() / power * 2)
    return np.asarray(out, np.float32)


def _regions(planes: np.ndarray) -> np.ndarray:
    """How unlike the 16 parts of the tile are: sd, lowest, highest mean per channel; bare glass. 21 numbers."""
    side = _WORK_PX // 4
    means = planes.reshape(_CHANNELS, 4, side, 4, side).mean((2, 4)).reshape(_CHANNELS, 16)
    ranked = np.sort(means, axis=1)
    fine = planes[0].reshape(16, 8, 16, 8).mean((1, 3))  # 8 px: a nucleus or the gap beside it
    glass = (planes[3] < 0.06).mean()
    extra = [fine.std() * 6, fine.max() * 2, np.percentile(fine, 90) * 2, (fine > 0.35).mean() * 4, glass * 4]
    per = np.stack([means.std(1) * 8, ranked[:, 0] * 3, ranked[:, -1] * 3, (ranked[:, 12] - ranked[:, 3]) * 5])
    return np.concatenate([per.ravel(), extra]).astype(np.float32)
