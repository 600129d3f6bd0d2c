"""The picture a person checks tiling on: the slide, the outline of its tissue, the tiles.

In: a low-resolution RGB image, its mask, the tiles in that image's px. Out: a new RGB image. No file, no slide.
"""

from __future__ import annotations

import cv2
import numpy as np

from mhim.extract.images import encoded

MAX_SIDE_PX = 1600
_OUTLINE = (0, 160, 0)
_TILE = (30, 60, 200)


def draw(rgb: np.ndarray, mask: np.ndarray, corners_px: np.ndarray, tile_px: tuple[float, float]) -> np.ndarray:
    """uint8 (h, w, 3), at most `MAX_SIDE_PX` long: tissue outlined in green, tiles framed in blue, the rest paled.

    rgb: uint8 (H, W, 3); mask: bool (H, W); corners_px: float (N, 2), x then y, and tile_px (w, h), both in px of rgb.
    """
    scale = min(1.0, MAX_SIDE_PX / max(rgb.shape[:2]))
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    out = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if scale < 1 else rgb.copy()
    shown = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    # Paled by a quarter towards white where there is no tissue: one pass, no float image.
    paler = cv2.convertScaleAbs(out, alpha=0.75, beta=63.75)
    out = np.asarray(cv2.copyTo(out, shown, paler))
    start = np.rint(corners_px * scale).astype(np.int32)
    stop = np.rint((corners_px + np.asarray(tile_px)) * scale).astype(np.int32)
    for (x0, y0), (x1, y1) in zip(start.tolist(), stop.tolist(), strict=True):
        cv2.rectangle(out, (x0, y0), (x1, y1), _TILE, 1)
    outline, _ = cv2.findContours(shown, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(out, outline, -1, _OUTLINE, max(1, round(max(size) / 900)))
    return out


def jpeg(rgb: np.ndarray) -> bytes:
    """A picture, uint8 (h, w, 3), as JPEG of quality 85. Raises SlideError."""
    return encoded(rgb, ".jpg", 85)
