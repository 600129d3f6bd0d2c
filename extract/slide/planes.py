"""Which page of a TIFF, or image of a DICOM series, is which level, where its tiles lie, and how one is decoded.

In: a path, and what OpenSlide says of it. Out: `Plane`s. Pages are counted as OpenSlide counts them, vendor by vendor,
and a page is a level's only if it has the level's very size (Philips alone pads its pages to whole tiles). What is not
surely understood is refused (`NotDirect`, with the reason). Opens nothing but the directories; reads no pixel.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhim.extract.slide.tiffpages import Page, read_pages, sub_pages

VENDORS = frozenset({"aperio", "dicom", "generic-tiff", "philips"})  # one plane per level, no overlaps, no gaps
_JPEG, _JPEG2000, _JPEG2000_YCC = {7}, {33003, 33004, 33005, 34712}, 33003
_ADOBE_RGB = bytes.fromhex("ffee000e41646f626500640000000000")  # APP14 that says: three plain channels, no YCbCr

Decode = Callable[[bytes, int, np.ndarray | None], np.ndarray]


class NotDirect(Exception):
    """This slide cannot be read directly; the message says why. OpenSlide reads it instead."""


@dataclass(frozen=True)
class Plane:
    """One level of the file: (w, h) of the level, (w, h) of its tiles, where each tile's bytes lie, how to decode them.

    offsets, counts: int64 (tiles,), row by row; a count of 0 is a tile that OpenSlide must make.
    decode: (bytes, halvings, where to or None) -> uint8 (tile_h >> halvings, tile_w >> halvings, 3).
    can_halve: JPEG only. path: the file they lie in, None for the slide's own.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    columns: int
    rows: int
    offsets: np.ndarray
    counts: np.ndarray
    decode: Decode
    can_halve: bool
    path: Path | None = None


def level_pages(path: Path, vendor: str, levels: Sequence[tuple[int, int]]) -> list[Page]:
    """The page of each of OpenSlide's `levels` (w, h), as many as there are. Raises NotDirect."""
    if vendor not in VENDORS:
        raise NotDirect(f"format {vendor}")
    try:
        if vendor == "dicom":
            from mhim.extract.slide import dicompages  # the library takes a quarter of a second to import

            pages = dicompages.level_pages(path)
        else:
            pages = read_pages(path)
            if vendor == "generic-tiff":  # of the pages after the first those marked as reduced, by falling width
                pages = [p for p in pages if p.index == 0 or p.reduced]
                if len(pages) == 1 < len(levels):  # OpenSlide knows no sub-directories, `flat.py` does
                    pages += sub_pages(path, pages[0])
                pages.sort(key=lambda p: -p.imagewidth)
    except (ValueError, IndexError, OSError, struct.error) as error:
        raise NotDirect(f"unusual structure ({type(error).__name__}: {error})") from error
    if len(pages) != len(levels):
        raise NotDirect(f"{len(pages)} tiled pages for {len(levels)} levels")
    for level, (page, size) in enumerate(zip(pages, levels, strict=True)):
        spare = (page.imagewidth - size[0], page.imagelength - size[1])
        padded = vendor == "philips" and 0 <= spare[0] < page.tilewidth and 0 <= spare[1] < page.tilelength
        if spare != (0, 0) and not padded:
            raise NotDirect(
                f"level {level} has {size[0]} x {size[1]} px, its page {page.imagewidth} x {page.imagelength}"
            )
    return pages


