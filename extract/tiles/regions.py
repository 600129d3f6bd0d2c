"""Drawn regions applied to the tissue: what each class means, and from which corner a file counts.

In: a file of regions (`region_files.py`), a mask. Out: the edited mask, and what there is to say. Knows nothing of how
tissue is found.

The base of an annotation's class decides: `Tissue` replaces the found tissue; `Exclude`, `Ignore*` and `Ignore` are cut
out; every other annotation, classified or not, is a region of interest to which the tissue is confined. Names count as
a whole, in capitals or not: "Tissue fold", "Penile SCC", "Ignored nuclei" and QuPath's `Region*` are other classes. The
base of "Exclude: Fold" is Exclude. A negative region of ImageScope (`NegativeROA`) is cut out, from a layer that is
itself cut out it is spared.

QuPath counts px of level 0 from the corner of the scanned bounds, ASAP, ImageScope and HALO from the corner of level 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from mhim.extract.tiles.region_files import BadRegions, Counted, Rings, Shape, read_shapes

__all__ = ["BadRegions", "Drawn", "Region", "apply", "read"]

TISSUE, EXCLUDE, INCLUDE, SPARE = "tissue", "exclude", "include", "spare"
_ROLES = {"tissue": TISSUE, "exclude": EXCLUDE, "ignore*": EXCLUDE, "ignore": EXCLUDE}
# Classes that people mean to cut out. They confine, as every other does, and that is told.
_MEANT_TO_CUT = frozenset({"artifact", "artefact", "artifacts", "artefacts", "background", "blur", "fold", "pen"})
_SHIFT = 4  # OpenCV's fixed-point polygon corners: 1/16 px
_PER_TILE = 16  # px along the edge of a tile, on which its share is counted
_FAR_PX = 1 << 26  # corners farther out are drawn here: they must fit OpenCV's 32-bit numbers

Frame = Literal["auto", "bounds", "full"]


@dataclass(frozen=True)
class Region:
    """role: tissue, exclude, include or spare. polygons: rings each, the outer first, float (K, 2), level-0 px, x then
    y."""

    role: str
    polygons: tuple[Rings, ...]


@dataclass(frozen=True)
class Drawn:
    """The regions of one slide. frame: "bounds" or "full". origin_l0: where it counts from. notes: to be told."""

    regions: tuple[Region, ...]
    frame: str
    origin_l0: tuple[int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What they do and from where they count, for messages."""
        counts = {role: sum(r.role == role for r in self.regions) for role in (TISSUE, INCLUDE, EXCLUDE)}
        words = {TISSUE: "replace the tissue", INCLUDE: "confine it", EXCLUDE: "cut out"}
        roles = ", ".join(f"{n} {words[role]}" for role, n in counts.items() if n)
        x, y = self.origin_l0
        where = {"bounds": f"the corner of the scanned bounds, here ({x}, {y}) of level 0", "full": "level 0's corner"}
        return f"{roles}; they count from {where[self.frame]} (tile.regions_frame)"


def read(
    path: Path, bounds_origin_l0: tuple[int, int] = (0, 0), frame: Frame = "auto", may_be_empty: bool = False
) -> Drawn:
    """The regions of a file in px of level 0.

    frame: where the file counts from, "bounds" (whose corner is `bounds_origin_l0`) or "full"; "auto" is as the program
    that writes such files does. A file that says where it counts from, as those that `pipeline view` saves, is read so
    whatever `frame` is. Points and lines are no areas and are passed over. may_be_empty: as of `read_shapes`. Raises
    BadRegions."""
    shapes, own = read_shapes(path, may_be_empty)
    counted, origin = counted_from(own, frame, bounds_origin_l0)
    shift = np.asarray(origin, float)
    regions = tuple(
        Region(_role(s), tuple(tuple(ring + shift for ring in polygon) for polygon in s.polygons)) for s in shapes
    )
    odd = sorted({n for s in shapes for n in s.names[:1] if n.lower() in _MEANT_TO_CUT})
    notes = [f"regions of class {n} confine the tissue; to cut them out call them Exclude or Ignore*" for n in odd]
    if counted == "bounds" and origin != (0, 0) and frame == "auto" and not own.said:
        x, y = origin
        notes.append(
            f"regions are read as QuPath counts, from the corner of the scanned bounds ({x}, {y}); of a program that "
            "counts from the corner of level 0 (HALO, ASAP) set tile.regions_frame=full"
        )
    return Drawn(regions, counted, origin, tuple(notes))


