"""Tile scores as pictures: scores and places of tiles in, a colour layer registered to a low-resolution image out.

In: one number per tile, the tiles' corners in level-0 px, and the `Frame` of the image to draw on. Out: arrays. It
reads no file and knows neither slide nor model; whoever calls it says where the image lies on level 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mhim.mil import captions

STRIP_PX = 56  # height of the strip that `legend` puts below a picture
BAND_ROWS = 256  # a heatmap of 25 Mpx is summed up in bands that fit the cache: 3 times faster, a tenth of the memory
# position, red, green, blue: dark blue, teal, yellow-green, orange, dark red
_STOPS = np.array(
    [[0.0, 38, 40, 120], [0.25, 34, 130, 170], [0.5, 120, 200, 120], [0.75, 245, 170, 50], [1.0, 180, 20, 30]]
)


@dataclass(frozen=True)
class Frame:
    """Where an image lies. origin_l0: level-0 px (x, y) of its corner. px_l0: level-0 px per image px (x, y).
    size_px: (w, h) of the image. mpp: µm per image px."""

    origin_l0: tuple[float, float]
    px_l0: tuple[float, float]
    size_px: tuple[int, int]
    mpp: float


@dataclass(frozen=True)
class Scaled:
    """values: float32 (N,) in 0..1 for the colours. low, high: what 0 and 1 stand for, as text for the colour bar."""

    values: np.ndarray
    low: str
    high: str


How = Literal["percentile", "raw", "share"]
# Colour tables. Of the even ones the lightness (CIELAB L*) rises in equal steps, or falls and rises in equal steps from
# the middle, so that equal differences of score look equal, also to people with one of the colour-blindnesses and in
# print without colour. "classic" is what pictures had from the start: its lightness goes up and down.
Palette = Literal["classic", "viridis", "cividis", "inferno", "coolwarm"]
EVEN: tuple[Palette, ...] = ("viridis", "cividis", "inferno")
DIVERGING: Palette = "coolwarm"  # pale in the middle, where a signed layer's zero lies
Choice = Literal["auto", "even", "classic", "viridis", "cividis", "inferno", "coolwarm"]


def chosen(choice: Choice, signed: bool) -> Palette:
    """The palette of a layer: "even" is the first of the even ones, of a signed layer the one with a pale middle; so is
    "auto", where there are no older pictures to go by."""
    if choice == "auto" or choice == "even":
        return DIVERGING if signed else EVEN[0]
    return choice


def scaled(scores: np.ndarray, how: How, signed: bool = False) -> Scaled:
    """Scores (N,) as positions on the colour scale.

    percentile: rank of the tile in its slide, ties share their mean rank, so a slide's picture uses all colours and
    says nothing of other slides. raw: linear from the smallest to the largest. share: as they are, from 0 to 1.
    signed: 0 is the middle of the scale; raw is symmetric about it, and percentile ranks what lies above among itself,
    and so what lies below, so that no tile changes sides. Scores that are not numbers are refused with ValueError.
    """
    s = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(s).all():
        raise ValueError(f"{int((~np.isfinite(s)).sum())} of {s.size} tile scores are not numbers")
    if s.size == 0:
        return Scaled(np.zeros(0, np.float32), "", "")
    if how == "share":
        return Scaled(np.clip(s, 0, 1).astype(np.float32), "0 %", "100 %")
    if how == "percentile" and signed:
        values = np.full(s.size, 0.5)
        for side, sign in ((s > 0, 0.5), (s < 0, -0.5)):
            ordered = np.sort(np.abs(s[side]))
            values[side] += sign * _mean_rank(ordered, np.abs(s[side])) / max(len(ordered), 1)
        return Scaled(values.astype(np.float32), "100 % against", "100 % for")
    if how == "percentile":
        values = (_mean_rank(np.sort(s), s) - 1) / (s.size - 1) if s.size > 1 else np.full(1, 0.5)
        return Scaled(values.astype(np.float32), "0 %", "100 %")
    low, high = float(s.min()), float(s.max())
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    values = (s - low) / (high - low) if high > low else np.full(s.size, 0.5)
    return Scaled(values.astype(np.float32), f"{low:.3g}", f"{high:.3g}")


def at_positions(scores: np.ndarray, how: How, signed: bool, at: Sequence[float]) -> list[float | None]:
    """The score that stands at each position (0 to 1) of the colour scale of `scaled`: what a colour bar tells.

    None where no tile lies on that side of a signed scale, or where there is no tile at all."""
    s = np.asarray(scores, dtype=np.float64)
    places = np.asarray(at, dtype=np.float64)
    if s.size == 0:
        return [None] * len(places)
    if how == "share":
        return [float(t) for t in places]
    if how == "percentile" and signed:
        told: list[float | None] = []
        for t in places.tolist():
            side = s[s > 0] if t > 0.5 else -s[s < 0]
            sign = 1.0 if t > 0.5 else -1.0
            share = abs(2 * t - 1)
            told.append(0.0 if t == 0.5 else float(sign * np.quantile(side, share)) if side.size else None)
        return told
    if how == "percentile":
        return [float(v) for v in np.quantile(s, places)]
    low, high = float(s.min()), float(s.max())
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    return [float(low + t * (high - low)) for t in places]


def _mean_rank(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Rank of each value among the ordered ones, from 1; ties share the mean of theirs."""
    return np.asarray((np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1) / 2)


