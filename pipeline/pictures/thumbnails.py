"""Pictures of slides small enough for a report, with a legend that can be read.

In: the PNGs and contact sheets of `heatmaps/`. Out: JPEG bytes. The strip below a heatmap (title, colours, their ends)
is kept as it was drawn and not made smaller with the picture: letters of 13 px are read, those of 4 are not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhim.extract.images import encoded
from mhim.mil.heatmap import STRIP_PX
from mhim.pipeline.store import layout

PICTURE_PX = 440  # long side; a strip holds title and colours in its left 440 px
SHEET_PX = 900


def heatmap(path: Path) -> bytes:
    """A drawn layer. Raises StoreError where it is damaged."""
    picture = _read(path)
    strip = picture[-STRIP_PX:, :PICTURE_PX]
    small = _smaller(picture[:-STRIP_PX], PICTURE_PX)
    width = max(small.shape[1], strip.shape[1])
    whole = np.full((small.shape[0] + len(strip), width, 3), 255, np.uint8)
    whole[: small.shape[0], : small.shape[1]] = small
    whole[small.shape[0] :, : strip.shape[1]] = strip
    return encoded(whole, ".jpg", 80)


def sheet(path: Path) -> bytes:
    """A contact sheet of tiles. Raises StoreError where it is damaged."""
    return encoded(_smaller(_read(path), SHEET_PX), ".jpg", 80)


def _read(path: Path) -> np.ndarray:
    import cv2

    picture = cv2.imread(str(path))
    if picture is None or len(picture) <= STRIP_PX:
        raise layout.StoreError(f"{path} is damaged; delete its folder and score again")
    return np.asarray(picture[..., ::-1])


def _smaller(rgb: np.ndarray, most_px: int) -> np.ndarray:
    import cv2

    k = min(1.0, most_px / max(rgb.shape[:2]))
    return np.asarray(cv2.resize(rgb, None, fx=k, fy=k, interpolation=cv2.INTER_AREA))