def plane_of(pages: Sequence[Page], level: int, size: tuple[int, int], vendor: str) -> Plane:
    """The plane of one level, from the pages of all. Raises NotDirect where its tiles cannot be decoded."""
    page = pages[level]
    tw, th, code = page.tilewidth, page.tilelength, page.compression
    if page.dtype != np.uint8 or page.samplesperpixel != 3 or page.planarconfig != 1 or page.imagedepth != 1:
        raise NotDirect(f"level {level} is not 8-bit RGB in one plane")
    if code not in _JPEG | _JPEG2000:
        raise NotDirect(f"level {level} is compressed with {_codec(code)}")
    columns, rows = -(-page.imagewidth // tw), -(-page.imagelength // th)
    offsets, counts = page.dataoffsets.astype(np.int64), page.databytecounts.astype(np.int64)
    if len(offsets) != columns * rows or len(counts) != len(offsets):
        raise NotDirect(f"level {level} has {len(offsets)} tiles, not {columns} x {rows}")
    if vendor == "aperio" and level:
        counts = np.where(_made_of_missing(pages, level), 0, counts)
    decode = _jpeg(page) if code in _JPEG else _jpeg2000(tw, th, code == _JPEG2000_YCC)
    return Plane(size, (tw, th), columns, rows, offsets, counts, decode, code in _JPEG, page.path)


def _made_of_missing(pages: Sequence[Page], level: int) -> np.ndarray:
    """bool (tiles,): the tiles of an Aperio level that lie over a tile of no bytes of a finer one. They are often
    damaged, so that OpenSlide paints them from the finer level instead."""
    missing = np.zeros((1, 1), bool)
    for n, page in enumerate(pages[: level + 1]):
        columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        own = page.databytecounts[: columns * rows].reshape(rows, columns) == 0
        if n and missing.any():
            row, column = np.nonzero(missing)
            down = max(1, round(missing.shape[0] / rows)), max(1, round(missing.shape[1] / columns))
            inside = (row // down[0] < rows) & (column // down[1] < columns)
            own[row[inside] // down[0], column[inside] // down[1]] = True
        missing = own
    return missing.ravel()


def _codec(code: int) -> str:
    """What people call a TIFF compression."""
    names = {1: "nothing", 5: "LZW", 8: "deflate", 32946: "deflate", 50000: "Zstandard", 50001: "WebP"}
    return names.get(code, f"codec {code}")


def _jpeg(page: Page) -> Decode:
    """Decoder of the page's JPEG tiles: they get the page's tables and, where they are RGB, a marker that says so."""
    import simplejpeg

    tables: bytes = page.jpegtables or b""
    head = b"\xff\xd8" + tables[2:-2]
    if page.photometric == 2:
        head += _ADOBE_RGB
    elif page.photometric != 6:
        raise NotDirect(f"its JPEG tiles are neither RGB nor YCbCr (photometric {page.photometric})")
    shape = (page.tilelength, page.tilewidth)

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


def _jpeg2000(tw: int, th: int, ycc: bool) -> Decode:
    import imagecodecs

    def decode(data: bytes, halvings: int, out: np.ndarray | None) -> np.ndarray:
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data, out=None if ycc else out))
        if pixels.shape != (th, tw, 3) or pixels.dtype != np.uint8:
            raise ValueError(f"a tile of shape {pixels.shape}, not ({th}, {tw}, 3)")
        return _rgb(pixels, out) if ycc else pixels

    return decode


@functools.cache
def _chroma() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Cr adds to red, int32 (256,), what Cb and Cr add to green, (256, 256), and what Cb adds to blue: JPEG's
    matrix, rounded as OpenSlide rounds it (all 65,536 pairs were compared)."""
    c = np.arange(-128, 128, dtype=np.float64)
    red, blue = (np.floor(k * c + 0.5).astype(np.int32) for k in (1.402, 1.772))
    return red, np.floor(-0.34414 * c[:, None] - 0.71414 * c + 0.5).astype(np.int32), blue


def _rgb(ycc: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """uint8 (h, w, 3), Y, Cb, Cr -> RGB as OpenSlide turns it, to the bit; in `out` if given."""
    red, green, blue = _chroma()
    y, cb, cr = ycc[..., 0].astype(np.int32), ycc[..., 1], ycc[..., 2]
    out = np.empty_like(ycc) if out is None else out
    for channel, added in enumerate((red[cr], green[cb, cr], blue[cb])):
        np.clip(y + added, 0, 255, out=out[..., channel], casting="unsafe")
    return out
