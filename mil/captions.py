"""Text on pictures: names of slides and classes may hold anything that people write.

In: a picture, a text, where and how large. Out: the picture, written on. The font is DejaVu Sans as matplotlib brings
it, so that a picture has the same bytes on every machine; what it has no sign for (Chinese, say) is written as its
number, `[U+4E2D]`, and never as a box or question mark. Knows nothing of heatmaps.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

INK = (40, 40, 40)


def write(picture: np.ndarray, text: str, x: int, y: int, size_px: int) -> None:
    """Write on `picture`, uint8 (h, w, 3), in place: the line stands on y and begins at x; what reaches beyond the
    picture is cut off. size_px: height of the font; capitals have 73 % of it."""
    from PIL import Image, ImageDraw

    top, bottom = max(0, y - 2 * size_px), min(len(picture), y + size_px)
    if top >= bottom:
        return
    band = Image.fromarray(picture[top:bottom])
    ImageDraw.Draw(band).text((x, y - top), shown(text, size_px), fill=INK, font=_font(size_px), anchor="ls")
    picture[top:bottom] = np.asarray(band)


def shown(text: str, size_px: int = 12) -> str:
    """The text as it is written: without what ends a line, and with the numbers of signs that the font lacks."""
    return "".join(c if c.isascii() and c.isprintable() else _sign(c, size_px) for c in text)


@lru_cache(maxsize=1024)
def _sign(c: str, size_px: int) -> str:
    font = _font(size_px)
    lacking = not c.isprintable() or bytes(font.getmask(c)) == bytes(font.getmask("\U0010ffff"))
    return f"[U+{ord(c):04X}]" if lacking else c


@lru_cache(maxsize=8)
def _font(size_px: int) -> FreeTypeFont:
    from PIL import ImageFont

    found = find_spec("matplotlib")  # its folder alone: importing it takes longer than the picture
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, size_px, layout_engine=ImageFont.Layout.BASIC)  # the same with and without Raqm
