"""Tissue by Otsu's threshold on saturation: the field's baseline.

In: RGB at a known mpp, already smoothed. Out: mask before cleaning. Wants coloured tissue on a grey or white ground.
Reference: N. Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 9(1), 1979.
"""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from mhim.configs.schema import Settings


class Params(Settings):
    min_saturation: int = Field(8, ge=0, le=255, description="least threshold (0-255): else noise is split")


def segment(rgb: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W)."""
    saturation = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)[..., 1]
    # Black is fully saturated in HSV by rounding alone; below value 20 nothing is tissue worth its colour.
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return saturation > max(threshold, params.min_saturation)
