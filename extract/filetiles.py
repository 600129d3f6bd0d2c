"""A slide's pixels from the file's own tiles: as OpenSlide's, in a fifth of its time, for reading a few regions.

In: a source that OpenSlide opened, and its path. Out: the same source, whose `read` decodes the file's tiles itself
where it may: a format of `direct.VENDORS`, a region that starts on a whole pixel of its level, and a level of which one
tile was first compared with OpenSlide's pixels. Everything else OpenSlide reads. Knows nothing of mpp and tissue.

`direct.DirectReader` reads the many tiles of one job and keeps those it needs again; this one keeps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from extract import UnreadableSlide
from extract.direct import VENDORS, NotDirect, Plane, plane_of
from extract.slide import Source
from extract.tiffpages import Page, read_pages


class FileTiles:
    """A `Source` in front of another; closes it. Safe to read from several threads."""

    def __init__(self, source: Source, path: Path) -> None:
        self._source = source
        self._path = path
        self._planes: dict[int, Plane | None] = {}
        self._pages: list[Page] | None = None
        self._fd: int | None = None
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
        if (round(x * scale), round(y * scale)) == (x_l0, y_l0) and (plane := self._plane(level)) is not None:
            try:
                return self._cut(plane, x, y, w, h)
            except _Undecodable:
                pass  # OpenSlide has the last word, and names what is damaged
        return self._source.read(x_l0, y_l0, level, w, h)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._source.close()

    def _plane(self, level: int) -> Plane | None:
        """How the level is decoded, or None if OpenSlide must; settled when it is first read."""
        if level not in self._planes:
            try:
                self._planes[level] = self._compared(level)
            except (NotDirect, UnreadableSlide, _Undecodable, ImportError, OSError, ValueError, AttributeError):
                self._planes[level] = None
        return self._planes[level]

    def _compared(self, level: int) -> Plane:
        """The plane, if one of its tiles has OpenSlide's very pixels: that of most bytes, which shows most, among those
        whose corner is a whole pixel of level 0 too (a level may be 4.0005 times smaller: then only the first)."""
        if self.vendor not in VENDORS or not hasattr(os, "pread"):
            raise NotDirect(f"format {self.vendor}")
        if self._pages is None:
            self._pages = read_pages(self._path)
        plane = plane_of(self._pages, self.level_dimensions[level], level)
        scale = self.level_downsamples[level]
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        left, top = (np.arange(-(-size // t)) * t for size, t in zip(plane.size, plane.tile, strict=True))
        exact = np.logical_and.outer(top * scale % 1 == 0, left * scale % 1 == 0)  # (rows, columns) of tiles
        counts = plane.counts.reshape(-1, plane.columns)[: len(top), : len(left)]
        row, column = np.unravel_index(int(np.where(exact, counts, -1).argmax()), exact.shape)
        x, y = int(left[column]), int(top[row])
        ours = self._decode(plane, int(column), int(row))[: plane.size[1] - y, : plane.size[0] - x]
        theirs = self._source.read(round(x * scale), round(y * scale), level, ours.shape[1], ours.shape[0])
        if not np.array_equal(ours, theirs):
            raise NotDirect("directly decoded pixels differ from OpenSlide's")
        return plane

    def _cut(self, plane: Plane, x: int, y: int, w: int, h: int) -> np.ndarray:
        (level_w, level_h), (tw, th) = plane.size, plane.tile
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
        whole = (x0, y0, x1, y1) == (x, y, x + w, y + h)
        out = np.empty((h, w, 3), np.uint8) if whole else np.full((h, w, 3), 255, np.uint8)
        if x1 <= x0 or y1 <= y0:
            return out
        for row in range(y0 // th, -(-y1 // th)):
            for column in range(x0 // tw, -(-x1 // tw)):
                left, top = column * tw, row * th
                a, b, c, d = max(x0, left), min(x1, left + tw), max(y0, top), min(y1, top + th)
                pixels = self._decode(plane, column, row)
                out[c - y : d - y, a - x : b - x] = pixels[c - top : d - top, a - left : b - left]
        return out

    def _decode(self, plane: Plane, column: int, row: int) -> np.ndarray:
        index = row * plane.columns + column
        offset, count = int(plane.offsets[index]), int(plane.counts[index])
        assert self._fd is not None
        data = os.pread(self._fd, count, offset) if count else b""
        if not count or len(data) < count:
            raise _Undecodable
        try:
            return plane.decode(data, 0, None)
        except Exception as error:  # each decoder has its own exceptions
            raise _Undecodable from error


class _Undecodable(Exception):
    """A file tile that OpenSlide must read."""
