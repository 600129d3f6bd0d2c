"""The fallback reader: plain images and the TIFFs that OpenSlide leaves out (striped, flat, grey, 16-bit, palette, in
JPEG 2000, WebP or JPEG XL, colours in pages of their own, levels in sub-directories ...).

In: a path. Out: an object with the same face as OpenSlide's (`slide.Source`). TIFFs are decoded strip by strip or tile
by tile, PNG and JPEG as a whole and therefore up to a size only. Knows nothing of mpp: it hands on the TIFF tags.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mhim.extract import UnreadableSlide
from mhim.extract.recent import Recent
from mhim.extract.slide.formats import is_plain_image

MAX_WHOLE_PX = 150_000_000  # 450 MB as RGB: what must be decoded in one piece may not be larger
_CACHE_BYTES = 32 << 20
_MAX_SAMPLE = (281, 341)  # MaxSampleValue, SMaxSampleValue
_TO_PYRAMID = "convert it to a tiled pyramidal TIFF first (for example `vips tiffsave IN OUT.tif --tile --pyramid`)"


class FlatImage:
    """One image, one level (or the levels of a TIFF pyramid). Safe to read from several threads.

    join: the numbers of the TIFF pages that hold red, green and blue; none: the first page holds the picture. bits: how
    many of a sample's bits count."""

    associated: tuple[str, ...] = ()

    def __init__(self, path: Path, join: tuple[int, ...] = ()) -> None:
        self._name = path.name
        self._lock = threading.Lock()
        self._cache: Recent[tuple[int, int], np.ndarray] = Recent(_CACHE_BYTES, lambda segment: segment.nbytes)
        self._tiff: Any = None
        self._levels: list[list[Any]] = []  # the page of each level, or the three that make it up
        self._join = join
        self.bits = 8
        self._whole: np.ndarray | None = None
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            self._open_tiff(path)
        elif is_plain_image(path):
            self._open_plain(path)
        else:
            raise UnreadableSlide(
                f"{path.name}: OpenSlide does not recognise it, and it is no TIFF either (it starts with {magic!r}): "
                "the file is damaged, or its suffix is wrong"
            )

    def read(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3) of `level`, white outside."""
        scale = self.level_downsamples[level]
        x, y = round(x_l0 / scale), round(y_l0 / scale)
        level_w, level_h = self.level_dimensions[level]
        out = np.full((h, w, 3), 255, np.uint8)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, level_w), min(y + h, level_h)
        if x0 >= x1 or y0 >= y1:
            return out
        if self._whole is not None:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self._whole[y0:y1, x0:x1]
            return out
        page = self._levels[level][0]
        across = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        seg_w, seg_h = (page.tilewidth, page.tilelength) if page.is_tiled else (level_w, page.rowsperstrip)
        for row in range(y0 // seg_h, (y1 - 1) // seg_h + 1):
            for column in range(x0 // seg_w, (x1 - 1) // seg_w + 1):
                rgb = self._segment(level, row * across + column)
                top, left = row * seg_h, column * seg_w
                a, b = max(y0, top), min(y1, top + rgb.shape[0])
                c, d = max(x0, left), min(x1, left + rgb.shape[1])
                out[a - y : b - y, c - x : d - x] = rgb[a - top : b - top, c - left : d - left]
        return out

    def close(self) -> None:
        if self._tiff is not None:
            self._tiff.close()
        self._whole = None

    def _open_tiff(self, path: Path) -> None:
        import tifffile

        try:
            self._tiff = tifffile.TiffFile(path)
            self._levels = self._find_levels()
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError, OSError, TypeError, RuntimeError) as error:
            raise UnreadableSlide(f"{path.name} is a damaged or truncated TIFF: {error}") from error
        first = self._levels[0][0]
        for page in (p for pages in self._levels for p in pages):
            self._refuse_what_cannot_be_read(page)
        self.vendor = "tiff"
        self.level_dimensions = tuple((int(p[0].imagewidth), int(p[0].imagelength)) for p in self._levels)
        w0, h0 = self.level_dimensions[0]
        self.level_downsamples = tuple((w0 / w + h0 / h) / 2 for w, h in self.level_dimensions)
        self.properties: Mapping[str, str] = _tiff_properties(first, self._tiff.pages[0])
        self.bits = self._significant_bits(first)

    def _find_levels(self) -> list[list[Any]]:
        """The pages of each level, finest first: of the first image's pyramid, whether its further levels are
        sub-directories or pages of the chain; its first page alone where it is no simple pyramid."""
        top = [self._tiff.pages[n] for n in self._join or (0,)]
        first = top[0]
        below: list[list[Any]] = []
        if first.pages:
            below = [list(pages) for pages in zip(*(p.pages for p in top), strict=False)]
        elif len(top) > 1:
            sizes: dict[tuple[int, int], list[Any]] = {}
            for page in self._tiff.pages:
                sizes.setdefault((page.imagewidth, page.imagelength), []).append(page)
            rank = [sorted(self._join).index(n) for n in self._join]
            below = [[pages[i] for i in rank] for pages in sizes.values() if len(pages) == len(top)]
        elif self._join not in ((), (0,)):  # the finest page does not come first: its levels say that they are reduced
            below = [[page] for page in self._tiff.pages if page.is_reduced]
        else:
            series = self._tiff.series[0].levels
            if series[0].pages[0].imagewidth == first.imagewidth and all(len(s.pages) == 1 for s in series):
                below = [[s.pages[0]] for s in series[1:]]
        smaller = [p for p in below if p[0].imagewidth < first.imagewidth and _is_level_of(p[0], first)]
        return [top, *sorted(smaller, key=lambda p: -p[0].imagewidth)]

    def _refuse_what_cannot_be_read(self, page: Any) -> None:
        name = self._name
        if page.dtype is None:
            raise UnreadableSlide(f"{name}: its TIFF directory describes no picture: the file is damaged")
        if page.dtype.kind not in "ub" or page.dtype.itemsize > 2:
            raise UnreadableSlide(f"{name}: pixels of type {page.dtype} are no picture; save it as 8-bit RGB")
        samples = page.samplesperpixel
        if page.imagedepth != 1 or not 1 <= samples <= 5 or 0 in (page.imagewidth, page.imagelength):
            raise UnreadableSlide(f"{name}: {samples} channels and {page.imagedepth} planes are no RGB picture")
        segment_px = page.tilewidth * page.tilelength if page.is_tiled else page.imagewidth * page.rowsperstrip
        segment_px = min(segment_px, page.imagewidth * page.imagelength) if not page.is_tiled else segment_px
        if segment_px > MAX_WHOLE_PX:
            raise UnreadableSlide(f"{name}: one strip of it has {segment_px / 1e6:.0f} million px; {_TO_PYRAMID}")
        planes = samples if page.planarconfig == 2 else 1
        rows = -(-page.imagelength // (page.tilelength if page.is_tiled else page.rowsperstrip))
        expected = rows * (-(-page.imagewidth // page.tilewidth) if page.is_tiled else 1) * planes
        if len(page.dataoffsets) < expected or len(page.databytecounts) < expected:
            listed = len(page.dataoffsets)
            raise UnreadableSlide(f"{name}: {listed} of its {expected} strips are listed: the file is damaged")

    def _significant_bits(self, page: Any) -> int:
        """How many bits of a sample count: 16 bits may hold the 12 of a camera. Raises UnreadableSlide where nothing
        says how many do and the values themselves show that it is not all: any guess would be another brightness."""
        if page.dtype.itemsize == 1 or page.bitspersample < 16:
            return int(page.bitspersample)
        told = [page.tags[t].value for t in _MAX_SAMPLE if t in page.tags]
        most = max((int(np.max(v)) for v in told), default=0)
        ome = re.search(r'<(?:\w+:)?Pixels\b[^>]*\bSignificantBits\s*=\s*"(\d+)"', str(page.description or ""))
        if ome or 0 < most < 65535:
            return min(16, int(ome.group(1))) if ome else most.bit_length()
        coarse = len(self._levels) - 1
        count = len(self._levels[coarse][0].dataoffsets)
        highest = 0
        for index in sorted({round(i * (count - 1) / 15) for i in range(16)}):
            highest = max(highest, *(int(s.max()) for s in self._decoded(coarse, index) if s is not None), 0)
        if highest >= 1 << 14:
            return 16
        raise UnreadableSlide(
            f"{self._name}: its samples have 16 bits, but the highest of them is {highest}, so that only about "
            f"{highest.bit_length()} bits count, and nothing says how many: save it as 8-bit RGB, or write the tag "
            "MaxSampleValue"
        )

    def _segment(self, level: int, index: int) -> np.ndarray:
        """Strip or tile `index` as RGB, from the cache or decoded now."""
        with self._lock:  # one at a time: all read from one open file
            return self._cache.made((level, index), lambda: self._decode(level, index))

    def _decode(self, level: int, index: int) -> np.ndarray:
        """Strip or tile `index` of a level as RGB."""
        planes = self._decoded(level, index)
        page = self._levels[level][0]
        if any(p is None for p in planes):  # a sparse TIFF leaves blank segments out
            shape = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
            return np.full((*shape, 3), 255, np.uint8)
        samples = np.concatenate([p for p in planes if p is not None], axis=2)
        return _tiff_rgb(samples, page, self.bits)

    def _decoded(self, level: int, index: int) -> list[np.ndarray | None]:
        """(h, w, samples) of each plane of strip or tile `index`; None for one that the file leaves out."""
        planes: list[np.ndarray | None] = []
        for page, n in self._segments(level, index):
            offset, size = page.dataoffsets[n], page.databytecounts[n]
            try:
                self._tiff.filehandle.seek(offset)
                data = self._tiff.filehandle.read(size)
                if len(data) < size:
                    raise ValueError(f"{size - len(data)} bytes are missing at the end of the file")
                segment = page.decode(data, n, jpegtables=page.jpegtables)[0] if size else None
            except Exception as error:  # every codec raises its own type; all of them mean damaged data
                raise UnreadableSlide(
                    f"{self._name} opens, but strip {n} cannot be decoded ({error}): the file is damaged or truncated, "
                    "copy it again from its source"
                ) from error
            planes.append(None if segment is None else segment[0])
        return planes

    def _segments(self, level: int, index: int) -> list[tuple[Any, int]]:
        """Where the samples of strip or tile `index` lie: (page, number), of all pages and planes in their order."""
        out = []
        for page in self._levels[level]:
            planes = page.samplesperpixel if page.planarconfig == 2 else 1
            out += [(page, index + k * (len(page.dataoffsets) // planes)) for k in range(planes)]
        return out

    def _open_plain(self, path: Path) -> None:
        from PIL import Image, UnidentifiedImageError

        self.vendor = "image"
        self.properties = {}
        self.level_downsamples = (1.0,)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    self.level_dimensions = (image.size,)
                    if image.size[0] * image.size[1] > MAX_WHOLE_PX:
                        raise Image.DecompressionBombError
                    self._whole = _pil_rgb(image)
        except Image.DecompressionBombError:
            raise UnreadableSlide(f"{path.name} is too large for a plain image; {_TO_PYRAMID}") from None
        except UnidentifiedImageError as error:
            raise UnreadableSlide(f"{path.name} is no image: the file is damaged, or its suffix is wrong") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise UnreadableSlide(f"{path.name} cannot be decoded ({error}): damaged or truncated") from error


def _is_level_of(page: Any, first: Any) -> bool:
    """Whether a smaller page shows all of the first one: of its shape, to two px of its own."""
    scale = first.imagewidth / page.imagewidth
    return bool(abs(page.imagelength * scale - first.imagelength) <= 2 * scale)


class _WithSubLevels:
    """A source of OpenSlide's, which knows no sub-directories, with the levels that lie in them."""

    def __init__(self, source: Any, flat: FlatImage) -> None:
        self._source, self._flat = source, flat
        self.vendor: str = source.vendor
        self.properties: Mapping[str, str] = source.properties
        self.associated: tuple[str, ...] = source.associated
        self.level_dimensions = flat.level_dimensions
        self.level_downsamples = flat.level_downsamples

    def read(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3) of `level`, white outside."""
        source = self._flat if level else self._source
        return np.asarray(source.read(x_l0, y_l0, level, w, h))

    def close(self) -> None:
        self._source.close()
        self._flat.close()


def with_sub_levels(source: Any, path: Path) -> Any:
    """`source`, opened by OpenSlide, with the levels of its sub-directories too, if there are any of its picture."""
    try:
        flat = FlatImage(path)
    except UnreadableSlide:
        return source
    if len(flat.level_dimensions) > 1 and flat.level_dimensions[0] == source.level_dimensions[0]:
        return _WithSubLevels(source, flat)
    flat.close()
    return source


def _tiff_properties(page: Any, opening: Any) -> dict[str, str]:
    """The tags that the mpp chain reads, named as OpenSlide names them. opening: the page that opens the file, whose
    description speaks of all."""
    out = {"tiff.ImageDescription": str(page.description or opening.description or "")}
    if out["tiff.ImageDescription"].startswith("Aperio"):  # of its pages only those in rare codecs come here
        told = re.search(r"\|\s*MPP\s*=\s*([^|\s]+)", out["tiff.ImageDescription"])
        out |= {"aperio.MPP": told.group(1)} if told else {}
    unit = page.tags.get("ResolutionUnit")
    out["tiff.ResolutionUnit"] = {1: "none", 2: "inch", 3: "centimeter"}.get(int(unit.value) if unit else 2, "none")
    for axis in "XY":
        tag = page.tags.get(f"{axis}Resolution")
        if tag is not None and isinstance(tag.value, tuple) and tag.value[1]:
            out[f"tiff.{axis}Resolution"] = repr(tag.value[0] / tag.value[1])
    return out


def _tiff_rgb(samples: np.ndarray, page: Any, bits: int) -> np.ndarray:
    """(h, w, samples) as decoded -> uint8 (h, w, 3). bits: how many of 16 count."""
    photometric = int(page.photometric)
    if photometric == 3 and page.colormap is not None:  # palette, 16 bits a colour
        return np.ascontiguousarray((page.colormap >> 8).astype(np.uint8).T[samples[..., 0]])
    if page.bitspersample < 8:  # 0 .. 2^bits - 1, bilevel included
        samples = (samples.astype(np.uint16) * 255 // (2**page.bitspersample - 1)).astype(np.uint8)
    elif samples.dtype == np.uint16 and bits < 16:
        most = 2**bits - 1
        samples = ((np.minimum(samples, most).astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8)
    elif samples.dtype == np.uint16:
        samples = (samples >> 8).astype(np.uint8)
    else:
        samples = samples.astype(np.uint8)
    if photometric == 0:  # white is zero
        samples = 255 - samples
    if photometric == 5 and samples.shape[2] >= 4:  # CMYK
        ink = 255 - samples[..., :4].astype(np.uint16)
        return (ink[..., :3] * ink[..., 3:] // 255).astype(np.uint8)
    if samples.shape[2] <= 2:
        rgb, alpha = np.repeat(samples[..., :1], 3, axis=2), samples[..., 1:2]
    else:
        rgb, alpha = np.ascontiguousarray(samples[..., :3]), samples[..., 3:4]
    if alpha.size == 0 or not page.extrasamples or int(page.extrasamples[0]) == 0:
        return rgb
    a = alpha.astype(np.uint16)
    premultiplied = int(page.extrasamples[0]) == 1
    laid = (rgb.astype(np.uint16) if premultiplied else rgb * a // 255) + 255 - a
    grey: np.ndarray = np.minimum(laid, 255).astype(np.uint8)
    return grey


def _pil_rgb(image: Any) -> np.ndarray:
    """Any mode of Pillow -> uint8 (h, w, 3), alpha on white."""
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        rgb: np.ndarray = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
        return rgb
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        a = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))