def raster(values: np.ndarray, coords_l0: np.ndarray, tile_l0: float | Sequence[float], frame: Frame) -> np.ndarray:
    """Mean of the tiles over each image pixel: float32 (h, w), NaN where no tile lies.

    values: (N,). coords_l0: (N, 2) corners in level-0 px, x then y. tile_l0: tile edge in level-0 px, one or (x, y).
    Pixels belong to the tile that covers their centre; a tile smaller than a pixel still colours one. Tiles of a grid
    without overlap are looked up by row and column. Otherwise each tile adds its value at its four corners of a table
    that is then summed up in both directions. Either way the cost is that of the image, whatever the number of tiles.
    """
    w, h = frame.size_px
    edge = np.broadcast_to(np.asarray(tile_l0, dtype=np.float64), (2,))
    low = (np.asarray(coords_l0, dtype=np.float64).reshape(-1, 2) - frame.origin_l0) / frame.px_l0
    high = low + edge / frame.px_l0
    first = np.ceil(low - 0.5).astype(np.int64)
    last = np.maximum(np.ceil(high - 0.5).astype(np.int64), first + 1)
    looked_up = _grid(np.asarray(values, np.float32), first, last, (h, w))
    if looked_up is not None:
        return looked_up
    x0, x1 = np.clip(first[:, 0], 0, w), np.clip(last[:, 0], 0, w)
    y0, y1 = np.clip(first[:, 1], 0, h), np.clip(last[:, 1], 0, h)
    v = np.asarray(values, dtype=np.float64)
    out = np.full((h, w), np.nan, np.float32)
    for top in range(0, h, BAND_ROWS):
        rows = min(BAND_ROWS, h - top)
        here = (y0 < top + rows) & (y1 > top)
        if not here.any():
            continue
        ys, ye = np.clip(y0[here] - top, 0, rows), np.clip(y1[here] - top, 0, rows)
        total = _summed(ys, ye, x0[here], x1[here], v[here], (rows, w))
        count = np.rint(_summed(ys, ye, x0[here], x1[here], np.ones(len(ys)), (rows, w)))
        np.divide(total, count, out=out[top : top + rows], where=count > 0, casting="same_kind")
    return out


