"""One slide as a pyramid of square tiles, each level half as fine as the next: what a deep zoom asks for.

In: an open slide. Out: JPEG tiles. Where the file's own tiles can be decoded directly that is done (a JPEG decoder
halves by itself, so coarse levels cost little); everything else is read through OpenSlide. Safe to use from several
threads. It knows no cohort and no HTTP.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from mhim.extract.images import viewed_jpeg
from mhim.extract.recent import Recent
from mhim.extract.slide.filetiles import FileLevels, FileTiles, Undecodable, paste
from mhim.extract.slide.planes import NotDirect
from mhim.extract.slide.slide import Slide
from mhim.extract.units import Mpp

TILE_PX = 512
KEPT_BYTES = 32 << 20  # per slide and kind: tiles of the file that lie on several of ours, and tiles sent before
READ_PX = 1 << 24  # pixels of the file that are put together at once; more are read in quarters
TOLERANCE = 2e-3  # a level of 4.0003 counts as 4: one pixel in 500 is dropped or doubled at a tile's edge


class Pyramid:
    """Tiles of a slide, which it owns. note: why not direct.

    size_px: (w, h) of the finest picture, whose pixels are squares: level 0, unless its own are oblong. Then it is
    stretched, by `stretch` (x, y), to the finer of its two µm per px. top: the level of the finest picture.
    """

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.mpp = min(slide.slide_mpp)
        self.stretch = (slide.slide_mpp[0] / self.mpp, slide.slide_mpp[1] / self.mpp)
        w, h = slide.size_l0
        self.size_px = (round(w * self.stretch[0]), round(h * self.stretch[1]))
        self.top = math.ceil(math.log2(max(self.size_px)))
        self.note = ""
        self._decoded: Recent[tuple[int, int, int], np.ndarray] = Recent(KEPT_BYTES, lambda pixels: int(pixels.nbytes))
        self._sent: Recent[tuple[int, int, int], bytes] = Recent(KEPT_BYTES, len)
        source = slide.source
        self._file = source.levels if isinstance(source, FileTiles) else FileLevels(slide.path, source)

    def size_at(self, level: int) -> tuple[int, int]:
        """(w, h) of a level."""
        down = 2 ** (self.top - level)
        return -(-self.size_px[0] // down), -(-self.size_px[1] // down)

    def tile(self, level: int, column: int, row: int) -> bytes:
        """The JPEG of one tile; those of the last column and row are smaller. LookupError where there is none."""
        if not 0 <= level <= self.top:
            raise LookupError(f"no level {level}")
        w, h = self.size_at(level)
        x, y = column * TILE_PX, row * TILE_PX
        if not (0 <= x < w and 0 <= y < h):
            raise LookupError(f"no tile {column}, {row}")
        size = min(TILE_PX, w - x), min(TILE_PX, h - y)
        down = 2 ** (self.top - level)
        return self._sent.made((level, column, row), lambda: viewed_jpeg(self._read(down, x, y, *size)))

    def _read(self, down: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3) from (x, y), all in px of a plane `down` times as coarse as the finest."""
        level, halvings, scale = self._source(down)
        if w * h * (down / scale) ** 2 > READ_PX and min(w, h) > 1:
            out, left, top = np.empty((h, w, 3), np.uint8), w // 2, h // 2
            for a, c, e, f in (
                (0, 0, left, top),
                (left, 0, w - left, top),
                (0, top, left, h - top),
                (left, top, w - left, h - top),
            ):
                out[c : c + f, a : a + e] = self._read(down, x + a, y + c, e, f)
            return out
        if level >= 0 and self.stretch == (1, 1):
            try:
                return self._direct(level, halvings, round(x * down / scale), round(y * down / scale), w, h)
            except NotDirect as reason:
                self.note = str(reason)
            except (Undecodable, OSError) as error:  # an odd tile: OpenSlide has the last word
                self.note = f"some tiles through OpenSlide: {error}"
        x_l0, y_l0 = round(x * down / self.stretch[0]), round(y * down / self.stretch[1])
        return self.slide.read_region(x_l0, y_l0, (w, h), Mpp(self.mpp * down))

    def _source(self, down: int) -> tuple[int, int, float]:
        """The coarsest level of the file from which halving leads to `down` (-1: none), how often, its own scale."""
        scales = self.slide.level_downsamples
        for level in range(len(scales) - 1, -1, -1):
            halvings = math.log2(down / scales[level])
            if round(halvings) >= 0 and abs(halvings - round(halvings)) < TOLERANCE:
                return level, round(halvings), scales[level]
        return -1, 0, max(s for s in scales if s <= max(1.0, down))

    def _direct(self, level: int, halvings: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """`w` x `h` pixels, `halvings` times as coarse as the level, whose corner is (x, y) of the level."""
        plane = self._file.plane(level)
        k = 0  # halvings that the decoder does
        while k < min(3, halvings) and plane.can_halve and all(t % (2 << k) == 0 for t in plane.tile):
            k += 1
        rest = 1 << (halvings - k)
        left, top = x >> k, y >> k
        right = min(left + w * rest, -(-plane.size[0] // (1 << k)))
        bottom = min(top + h * rest, -(-plane.size[1] // (1 << k)))
        out = np.empty((bottom - top, right - left, 3), np.uint8)

        def tile(index: int) -> np.ndarray:
            return self._decoded.made((level, index, k), lambda: self._file.tile(plane, index, k))

        paste(plane, k, left, top, out, tile)
        return cv2.resize(out, (w, h), interpolation=cv2.INTER_AREA) if out.shape[:2] != (h, w) else out