def counted_from(own: Counted, frame: str, bounds_origin_l0: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The frame of a file, and where that is in px of level 0. own: of the file; frame: what was set, for files
    that do not say it themselves."""
    counted = own.frame if own.said or frame == "auto" else frame
    return counted, bounds_origin_l0 if counted == "bounds" else (0, 0)


def _role(shape: Shape) -> str:
    role = next((_ROLES[n.lower()] for n in shape.names if n.lower() in _ROLES), INCLUDE)
    if shape.negative:
        return SPARE if role == EXCLUDE else EXCLUDE
    return role


def apply(
    mask: np.ndarray, drawn: Drawn, bounds_l0: tuple[int, int, int, int], per_px: tuple[float, float]
) -> np.ndarray:
    """Edit `mask`, bool (H, W), whose px (0, 0) lies at the bounds' corner and has `per_px` (x, y) level-0 px."""
    painted = {role: np.zeros(mask.shape, np.uint8) for role in {r.role for r in drawn.regions}}
    for region in drawn.regions:
        for polygon in region.polygons:
            corners = [(ring - np.array(bounds_l0[:2])) / np.array(per_px) - 0.5 for ring in polygon]
            _paint(painted[region.role], [np.clip(c, -_FAR_PX, _FAR_PX) for c in corners])
    out = painted[TISSUE] > 0 if TISSUE in painted else mask.copy()
    if INCLUDE in painted:
        out &= painted[INCLUDE] > 0
    if EXCLUDE in painted:
        cut = painted[EXCLUDE] > 0
        if SPARE in painted:
            cut &= painted[SPARE] == 0
        out &= ~cut
    return out


def covered(drawn: Drawn, coords_l0: np.ndarray, tile_l0: tuple[float, float]) -> np.ndarray:
    """Share of each tile, float64 (N,), that lies in what is drawn: in any region but those of tissue, and in none that
    is cut out. coords_l0: (N, 2), corners of the tiles; tile_l0: their (w, h). To a sixteenth of a tile's edge."""
    confine = tuple(r for r in drawn.regions if r.role != TISSUE)
    if not len(coords_l0) or not any(r.role == INCLUDE for r in confine):
        return np.zeros(len(coords_l0))
    per_px = np.asarray(tile_l0, np.float64) / _PER_TILE
    x, y = (int(v) for v in coords_l0.min(axis=0))
    at = np.rint((coords_l0 - (x, y)) / per_px).astype(np.int64)
    w, h = (int(v) + _PER_TILE for v in at.max(axis=0))
    inside, cut, spared = (np.zeros((h, w), bool) for _ in range(3))
    for region in confine:
        for polygon in region.polygons:
            rings = [np.clip((ring - (x, y)) / per_px, -_FAR_PX, _FAR_PX) for ring in polygon]
            _sample({INCLUDE: inside, EXCLUDE: cut, SPARE: spared}[region.role], rings)
    inside &= ~cut | spared
    step = np.arange(_PER_TILE)
    shares = np.empty(len(at))
    for first in range(0, len(at), 4096):  # of 275,000 tiles not all at once
        some = at[first : first + 4096]
        rows, columns = some[:, 1, None, None] + step[:, None], some[:, 0, None, None] + step
        shares[first : first + 4096] = inside[rows, columns].mean(axis=(1, 2))
    return shares


def _sample(on: np.ndarray, rings_px: list[np.ndarray]) -> None:
    """Set the px of `on`, bool (H, W), whose centres lie in the polygon: what is counted must not grow with its edges,
    as what is painted does. Only the box around it is touched."""
    h, w = on.shape
    x0, y0 = np.floor(rings_px[0].min(axis=0)).astype(int)
    x1, y1 = np.ceil(rings_px[0].max(axis=0)).astype(int)
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(w, x1), min(h, y1)
    if x0 >= x1 or y0 >= y1:
        return
    outer, *holes = (_odd(ring - (x0, y0), (y1 - y0, x1 - x0)) for ring in rings_px)
    for hole in holes:
        outer &= ~hole
    on[y0:y1, x0:x1] |= outer


def _odd(ring: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Whether the centre of each px of a picture (h, w) lies in the ring (K, 2), by the even-odd rule: bool (h, w)."""
    h, w = shape
    (ax, ay), (bx, by) = ring.T, np.roll(ring, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(ay, by) - 0.5), 0, h).astype(int)
    count = np.clip(np.ceil(np.maximum(ay, by) - 0.5), 0, h).astype(int) - first
    edge = np.repeat(np.arange(len(ring)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    x = ax[edge] + (row + 0.5 - ay[edge]) * (bx - ax)[edge] / (by - ay)[edge]
    crossed = np.zeros((h, w + 1), np.uint8)
    np.bitwise_xor.at(crossed, (row, np.clip(np.ceil(x - 0.5), 0, w).astype(int)), 1)
    inside: np.ndarray = np.bitwise_xor.accumulate(crossed, axis=1)[:, :w] > 0
    return inside


def _paint(on: np.ndarray, rings_px: list[np.ndarray]) -> None:
    """Set the polygon in `on`, uint8 (H, W). Filled even-odd, also where a ring crosses itself; nothing is set outside
    the outer ring, though a hole may reach out of it. Only the box around it is touched: there may be 100,000."""
    h, w = on.shape
    x0, y0 = np.floor(rings_px[0].min(axis=0)).astype(int) - 1
    x1, y1 = np.ceil(rings_px[0].max(axis=0)).astype(int) + 2
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(w, x1), min(h, y1)
    if x0 >= x1 or y0 >= y1:
        return
    fixed = [np.rint((ring - (x0, y0)) * (1 << _SHIFT)).astype(np.int32) for ring in rings_px]
    one = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillPoly(one, fixed, 1, shift=_SHIFT)
    if len(fixed) > 1:
        outer = np.zeros_like(one)
        cv2.fillPoly(outer, fixed[:1], 1, shift=_SHIFT)
        one &= outer
    on[y0:y1, x0:x1] |= one
