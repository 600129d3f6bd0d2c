"""Tiles straight from the file: a tiled TIFF's own JPEG or JPEG 2000 tiles, each decoded once, any grid cut from them.

In: a `SlideJob` whose slide OpenSlide opens. Out: the same pixels as OpenSlide's, 4 to 9 times faster, since nothing
is composed or converted in between. Refuses (`NotDirect`, with the reason) what it does not surely understand, and what
it does understand it first compares with OpenSlide on a tile. Knows nothing of encoders.

At the level's own resolution pixels are bit-identical. Where tiles are coarser than the level, `area` equals
OpenSlide's pixels reduced by the same area average; `dct` lets the JPEG decoder halve (0.7 grey levels from that on
average, 34 at most on real tissue).
On levels other than 0 a tile starts at the nearest whole pixel of the level, where OpenSlide interpolates between two.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from extract import SlideJob
from extract.slide import ReadPlan, Slide

CACHE_BYTES = 128 << 20  # decoded file tiles kept until their last use; more than a row of the widest slides needs
VENDORS = frozenset({"aperio", "generic-tiff", "philips"})  # one plane per level, no overlaps, no gaps in between
_JPEG, _JPEG2000 = {7}, {33003, 33004, 33005, 34712}
_ADOBE_RGB = bytes.fromhex("ffee000e41646f626500640000000000")  # APP14 that says: three plain channels, no YCbCr


Decode = Callable[[bytes, int, np.ndarray | None], np.ndarray]


class NotDirect(Exception):
    """This slide cannot be read directly; the message says why. OpenSlide reads it instead."""


@dataclass(frozen=True)
class Plane:
    """One level of the file: (w, h) of the level, (w, h) of its tiles, where each tile's bytes lie, how to decode them.

    decode: (bytes, halvings, where to or None) -> uint8 (tile_h >> halvings, tile_w >> halvings, 3).
    can_halve: JPEG only.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    columns: int
    offsets: np.ndarray
    counts: np.ndarray
    decode: Decode
    can_halve: bool


