"""A slide's pixels from the file's own tiles: as OpenSlide's, in a fifth of its time.

In: a path, and the source that OpenSlide opened. Out: decoded file tiles, and regions put together from them (`paste`).
Everything that reads file tiles does it here: extraction (`direct.DirectReader`, which shares decoded tiles among the
tiles of a job), tiling, saved tiles and pictures (`FileTiles`), the viewer. So they show the same pixels.

A level is used only after `_prove` found OpenSlide's very pixels at several places of that level, chosen among the file
tiles that will be read, those of most bytes: they show most. Knows nothing of mpp and tissue.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mhim.configs.errors import UserError
from mhim.extract.slide.planes import NotDirect, Plane, level_pages, plane_of
from mhim.extract.slide.source import Source
from mhim.extract.slide.tiffpages import Page

_PLACES = 4  # compared with OpenSlide per level: 1 % of the time that reading 2,000 tiles takes ...
_PLACES_PX = 3 << 18  # ... but at most so many px of file tiles, and two places at least
_PLACE_PX = 128
_SAME = 1 / 512  # px: nearer to a whole pixel than that cairo does not interpolate
_INTERPOLATED = 2  # grey levels by which cairo's 7-bit weights and rounding may miss exact interpolation (1 was seen)


class Undecodable(UserError):
    """One file tile that OpenSlide must read."""


class FileLevels:
    """The file's own tiles, level by level; safe to use from several threads. source: OpenSlide's, the judge."""

    def __init__(self, path: Path, source: Source) -> None:
        self._path = path
        self._source = source
        self._pages: list[Page] | None = None
        self._files: dict[Path, int] = {}  # descriptors: one, but for DICOM
        self._lock = threading.Lock()  # of the former, and of reading on systems without pread
        self._settled: dict[int, Plane | NotDirect] = {}
        self.compared: dict[int, np.ndarray] = {}  # the file tiles last compared, for who will want them again

    def plane(self, level: int, wanted: np.ndarray | None = None) -> Plane:
        """The level's plane, once compared with OpenSlide's pixels; settled when it is first asked for.

        wanted: int (n,), ascending, the file tiles that will be read (None: any). Raises NotDirect, UnreadableSlide."""
        if level not in self._settled:
            try:
                plane = self.unproven(level)
                self._prove(plane, level, np.arange(len(plane.counts)) if wanted is None else wanted)
                if wanted is None:
                    self.compared = {}
                self._settled[level] = plane
            except NotDirect as reason:
                self._settled[level] = reason
            except ImportError as error:
                self._settled[level] = NotDirect(str(error))
        found = self._settled[level]
        if isinstance(found, NotDirect):
            raise found
        return found

    def unproven(self, level: int) -> Plane:
        """The level's plane as the file describes it: for arithmetic only. Raises NotDirect."""
        source = self._source
        if self._pages is None:
            self._pages = level_pages(self._path, source.vendor, source.level_dimensions)
        return plane_of(self._pages, level, source.level_dimensions[level], source.vendor)

    def tile(self, plane: Plane, index: int, halvings: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 (tile_h >> halvings, tile_w >> halvings, 3), in `out` where the decoder can. Raises Undecodable."""
        data = self.data(plane, index)
        try:
            return plane.decode(data, halvings, out)
        except Exception as error:  # each decoder has its own exceptions: OpenSlide decides whether the tile is lost
            raise Undecodable(f"{type(error).__name__}: {error}") from error

    def data(self, plane: Plane, index: int) -> bytes:
        """The bytes of a file tile. Raises Undecodable."""
        offset, count = int(plane.offsets[index]), int(plane.counts[index])
        if count == 0:
            raise Undecodable("the file leaves out tiles")
        path = plane.path or self._path
        fd = self._files.get(path)
        if fd is None:
            with self._lock:
                fd = self._files.get(path)
                if fd is None:
                    fd = self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if hasattr(os, "pread"):
            data = os.pread(fd, count, offset)
        else:
            with self._lock:
                os.lseek(fd, offset, os.SEEK_SET)
                data = os.read(fd, count)
        if len(data) < count:
            raise Undecodable("the file ends before its tiles do")
        return data

    def close(self) -> None:
        files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _prove(self, plane: Plane, level: int, wanted: np.ndarray) -> None:
        """Raise NotDirect unless file tiles of the level, spread over `wanted`, have OpenSlide's very pixels."""
        scale = self._source.level_downsamples[level]
        there = wanted[plane.counts[wanted] > 0]
        count = max(2, min(_PLACES, _PLACES_PX // (plane.tile[0] * plane.tile[1])))
        parts = [part for part in np.array_split(there, count) if len(part)]
        places = [int(part[plane.counts[part].argmax()]) for part in parts]
        if scale != round(scale) and plane.counts[0] and places:
            places.append(0)  # the one place that is exact on any level
        reasons: list[str] = []
        self.compared = {}
        for index in places:
            row, column = divmod(index, plane.columns)
            x, w = _window(column * plane.tile[0], plane.tile[0], plane.size[0], scale)
            y, h = _window(row * plane.tile[1], plane.tile[1], plane.size[1], scale)
            if w <= 0 or h <= 0:
                continue  # padding only
            try:
                tile = self.compared[index] = self.tile(plane, index)
            except Undecodable as error:  # maybe damaged: OpenSlide would tell when it is asked for it
                reasons.append(str(error))
                continue
            x_l0, y_l0 = round(x * scale), round(y * scale)
            theirs = self._source.read(x_l0, y_l0, level, w, h)
            at = x - column * plane.tile[0], y - row * plane.tile[1]
            far = _distance(tile, theirs, at, (x_l0 / scale - x, y_l0 / scale - y))
            if far:
                raise NotDirect(f"directly decoded pixels of level {level} differ from OpenSlide's (by up to {far})")
        if reasons and len(reasons) == len(places):
            raise NotDirect(f"its tiles cannot be decoded directly ({reasons[0]})")


def _window(start: int, tile: int, size: int, scale: float) -> tuple[int, int]:
    """(start, length) of what is compared of a file tile along one axis, in px of the level: from where level 0 has a
    whole pixel, too, or nearly so; of such starts the most central one."""
    whole = min(tile, size - start)
    length = min(_PLACE_PX, whole)
    starts = np.arange(start, start + max(whole - length, 0) + 1)
    off = np.abs(np.rint(starts * scale) / scale - starts)
    return int(starts[(off + 1e-9 * np.abs(starts - starts.mean())).argmin()]), length


def _distance(tile: np.ndarray, theirs: np.ndarray, at: tuple[int, int], shift: tuple[float, float]) -> int:
    """Grey levels between OpenSlide's pixels `theirs` (h, w, 3) and the tile's from `at` (x, y) on; 0: the same.

    Where level 0 has no whole pixel at that place, OpenSlide interpolates between two of the level, `shift` px away:
    then the same is what lies as near to that interpolation as its rounding allows (the outermost px are left out)."""
    (x, y), (h, w) = at, theirs.shape[:2]
    cut, inner = tile[y : y + h, x : x + w], theirs
    if np.array_equal(cut, theirs):
        return 0
    ours = cut.astype(np.float32)
    for axis, s in ((1, shift[0]), (0, shift[1])):
        if abs(s) > _SAME and ours.shape[axis] > 2:
            mid, after, before = (np.take(ours, np.arange(1 + d, ours.shape[axis] - 1 + d), axis) for d in (0, 1, -1))
            ours = mid * (1 - abs(s)) + (after if s > 0 else before) * abs(s)
            inner = np.take(inner, np.arange(1, inner.shape[axis] - 1), axis)
    if ours.shape != inner.shape:
        return 255
    far = float(np.abs(ours - inner).max())
    allowed = 0 if max(map(abs, shift)) <= _SAME else _INTERPOLATED
    return 0 if far <= allowed else max(1, round(far))


def paste(plane: Plane, halvings: int, x: int, y: int, out: np.ndarray, tile: Callable[[int], np.ndarray]) -> None:
    """Put the level's pixels from (x, y) on into `out`, uint8 (h, w, 3); white outside the level.

    All in px of the level after `halvings`. tile: index -> the decoded file tile, halved as often."""
    (tw, th), (h, w) = (v >> halvings for v in plane.tile), out.shape[:2]
    level_w, level_h = (-(-v >> halvings) for v in plane.size)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
    if (x0, y0, x1, y1) != (x, y, x + w, y + h):
        out[...] = 255
        if x1 <= x0 or y1 <= y0:
            return
    for row in range(y0 // th, -(-y1 // th)):
        for column in range(x0 // tw, -(-x1 // tw)):
            left, top = column * tw, row * th
            pixels = tile(row * plane.columns + column)
            a, b, c, d = max(x0, left), min(x1, left + tw), max(y0, top), min(y1, top + th)
            out[c - y : d - y, a - x : b - x] = pixels[c - top : d - top, a - left : b - left]


class FileTiles:
    """A `Source` in front of OpenSlide's, which it closes: reads from the file's tiles where it may, keeps nothing."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self.levels = FileLevels(path, source)
        self.vendor = source.vendor
        self.properties: Mapping[str, str] = source.properties
        self.level_dimensions = source.level_dimensions
        self.level_downsamples = source.level_downsamples
        self.associated = source.associated

    def read(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3) of a level from level-0 (x_l0, y_l0); white outside. Raises UnreadableSlide."""
        scale = self.level_downsamples[level]
        x, y = round(x_l0 / scale), round(y_l0 / scale)
        # Between two pixels of a level OpenSlide interpolates: only what starts on one is the same here.
        if (round(x * scale), round(y * scale)) == (x_l0, y_l0):
            try:
                plane = self.levels.plane(level)
                out = np.empty((h, w, 3), np.uint8)
                paste(plane, 0, x, y, out, lambda index: self.levels.tile(plane, index))
                return out
            except (NotDirect, Undecodable):
                pass  # OpenSlide has the last word, and names what is damaged
        return self._source.read(x_l0, y_l0, level, w, h)

    def close(self) -> None:
        self.levels.close()
        self._source.close()
