"""The palettes as the page has them. In: a palette's name. Out: colours for CSS."""

from __future__ import annotations

from typing import cast, get_args

from mhim.mil import heatmap


def palette_of(name: str) -> heatmap.Palette:
    """The palette of that name, the even one where there is none."""
    return cast(heatmap.Palette, name) if name in get_args(heatmap.Palette) else heatmap.EVEN[0]


def stops(name: heatmap.Palette) -> list[str]:
    """17 colours `#rrggbb` at equal distances, from low to high."""
    table = heatmap.palette(name)
    return ["#" + bytes(table[min(255, 16 * k)].tolist()).hex() for k in range(17)]
