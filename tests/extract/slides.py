"""Small generated slides for the tests: no fixture file, every odd case in a few lines."""

from __future__ import annotations

import functools
from pathlib import Path

import cv2
import numpy as np
import tifffile

MPP = 0.5


@functools.cache
def tissue_rgb(h: int = 1024, w: int = 1536, seed: int = 0) -> np.ndarray:
    """uint8 (h, w, 3): a pink, textured disc of tissue on near-white glass."""
    rng = np.random.default_rng(seed)
    rgb = np.full((h, w, 3), 243, np.float32)
    y, x = np.mgrid[:h, :w]
    inside = (x - w / 2) ** 2 + (y - h / 2) ** 2 < (0.42 * min(h, w)) ** 2
    grain = cv2.GaussianBlur(rng.standard_normal((h, w)).astype(np.float32), (0, 0), 2)[..., None] * 120
    tissue = np.array([205, 120, 175], np.float32) + grain
    rgb = np.where(inside[..., None], tissue, rgb + rng.standard_normal((h, w, 1)))
    return np.clip(rgb, 0, 255).astype(np.uint8)


def write_svs(
    path: Path, rgb: np.ndarray, mpp: float | str | None = MPP, downsamples: tuple[int, ...] = (1, 4), power: int = 20
) -> Path:
    """An Aperio-style pyramid that OpenSlide opens with vendor `aperio`."""
    with tifffile.TiffWriter(path) as tif:
        for i, k in enumerate(downsamples):
            size = (rgb.shape[1] // k, rgb.shape[0] // k)
            level = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if k > 1 else rgb
            text = f"Aperio Image Library v12.0.15 \r\n{rgb.shape[1]}x{rgb.shape[0]}"
            if power:
                text += f"|AppMag = {power}"
            if mpp is not None:
                text += f"|MPP = {mpp}"
            tif.write(level, tile=(256, 256), photometric="rgb", compression="jpeg", compressionargs={"level": 85},
                      description=text, metadata=None, subfiletype=1 if i else 0)  # fmt: skip
    return path


def write_tiff(path: Path, data: np.ndarray, **options: object) -> Path:
    """A plain TIFF; striped unless `tile` is given."""
    tifffile.imwrite(path, data, metadata=None, **options)  # type: ignore[arg-type]
    return path
