"""Tissue by what the stains absorb: optical density and its difference between the colour channels (the default).

In: RGB at a known mpp, already smoothed. Out: mask before cleaning.

Optical density per channel, OD_c = -ln(I_c / I0_c), with I0 the slide's own ground: a tinted or grey ground has OD 0.
Stains absorb the channels unequally (Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23, 2001), while shading,
stitching and dust are grey. Hence the score: the spread of OD over the channels (chroma), plus the part of the mean OD
that is too dark for any ground. The threshold is Otsu's on the score, held within bounds by the ground's own noise.
"""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from configs.schema import Settings

_SCALE = 200.0  # OD 1.275 = 255: one grey level of the score is OD 0.005


class Params(Settings):
    min_chroma: float = Field(0.04, ge=0, le=1, description="least OD difference between channels that is tissue")
    max_chroma: float = Field(0.10, ge=0, le=1, description="a larger OD difference is tissue in any slide")
    dark_od: float = Field(0.35, ge=0, description="OD in all channels that is tissue without any colour")


def segment(rgb: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W)."""
    ground = background(rgb)
    od = [cv2.LUT(rgb[..., c], _od_table(ground[c])) for c in range(3)]
    chroma = cv2.subtract(cv2.max(cv2.max(od[0], od[1]), od[2]), cv2.min(cv2.min(od[0], od[1]), od[2]))
    otsu, _ = cv2.threshold(chroma, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    limit = min(max(otsu / 2, params.min_chroma * _SCALE), params.max_chroma * _SCALE)
    darkest_channel = cv2.min(cv2.min(od[0], od[1]), od[2])
    return (chroma > limit) | (darkest_channel > params.dark_od * _SCALE)


def background(rgb: np.ndarray) -> tuple[float, float, float]:
    """The ground's colour: the commonest bright one that is not pure white; (255, 255, 255) where all is dark."""
    brightness = rgb.min(axis=2)
    histogram = np.bincount(brightness.ravel(), minlength=256)[:255]
    if histogram[200:].sum() < 0.001 * brightness.size:
        return (255.0, 255.0, 255.0)
    mode = 200 + int(np.argmax(histogram[200:]))
    pick = np.abs(brightness.astype(np.int16) - mode) <= 1
    r, g, b = np.median(rgb[pick], axis=0)
    return float(r), float(g), float(b)


def _od_table(ground: float) -> np.ndarray:
    """uint8 (256,): intensity -> OD * _SCALE, saturating."""
    od = -np.log((np.arange(256) + 1.0) / (ground + 1.0))
    return np.clip(np.rint(od * _SCALE), 0, 255).astype(np.uint8)
