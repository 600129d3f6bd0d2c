"""Tiles straight from the file: a tiled TIFF's own JPEG or JPEG 2000 tiles, each decoded once, any grid cut from them.

In: a `SlideJob` whose slide OpenSlide opens. Out: the same pixels as OpenSlide's, 4 to 9 times faster, since nothing
is composed or converted in between. `filetiles` decodes, pastes, and compares with OpenSlide, at places of the level
that is read and among the tiles of the job; here is what only many tiles of one job need: the decoded file tiles that
its threads share. Knows nothing of encoders.

At the level's own resolution pixels are bit-identical. Where tiles are coarser than the level, `area` equals
OpenSlide's pixels reduced by the same area average; `dct` lets the JPEG decoder halve (0.7 grey levels from that on
average, 34 at most on real tissue).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from mhim.extract import SlideJob
from mhim.extract.slide.filetiles import FileLevels, Undecodable, paste
from mhim.extract.slide.slide import ReadPlan, Slide, corners_on_level, resized

CACHE_BYTES = 128 << 20  # decoded file tiles kept until their last use; more than a row of the widest slides needs


class DirectReader:
    """Reads the tiles of one job; safe to use from several threads. Owns `slide`, which it closes."""

    kind = "direct"

    def __init__(self, job: SlideJob, slide: Slide, reduction: str = "area") -> None:
        self.job = job
        self.slide = slide
        self.note = ""
        self.plan: ReadPlan = slide.plan_read(job.mpp, job.tile_px)
        self.levels = FileLevels(job.path, slide.source)
        try:
            self.plane = self.levels.unproven(self.plan.level)
            self.halvings = self._halvings() if reduction == "dct" else 0
            self._corners = self._to_level(job.coords_l0)
            uses = self._uses()
            self.plane = self.levels.plane(self.plan.level, np.flatnonzero(uses))
        except BaseException:
            self.levels.close()
            raise
        self._tiles = _Shared(self._decode, CACHE_BYTES)
        self._tiles.expect(uses, self.levels.compared if self.halvings == 0 else {})
        self.levels.compared = {}

    def fill(self, coords_l0: np.ndarray, out: np.ndarray) -> None:
        """Tiles at int (n, 2) level-0 corners into uint8 (n, tile_px, tile_px, 3). Raises SlideError."""
        px = self.job.tile_px
        w, h = (v >> self.halvings for v in self.plan.read_px)
        direct = (w, h) == (px, px)
        region = None if direct else np.empty((h, w, 3), np.uint8)
        whole = direct and self.halvings == 0 and self.plane.tile == (px, px)
        for i, (x, y) in enumerate(self._to_level(coords_l0).tolist()):
            try:
                if whole and x % px == 0 and y % px == 0 and self._in_place(x // px, y // px, out[i]):
                    continue
                paste(self.plane, self.halvings, x, y, out[i] if region is None else region, self._tiles.get)
                if region is not None:
                    resized(region, (px, px), out[i])
            except Undecodable as error:
                x_l0, y_l0 = (int(v) for v in coords_l0[i])
                out[i] = self.slide.read_region(x_l0, y_l0, px, self.job.mpp)  # OpenSlide has the last word
                self.note = f"some tiles through OpenSlide: {error}"

    def close(self) -> None:
        self.levels.close()
        self._tiles.clear()
        self.slide.close()

    # ------------------------------------------------------------------ geometry, all in px of the (halved) level

    def _to_level(self, coords_l0: np.ndarray) -> np.ndarray:
        """Corners in px of the level, after the halvings, int64 (n, 2)."""
        scale = self.slide.level_downsamples[self.plan.level] * (1 << self.halvings)
        return corners_on_level(coords_l0, scale)

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
        columns, rows = (-(-size // tile) for size, tile in zip(plane.size, plane.tile, strict=True))
        uses = np.zeros((plane.rows, plane.columns), np.int32)
        first_x, last_x = self._corners[:, 0] // tw, (self._corners[:, 0] + w - 1) // tw
        first_y, last_y = self._corners[:, 1] // th, (self._corners[:, 1] + h - 1) // th
        for dy in range(int((last_y - first_y).max(initial=0)) + 1):
            for dx in range(int((last_x - first_x).max(initial=0)) + 1):
                x, y = first_x + dx, first_y + dy
                inside = (x <= last_x) & (y <= last_y) & (x >= 0) & (y >= 0) & (x < columns) & (y < rows)
                np.add.at(uses, (y[inside], x[inside]), 1)
        return uses.ravel()

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

    def _decode(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        return self.levels.tile(self.plane, index, self.halvings, out)


class _Shared:
    """Decoded file tiles shared by threads: each decoded once, kept until its last use, within `limit` bytes."""

    def __init__(self, decode: Callable[[int], np.ndarray], limit: int) -> None:
        self.decode = decode
        self.limit = limit
        self.left = np.zeros(0, np.int32)
        self.kept: OrderedDict[int, Future[np.ndarray]] = OrderedDict()
        self.tile_bytes = 0
        self.lock = threading.Lock()

    def expect(self, uses: np.ndarray, decoded: dict[int, np.ndarray]) -> None:
        """uses: how often each file tile will be asked for. decoded: some that are decoded already."""
        self.left = uses
        for index, pixels in decoded.items():
            if uses[index] > 0:
                self.kept[index] = Future()
                self.kept[index].set_result(pixels)

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
