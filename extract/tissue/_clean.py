"""A raw tissue mask made presentable: gaps closed, small pieces dropped, small holes filled, all sizes in µm.

In: a boolean mask and its scale. Out: a boolean mask. Not a segmenter (the underscore keeps it from being listed).
"""

from __future__ import annotations

import cv2
import numpy as np


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
    return out == 0


def _keep_large(binary: np.ndarray, least_px: float, connectivity: int) -> None:
    """Set the components of `binary` (uint8 0/1) with fewer than `least_px` px to 0, in place."""
    if least_px <= 1:
        return
    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary, connectivity=connectivity, ltype=cv2.CV_32S)
    keep = (stats[:, cv2.CC_STAT_AREA] >= least_px).astype(np.uint8)
    keep[0] = 0
    for top in range(0, len(binary), 256):  # numpy indexes through an 8-byte copy: in bands it stays small
        binary[top : top + 256] = keep[labels[top : top + 256]]
