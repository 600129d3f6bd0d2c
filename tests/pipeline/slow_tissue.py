"""A segmenter of the user's own that takes its time: SLOW_S seconds a slide, so that a job can be hit in the middle."""

from __future__ import annotations

import os
import time

import numpy as np

from mhim.extract.tissue import otsu

Params = otsu.Params


def segment(rgb: np.ndarray, mpp: float, params: otsu.Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W)."""
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    return otsu.segment(rgb, mpp, params)
