"""Pictures as the bytes of image files: the one encoder.

In: RGB or RGBA arrays. Out: JPEG or PNG. The same array gives the same bytes with one version of the libraries.
"""

from __future__ import annotations

import cv2
import numpy as np

from mhim.extract import SlideError

_FLAGS = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".png": cv2.IMWRITE_PNG_COMPRESSION}
_VIEWED_QUALITY = 82


def encoded(rgb: np.ndarray, suffix: str, level: int | None = None) -> bytes:
    """uint8 (h, w, 3) RGB, for `.png` also (h, w, 4) RGBA. level: quality of `.jpg` (0 to 100), effort of `.png` (0 to
    9); None is the library's own. Raises SlideError."""
    order = [2, 1, 0] if rgb.shape[2] == 3 else [2, 1, 0, 3]
    options = [] if level is None else [_FLAGS[suffix], level]
    ok, data = cv2.imencode(suffix, np.ascontiguousarray(rgb[..., order]), options)
    if not ok:
        raise SlideError(f"a picture of {rgb.shape[1]} x {rgb.shape[0]} px cannot be encoded as {suffix}")
    return bytes(data)


def viewed_jpeg(rgb: np.ndarray) -> bytes:
    """uint8 (h, w, 3) as JPEG for the viewer's tiles: a third of the time of `encoded`, its colours at half the
    resolution."""
    import simplejpeg

    made: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), _VIEWED_QUALITY, "RGB", "420", fastdct=True)
    return made
