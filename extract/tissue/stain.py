"""Tissue by what the stains absorb: optical density and its difference between the colour channels (the default).

In: RGB at a known mpp. Out: mask before cleaning.

Optical density per channel, OD_c = -ln(I_c / I0_c), with I0 the slide's own ground: a tinted or grey ground has OD 0.
Stains absorb the channels unequally (Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23, 2001), while shading,
stitching and dust are grey. Hence the score: the spread of OD over the channels (chroma), plus what is too dark in all
of them for any ground. The threshold is half of Otsu's, held within bounds, so that pale parts beside dark ones stay.
Fat, nine tenths of which is as clear as glass, is known by its mesh of thin membranes.
"""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from mhim.configs.schema import Settings

_BAND_PX = 1_600_000
_FAT_REACH_UM = 500.0  # openings of 56, 16, 40, a closing of 48, a window of 88 µm twice, two rims: 410 at 8 µm/px
_SCALE = 200.0  # OD 1.275 = 255: one grey level of the score is OD 0.005


class Params(Settings):
    min_chroma: float = Field(0.04, ge=0, le=1, description="least OD difference between channels that is tissue")
    max_chroma: float = Field(0.10, ge=0, le=1, description="a larger OD difference is tissue in any slide")
    dark_od: float = Field(0.35, ge=0, description="OD in all channels that is tissue without any colour")
    membrane_od: float = Field(0.02, ge=0, description="OD (green) of a fat membrane over its cells; 0 leaves fat out")
    membrane_share: float = Field(0.18, gt=0, le=1, description="share of membranes in an area that makes it fat")
    fat_cell_um: float = Field(88.0, gt=0, description="width of the window in which membranes are counted, µm")


def segment(rgb: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W, 3) -> bool (H, W)."""
    ground = background(rgb)
    od = absorbed(rgb, [_od_table(g) for g in ground])
    least = cv2.min(cv2.min(od[0], od[1]), od[2])
    chroma = cv2.subtract(cv2.max(cv2.max(od[0], od[1]), od[2]), least)
    otsu, _ = cv2.threshold(chroma, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    limit = min(max(otsu / 2, params.min_chroma * _SCALE), params.max_chroma * _SCALE)
    green = od[1]
    del od
    solid = np.asarray(cv2.threshold(chroma, round(limit, 6), 1, cv2.THRESH_BINARY)[1], np.uint8)
    del chroma
    solid |= np.asarray(cv2.threshold(least, round(params.dark_od * _SCALE, 6), 1, cv2.THRESH_BINARY)[1], np.uint8)
    del least
    if params.membrane_od == 0:
        return solid.view(bool)
    # In bands, whose dozen planes are small; `_FAT_REACH_UM` beyond a band's edge nothing decides within it.
    out = solid.copy()
    height, halo = len(solid), int(-(-_FAT_REACH_UM // mpp))
    rows = max(4 * halo, _BAND_PX // solid.shape[1])
    for top in range(0, height, rows):
        first, last = max(0, top - halo), min(height, top + rows + halo)
        fat = _fat(green[first:last], solid[first:last], mpp, params)
        out[top : top + rows] |= fat[top - first : top - first + rows]
    return out.view(bool)


def absorbed(rgb: np.ndarray, tables: list[np.ndarray]) -> list[np.ndarray]:
    """uint8 (H, W, 3) -> its three channels, each through its own table of 256 uint8: three uint8 (H, W)."""
    return [np.asarray(cv2.LUT(cv2.extractChannel(rgb, c), tables[c]), np.uint8) for c in range(3)]


def background(rgb: np.ndarray) -> tuple[float, float, float]:
    """The ground's colour: the commonest bright one that is not pure white; (255, 255, 255) where all is dark."""
    if rgb.shape[0] * rgb.shape[1] > 250_000:  # a quarter of so many px tells the same
        h, w = rgb.shape[0] // 2, rgb.shape[1] // 2
        rgb = cv2.resize(rgb[: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_NEAREST)
    red, green, blue = cv2.split(rgb)
    brightness = cv2.min(cv2.min(red, green), blue)
    histogram = cv2.calcHist([brightness], [0], None, [256], [0, 256]).ravel()[:255]
    if histogram[200:].sum() < 0.001 * brightness.size:
        return (255.0, 255.0, 255.0)
    mode = 200 + int(np.argmax(histogram[200:]))
    at_mode = cv2.inRange(brightness, mode - 1, mode + 1)
    counts = [cv2.calcHist([c], [0], at_mode, [256], [0, 256]).ravel().cumsum() for c in (red, green, blue)]
    r, g, b = (float(np.searchsorted(c, c[-1] / 2)) for c in counts)  # medians, without sorting a million px
    return r, g, b


def _fat(od_green: np.ndarray, solid: np.ndarray, mpp: float, params: Params) -> np.ndarray:
    """uint8 (H, W) of 0 and 1: where thin dark lines are dense though the area is not solid.

    Green, not chroma: JPEG keeps brightness at full resolution and colour at half, which wipes a thin membrane out.
    """
    side = max(3, round(56 / mpp) | 1)
    lines = cv2.morphologyEx(od_green, cv2.MORPH_TOPHAT, np.ones((side, side), np.uint8))
    body = cv2.morphologyEx(solid, cv2.MORPH_OPEN, _disk(16 / mpp))
    grown = cv2.dilate(body, np.ones((3, 3), np.uint8))  # the rim of solid tissue is no membrane
    free = 1 - grown
    mesh = ((lines > params.membrane_od * _SCALE) & (free > 0)).astype(np.uint8)
    window = max(3, round(params.fat_cell_um / mpp) | 1)
    density: np.ndarray = mesh * np.uint8(200)
    room: np.ndarray = free * np.uint8(200)
    for _ in range(2):  # one pass counts one or two membranes as the window happens to fall
        density, room = (np.asarray(cv2.blur(a, (window, window))) for a in (density, room))
    room = np.asarray(cv2.convertScaleAbs(room, alpha=params.membrane_share))
    # Where solid tissue fills most of the window the share would rest on a few px: at least 15 % must be free.
    fat: np.ndarray = ((density > room) & (density > 30 * params.membrane_share) & (free > 0)).astype(np.uint8)
    if fat.any():
        # The window reaches beyond the outermost membrane; the fat does not.
        cell = max(3, round(96 / mpp) | 1)
        hull = cv2.morphologyEx(cv2.max(mesh, grown), cv2.MORPH_CLOSE, np.ones((cell, cell), np.uint8))
        fat &= np.asarray(hull, np.uint8)
        fat = np.asarray(cv2.morphologyEx(fat, cv2.MORPH_OPEN, _disk(40 / mpp)), np.uint8)
    if not fat.any():
        return fat
    rim = (cv2.dilate(fat, np.ones((5, 5), np.uint8)) > 0) & (grown > 0)
    return np.asarray((fat > 0) | rim).astype(np.uint8)


def _disk(radius_px: float) -> np.ndarray:
    r = max(1, round(radius_px))
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1)))


def _od_table(ground: float) -> np.ndarray:
    """uint8 (256,): intensity -> OD * _SCALE, saturating."""
    od = -np.log((np.arange(256) + 1.0) / (ground + 1.0))
    density: np.ndarray = np.clip(np.rint(od * _SCALE), 0, 255).astype(np.uint8)
    return density
