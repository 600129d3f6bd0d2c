"""What is on a slide and is no good tissue: pen ink, dark folds, haze and bubbles, blur.

In: the low-resolution RGB image with its scale and tissue mask; for blur, small probes at high resolution. Out: masks
of the same shape. Knows nothing of tiles and thresholds: the tiling turns masks into fractions per tile.

All judge optical density over the slide's own ground (`stain.background`). They are screens, tuned to miss little
solid pen and few thick folds; none is a diagnosis, which is why fractions are stored and thresholds come later.
"""

from __future__ import annotations

import cv2
import numpy as np

from mhim.extract.tissue.stain import absorbed

_SCALE = 100.0  # OD 2.55 = 255: ink is darker than the stain's scale reaches


def densities(rgb: np.ndarray, ground: tuple[float, float, float]) -> list[np.ndarray]:
    """Optical density of R, G and B over the ground, times 100: three uint8 (H, W)."""
    tables = [-np.log((np.arange(256) + 1.0) / (g + 1.0)) * _SCALE for g in ground]
    return absorbed(rgb, [np.clip(np.rint(t), 0, 255).astype(np.uint8) for t in tables])


def pen(od: list[np.ndarray], mpp: float) -> np.ndarray:
    """bool (H, W): felt-pen strokes, blue, green, red or black, at least 40 µm wide.

    Blue and green ink absorb red light far more than green light; haematoxylin and eosin never do. Red ink lets red
    pass entirely and absorbs green and blue alike; eosin and blood absorb blue far less, DAB some red. Black is dense
    and even. Strokes are followed into their pale edges.
    """
    r, g, b = od
    blue_or_green = cv2.subtract(r, _times(g, 1.3)) > 25  # OD_r > 1.3 OD_g + 0.25
    least, most = cv2.min(cv2.min(r, g), b), cv2.max(cv2.max(r, g), b)
    red = (cv2.min(g, b) > 70) & (_times(g, 0.12) > r) & (b > _times(g, 0.8))
    black = (least > 150) & (cv2.subtract(most, least) < 25)
    dense = (blue_or_green | red | black).astype(np.uint8)
    if not dense.any():
        return np.zeros(r.shape, bool)
    core = cv2.morphologyEx(dense, cv2.MORPH_OPEN, _disk(20 / mpp))
    if not core.any():
        return np.zeros(r.shape, bool)
    # Over tissue the ink is mixed: stain adds more to green than to red. Such px belong to a stroke if they touch it.
    mixed = ((cv2.subtract(r, _times(g, 0.9)) > 15) & (r > 50)).astype(np.uint8)
    whole = cv2.max(cv2.morphologyEx(mixed, cv2.MORPH_OPEN, _disk(20 / mpp)), core)
    _, labels = cv2.connectedComponents(np.asarray(whole, np.uint8), connectivity=8)
    stroke = np.isin(labels, np.unique(labels[core > 0]))
    pale = cv2.subtract(r, _times(g, 1.15)) > 3
    reach = cv2.dilate(stroke.astype(np.uint8), _disk(60 / mpp)) > 0  # a stroke's edge is no wider
    return np.asarray(stroke | (pale & reach))


def ink_on_glass(od: list[np.ndarray], ink: np.ndarray) -> np.ndarray:
    """bool (H, W): the part of `ink` with nothing beneath it.

    Along one stroke the ink's colour is one direction in OD space, OD_g = k OD_r; stain beneath adds to OD_g. k is the
    lowest tenth over the stroke, so it is right if any tenth of the stroke lies on glass.
    """
    out = np.zeros(ink.shape, bool)
    if not ink.any():
        return out
    count, labels, stats, _ = cv2.connectedComponentsWithStats(ink.astype(np.uint8), connectivity=8)
    r, g = od[0], od[1]
    for i in range(1, count):
        x, y, w, h = (int(v) for v in stats[i, :4])
        here = labels[y : y + h, x : x + w] == i
        red, green = r[y : y + h, x : x + w].astype(np.float32), g[y : y + h, x : x + w].astype(np.float32)
        dense = here & (red > 30) & (red < 250)
        k = float(np.percentile(green[dense] / red[dense], 10)) if np.count_nonzero(dense) >= 20 else 1.0
        out[y : y + h, x : x + w] |= here & (green - k * red < 12)
    return out


def folds(od: list[np.ndarray], tissue: np.ndarray, mpp: float) -> np.ndarray:
    """bool (H, W): tissue lying double: at least 0.35 OD darker than the slide's usual tissue in every channel's mean.

    A fold doubles what light passes, so it stands out from the tissue's own median; dense lymphoid tissue is darker in
    red and green but not in blue, hence all three must exceed.
    """
    if np.count_nonzero(tissue) < 100:
        return np.zeros(tissue.shape, bool)
    dark = tissue.copy()
    for channel in od:
        counts = cv2.calcHist([channel], [0], tissue.view(np.uint8), [256], [0, 256]).ravel().cumsum(dtype=np.float64)
        median = float(np.searchsorted(counts, counts[-1] / 2))  # by counting: sorting a million px takes longer
        dark &= channel > max(1.7 * median, median + 20)
    return np.asarray(cv2.morphologyEx(dark.astype(np.uint8), cv2.MORPH_OPEN, _disk(12 / mpp)) > 0)


def haze(od: list[np.ndarray], mpp: float) -> np.ndarray:
    """bool (H, W): grey veils and bubble rims: OD 0.05 to 0.6, equal in all channels, smooth over 100 µm."""
    least = cv2.min(cv2.min(od[0], od[1]), od[2])
    most = cv2.max(cv2.max(od[0], od[1]), od[2])
    veiled = ((cv2.subtract(most, least) < 4) & (least >= 5) & (least <= 60)).astype(np.uint8)
    if not veiled.any():
        return np.zeros(least.shape, bool)
    return np.asarray(cv2.morphologyEx(veiled, cv2.MORPH_OPEN, _disk(50 / mpp)) > 0)


def sharpness(rgb: np.ndarray) -> float:
    """How sharp a probe is: energy of its finest detail over that of detail twice as coarse; about 0.1 to 1.

    The ratio, unlike the variance of the Laplacian, does not depend on how much or how darkly stained the tissue is.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    one, two, four = grey, cv2.GaussianBlur(grey, (0, 0), 1.0), cv2.GaussianBlur(grey, (0, 0), 2.0)
    fine, coarse = float(np.mean((one - two) ** 2)), float(np.mean((two - four) ** 2))
    return fine / (coarse + 0.5)


def _times(plane: np.ndarray, factor: float) -> np.ndarray:
    """uint8 times a positive number, rounded and saturating."""
    return np.asarray(cv2.convertScaleAbs(plane, alpha=factor))


def _disk(radius_px: float) -> np.ndarray:
    r = max(1, round(radius_px))
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1)))
