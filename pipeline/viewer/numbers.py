"""Numbers of many tiles as short bytes for the page: a slide of 275,000 tiles in about 1 MB, not in 11 MB of JSON.

In: arrays. Out: bytes that compress well, little-endian; `static/slide.js` reads them. Knows no slide and no HTTP.
"""

from __future__ import annotations

import numpy as np


def places(coords_l0: np.ndarray) -> bytes:
    """Corners of tiles, int (n, 2), as int32: n steps in x, then n steps in y, each from the tile before (the first
    from 0). Tiles of a grid differ by the same steps over and over."""
    at = np.asarray(coords_l0, dtype=np.int64).reshape(-1, 2)
    steps = np.diff(at, axis=0, prepend=np.zeros((1, 2), np.int64))
    return np.ascontiguousarray(steps.T).astype("<i4").tobytes()


def values(scores: np.ndarray) -> bytes:
    """Scores (n,) as float32 whose bytes are sorted by place: n lowest bytes, and so on to n highest, because exponents
    are alike and the last digits are not."""
    v = np.asarray(scores, dtype="<f4")
    return np.ascontiguousarray(v.view(np.uint8).reshape(-1, 4).T).tobytes()