class DirectReader:
    """Reads the tiles of one job; safe to use from several threads. Owns `slide`, which it closes."""

    kind = "direct"

    def __init__(self, job: SlideJob, slide: Slide, reduction: str = "area") -> None:
        if slide.vendor not in VENDORS:
            raise NotDirect(f"format {slide.vendor}")
        self.job = job
        self.slide = slide
        self.note = ""
        self.plan: ReadPlan = slide.plan_read(job.mpp, job.tile_px)
        planes = read_planes(job.path, slide.level_dimensions, {0, self.plan.level})
        self.plane = planes[self.plan.level]
        self._seek = threading.Lock()  # for systems without pread
        self._fd = os.open(job.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            self.halvings = self._halvings() if reduction == "dct" else 0
            self._compare(planes[0])
        except BaseException:
            os.close(self._fd)
            raise
        self._tiles = _Shared(self._decode, CACHE_BYTES)
        self._corners = self._to_level(job.coords_l0)
        self._tiles.expect(self._uses())

    def fill(self, coords_l0: np.ndarray, out: np.ndarray) -> None:
        """Tiles at int (n, 2) level-0 corners into uint8 (n, tile_px, tile_px, 3). Raises SlideError."""
        px = self.job.tile_px
        w, h = (v >> self.halvings for v in self.plan.read_px)
        direct = (w, h) == (px, px)
        region = None if direct else np.empty((h, w, 3), np.uint8)
        mode = cv2.INTER_AREA if w >= px and h >= px else cv2.INTER_CUBIC
        whole = direct and self.plane.can_halve and self.halvings == 0 and self.plane.tile == (px, px)
        for i, (x, y) in enumerate(self._to_level(coords_l0).tolist()):
            try:
                if whole and x % px == 0 and y % px == 0 and self._in_place(x // px, y // px, out[i]):
                    continue
                target = out[i] if region is None else region
                self._region(x, y, target)
                if region is not None:
                    cv2.resize(region, (px, px), dst=out[i], interpolation=mode)
            except _Undecodable as error:
                x_l0, y_l0 = (int(v) for v in coords_l0[i])
                out[i] = self.slide.read_region(x_l0, y_l0, px, self.job.mpp)  # OpenSlide has the last word
                self.note = f"some tiles through OpenSlide: {error}"

    def close(self) -> None:
        os.close(self._fd)
        self._tiles.clear()
        self.slide.close()

    # ------------------------------------------------------------------ geometry, all in px of the (halved) level

    def _to_level(self, coords_l0: np.ndarray) -> np.ndarray:
        """Corners in px of the level, after the halvings, int64 (n, 2)."""
        scale = self.slide.level_downsamples[self.plan.level] * (1 << self.halvings)
        return np.rint(np.asarray(coords_l0, np.float64) / scale).astype(np.int64)

    def _halvings(self) -> int:
        """How often the JPEG decoder may halve: while the result is still as fine as the tile, and tiles divide."""
        k = 0
        while (
            k < 3
            and self.plane.can_halve
            and min(self.plan.read_px) >> (k + 1) >= self.job.tile_px
            and all(t % (2 << k) == 0 for t in self.plane.tile)
        ):
            k += 1
        return k

    def _uses(self) -> np.ndarray:
        """How many of the job's tiles touch each file tile, int32 (file tiles,)."""
        plane, k = self.plane, self.halvings
        tw, th = plane.tile[0] >> k, plane.tile[1] >> k
        w, h = (v >> k for v in self.plan.read_px)
        rows = -(-plane.size[1] // plane.tile[1])
        uses = np.zeros((rows, plane.columns), np.int32)
        first_x, last_x = self._corners[:, 0] // tw, (self._corners[:, 0] + w - 1) // tw
        first_y, last_y = self._corners[:, 1] // th, (self._corners[:, 1] + h - 1) // th
        for dy in range(int((last_y - first_y).max(initial=0)) + 1):
            for dx in range(int((last_x - first_x).max(initial=0)) + 1):
                x, y = first_x + dx, first_y + dy
                inside = (x <= last_x) & (y <= last_y) & (x >= 0) & (y >= 0) & (x < plane.columns) & (y < rows)
                np.add.at(uses, (y[inside], x[inside]), 1)
        return uses.ravel()

    def _region(self, x: int, y: int, out: np.ndarray) -> None:
        """Pixels of the level from (x, y) into uint8 (h, w, 3); white outside the level."""
        k = self.halvings
        (tw, th), (w, h) = (v >> k for v in self.plane.tile), out.shape[1::-1]
        level_w, level_h = (-(-v >> k) for v in self.plane.size)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
        if (x0, y0, x1, y1) != (x, y, x + w, y + h):
            out[...] = 255
            if x1 <= x0 or y1 <= y0:
                return
        for row in range(y0 // th, -(-y1 // th)):
            for column in range(x0 // tw, -(-x1 // tw)):
                left, top = column * tw, row * th
                pixels = self._tiles.get(row * self.plane.columns + column)
                a, b = max(x0, left), min(x1, left + tw)
                c, d = max(y0, top), min(y1, top + th)
                out[c - y : d - y, a - x : b - x] = pixels[c - top : d - top, a - left : b - left]

    def _in_place(self, column: int, row: int, out: np.ndarray) -> bool:
        """Decode a file tile that is one job tile, and no other's, where it is wanted: a tenth of the time is saved."""
        w, h = self.plane.size
        px = len(out)
        if column < 0 or row < 0 or (column + 1) * px > w or (row + 1) * px > h:
            return False
        index = row * self.plane.columns + column
        if not self._tiles.sole(index):
            return False
        self._decode(index, out)
        return True

    # ------------------------------------------------------------------ bytes

    def _read(self, plane: Plane, index: int) -> bytes:
        offset, count = int(plane.offsets[index]), int(plane.counts[index])
        if count == 0:
            raise _Undecodable("the file leaves out tiles")
        if hasattr(os, "pread"):
            data = os.pread(self._fd, count, offset)
        else:
            with self._seek:
                os.lseek(self._fd, offset, os.SEEK_SET)
                data = os.read(self._fd, count)
        if len(data) < count:
            raise _Undecodable("the file ends before its tiles do")
        return data

    def _decode(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        data = self._read(self.plane, index)
        try:
            return self.plane.decode(data, self.halvings, out)
        except Exception as error:  # each decoder has its own exceptions: OpenSlide decides whether the tile is lost
            raise _Undecodable(f"{type(error).__name__}: {error}") from error

    def _compare(self, plane: Plane) -> None:
        """Raise NotDirect unless a file tile of level 0 under the first job tile has OpenSlide's very pixels."""
        if not len(self.job.coords_l0):
            return
        (x, y), (tw, th) = self.job.coords_l0[len(self.job.coords_l0) // 2].tolist(), plane.tile
        column = min(max(x // tw, 0), plane.columns - 1)
        row = min(max(y // th, 0), -(-plane.size[1] // th) - 1)
        w, h = min(tw, plane.size[0] - column * tw), min(th, plane.size[1] - row * th)
        try:
            ours = plane.decode(self._read(plane, row * plane.columns + column), 0, None)[:h, :w]
        except Exception as error:
            raise NotDirect(f"its tiles cannot be decoded directly ({type(error).__name__}: {error})") from error
        theirs = self.slide.read_level(column * tw, row * th, 0, w, h)
        if not np.array_equal(ours, theirs):
            far = int(np.abs(ours.astype(np.int16) - theirs).max()) if ours.shape == theirs.shape else -1
            raise NotDirect(f"directly decoded pixels differ from OpenSlide's (by up to {far})")


class _Undecodable(Exception):
    """One file tile that OpenSlide must read."""


class _Shared:
    """Decoded file tiles shared by threads: each decoded once, kept until its last use, within `limit` bytes."""

    def __init__(self, decode: Callable[[int], np.ndarray], limit: int) -> None:
        self.decode = decode
        self.limit = limit
        self.left = np.zeros(0, np.int32)
        self.kept: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self.tile_bytes = 0
        self.lock = threading.Lock()

    def expect(self, uses: np.ndarray) -> None:
        self.left = uses

    def get(self, index: int) -> np.ndarray:
        with self.lock:
            self.left[index] -= 1
            future = self.kept.get(index)
            mine = future is None
            if future is None:
                if self.left[index] <= 0:  # nobody else will want it
                    future = None
                else:
                    future = self.kept[index] = Future()
                    while self.tile_bytes * len(self.kept) > self.limit:
                        self.kept.popitem(last=False)
            elif self.left[index] <= 0:
                self.kept.pop(index)
        if future is None:
            return self.decode(index)
        if not mine:
            return future.result()
        try:
            pixels = self.decode(index)
        except BaseException as error:
            future.set_exception(error)
            raise
        self.tile_bytes = pixels.nbytes
        future.set_result(pixels)
        return pixels

    def sole(self, index: int) -> bool:
        """True, counting it as used, if this is the only use of a tile that nobody keeps."""
        with self.lock:
            if self.left[index] != 1 or index in self.kept:
                return False
            self.left[index] = 0
            return True

    def clear(self) -> None:
        with self.lock:
            self.kept.clear()


def read_planes(path: Path, levels: tuple[tuple[int, int], ...], wanted: set[int]) -> dict[int, Plane]:
    """The file's own planes for the `wanted` of OpenSlide's levels. Raises NotDirect."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for top in tiff.pages for page in (top, *(top.pages or ()))]
            return {level: plane_of(pages, levels[level], level) for level in wanted}
    except tifffile.TiffFileError as error:
        raise NotDirect(f"not a TIFF: {error}") from error
    except (ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise NotDirect(f"unusual TIFF structure ({type(error).__name__}: {error})") from error


def plane_of(pages: Sequence[Any], size: tuple[int, int], level: int) -> Plane:
    """The tiled page of this size (Philips pads pages to whole tiles, so up to one tile more)."""
    for page in pages:
        if not page.is_tiled:
            continue
        tw, th = int(page.tilewidth), int(page.tilelength)
        w, h = int(page.imagewidth), int(page.imagelength)
        if not (0 <= w - size[0] < tw and 0 <= h - size[1] < th):
            continue
        code = int(page.compression)
        if page.dtype != np.uint8 or page.samplesperpixel != 3 or int(page.planarconfig) != 1 or page.imagedepth != 1:
            raise NotDirect(f"level {level} is not 8-bit RGB in one plane")
        if code not in _JPEG | _JPEG2000:
            raise NotDirect(f"level {level} is compressed with {getattr(page.compression, 'name', code)}")
        columns, rows = -(-w // tw), -(-h // th)
        offsets, counts = np.asarray(page.dataoffsets, np.int64), np.asarray(page.databytecounts, np.int64)
        if len(offsets) != columns * rows or len(counts) != len(offsets):
            raise NotDirect(f"level {level} has {len(offsets)} tiles, not {columns} x {rows}")
        decode = _jpeg(page) if code in _JPEG else _jpeg2000(tw, th)
        return Plane(size, (tw, th), columns, offsets, counts, decode, code in _JPEG)
    raise NotDirect(f"no tiled page of {size[0]} x {size[1]} px for level {level}")


def _jpeg(page: Any) -> Decode:
    """Decoder of the page's JPEG tiles: they get the page's tables and, where they are RGB, a marker that says so."""
    import simplejpeg

    tables: bytes = page.jpegtables or b""
    head = b"\xff\xd8" + tables[2:-2]
    if int(page.photometric) == 2:
        head += _ADOBE_RGB
    elif int(page.photometric) != 6:
        raise NotDirect(f"its JPEG tiles are {page.photometric.name}, not RGB or YCbCr")
    shape = (int(page.tilelength), int(page.tilewidth))

    def decode(data: bytes, halvings: int, out: np.ndarray | None) -> np.ndarray:
        if data[:2] != b"\xff\xd8":
            raise ValueError("no JPEG stream")
        whole = head + data[2:] if len(head) > 2 else data
        want = (shape[0] >> halvings, shape[1] >> halvings)
        if halvings:
            pixels = simplejpeg.decode_jpeg(
                whole, "RGB", min_height=want[0], min_width=want[1], min_factor=1 << halvings
            )
        else:
            pixels = simplejpeg.decode_jpeg(whole, "RGB", buffer=out)
        if pixels.shape[:2] != want:
            raise ValueError(f"a tile of {pixels.shape[1]} x {pixels.shape[0]} px, not {want[1]} x {want[0]}")
        return np.asarray(pixels)

    return decode


def _jpeg2000(tw: int, th: int) -> Decode:
    import imagecodecs

    def decode(data: bytes, halvings: int, out: np.ndarray | None) -> np.ndarray:
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data))
        if pixels.shape != (th, tw, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"a tile of shape {pixels.shape}, not ({th}, {tw}, 3)")
        return pixels

    return decode
