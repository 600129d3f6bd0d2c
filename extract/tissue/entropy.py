"""Tissue by texture: where the grey level varies from px to px, whatever the colour.

In: RGB at a known mpp. Out: mask before cleaning. Finds unstained, grey or oddly stained tissue that colour methods
miss; takes dust, pen edges and cover-slip borders for tissue too.
"""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from mhim.configs.schema import Settings


class Params(Settings):
    window_um: float = Field(64.0, gt=0, description="edge of the window whose grey levels are looked at, µm")
    bits: float = Field(2.2, ge=0, description="entropy of the window's 32-bin histogram from which it is tissue")


def segment(rgb: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W)."""
    grey = np.right_shift(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.uint8), 3)
    side = max(3, round(params.window_um / mpp) | 1)
    entropy = np.zeros(grey.shape, np.float32)
    for level in range(32):
        share = cv2.blur((grey == level).astype(np.float32), (side, side), borderType=cv2.BORDER_REFLECT_101)
        entropy -= share * np.log2(np.maximum(share, 1e-6))
    return entropy > params.bits