def _grid(values: np.ndarray, first: np.ndarray, last: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """The raster of tiles [first, last), int64 (n, 2) px, that stand in rows and columns apart from each other: their
    values in a table of rows and columns, which every pixel looks up. None if they do not stand so."""
    if not len(values):
        return np.full(shape, np.nan, np.float32)
    cells, places = [], []
    for axis, length in ((0, shape[1]), (1, shape[0])):
        starts, at, cell = np.unique(first[:, axis], return_index=True, return_inverse=True)
        ends = last[at, axis]
        if (ends[cell] != last[:, axis]).any() or (ends[:-1] > starts[1:]).any():
            return None
        place = np.full(length, len(starts))  # px -> row or column of the table; the last one is empty
        for k, (a, b) in enumerate(zip(starts.clip(0, length).tolist(), ends.clip(0, length).tolist(), strict=True)):
            place[a:b] = k
        cells.append(cell)
        places.append(place)
    (column, row), (x, y) = cells, places
    table = np.full((int(row.max()) + 2, int(column.max()) + 2), np.nan, np.float32)
    if len(np.unique(row * table.shape[1] + column)) < len(values):
        return None  # the same place twice: to be averaged
    table[row, column] = values
    laid_out: np.ndarray = table[:, x][y]
    return laid_out


def _summed(
    y0: np.ndarray, y1: np.ndarray, x0: np.ndarray, x1: np.ndarray, weight: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """float64 (h, w): sum of the weights of the rectangles [y0, y1) x [x0, x1) over each cell."""
    h, w = shape
    corners = np.concatenate([y * (w + 1) + x for y, x in ((y0, x0), (y0, x1), (y1, x0), (y1, x1))])
    signed = np.concatenate([weight, -weight, -weight, weight])
    grid = np.bincount(corners, signed, minlength=(h + 1) * (w + 1)).reshape(h + 1, w + 1)
    np.cumsum(grid, axis=0, out=grid)
    np.cumsum(grid, axis=1, out=grid)
    return grid[:h, :w]


def palette(name: Palette = "classic") -> np.ndarray:
    """uint8 (256, 3): the colours from low to high. The even ones are matplotlib's own tables (CC0)."""
    if name != "classic":
        from matplotlib import colormaps

        return np.asarray(colormaps[name](np.arange(256), bytes=True)[:, :3], np.uint8)
    at = np.linspace(0, 1, 256)
    channels = np.stack([np.interp(at, _STOPS[:, 0], _STOPS[:, c]) for c in (1, 2, 3)], axis=1)
    colours: np.ndarray = np.rint(channels).astype(np.uint8)
    return colours


def colour(values: np.ndarray, opacity: float = 1.0, name: Palette = "classic") -> np.ndarray:
    """uint8 (h, w, 4) RGBA of values in 0..1 in the colours of a palette; transparent where they are NaN."""
    table = np.zeros((257, 4), np.uint8)  # row 256: no tile
    table[:256, :3] = palette(name)
    table[:256, 3] = round(255 * opacity)
    packed = table.view(np.uint32)[:, 0]
    rgba = np.empty((*values.shape, 4), np.uint8)
    for top in range(0, len(values), BAND_ROWS):
        band = np.clip(values[top : top + BAND_ROWS], 0, 1)
        np.multiply(band, 255, out=band)
        np.copyto(band, 256, where=np.isnan(band))
        np.take(packed, band.astype(np.intp), out=rgba[top : top + BAND_ROWS].view(np.uint32)[..., 0], mode="clip")
    return rgba


def draw(
    scores: np.ndarray,
    coords_l0: np.ndarray,
    tile_l0: float | Sequence[float],
    frame: Frame,
    how: How = "percentile",
    signed: bool = False,
    opacity: float = 1.0,
) -> np.ndarray:
    """Tile scores as an RGBA layer, uint8 (h, w, 4), for the image of `frame`. See `scaled` and `raster`."""
    return colour(raster(scaled(scores, how, signed).values, coords_l0, tile_l0, frame), opacity)


def laid_over(rgb: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """An RGBA layer on an image of the same size: uint8 (h, w, 3)."""
    a = layer[..., 3:].astype(np.uint16)
    return ((rgb * (255 - a) + layer[..., :3] * a + 127) // 255).astype(np.uint8)


def legend(rgb: np.ndarray, mpp: float, title: str, low: str, high: str, name: Palette = "classic") -> np.ndarray:
    """The image with a strip below it: title, bar of the palette's colours with its two ends, a scale bar in µm."""
    h, w = rgb.shape[:2]
    width, strip = max(w, 480), STRIP_PX
    out = np.full((h + strip, width, 3), 255, np.uint8)
    out[:h, :w] = rgb

    captions.write(out, title, 10, h + 20, 13)
    bar = np.repeat(palette(name)[None, ::2], 12, axis=0)  # 128 px wide
    left = 18 + 7 * len(low)
    out[h + 30 : h + 42, left : left + 128] = bar
    captions.write(out, low, 10, h + 41, 12)
    captions.write(out, high, left + 136, h + 41, 12)
    um = nice_length_um(w * mpp)
    long_px = max(1, round(um / mpp))
    x0 = width - long_px - 14
    out[h + 36 : h + 40, x0 : x0 + long_px] = 20
    captions.write(out, f"{um:g} µm" if um < 1000 else f"{um / 1000:g} mm", x0, h + 28, 12)
    return out


def nice_length_um(width_um: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50 ... µm that is at most a quarter of `width_um`."""
    most = max(width_um / 4, 1e-9)
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(k * power for k in (1, 2, 5) if k * power <= most * (1 + 1e-9)))
