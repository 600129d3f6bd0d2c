"""Tissue segmenters, one file each: RGB at a known mpp in, a boolean mask out. Knows nothing of files or grids.

A file may also offer `identity(params)`, plain JSON that stands for its settings in the fingerprint (the hash of its
weights rather than their path), and `notes(params, mpp)`, lines for the person such as a licence.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from pydantic import BaseModel


class Segmenter(Protocol):
    """What a file of this folder offers."""

    Params: type[BaseModel]

    def segment(self, rgb: np.ndarray, mpp: float, params: BaseModel) -> np.ndarray:
        """rgb: uint8 (H, W, 3); mpp: µm per px of it. Returns bool (H, W), True on tissue."""
        ...
