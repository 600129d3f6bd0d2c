"""The fallback reader: plain images and the TIFFs that OpenSlide leaves out (striped, flat, grey, 16-bit, palette ...).

In: a path. Out: an object with the same face as OpenSlide's (`slide.Source`). TIFFs are decoded strip by strip or tile
by tile, PNG and JPEG as a whole and therefore up to a size only. Knows nothing of mpp: it hands on the TIFF tags.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from extract import UnreadableSlide
from extract.formats import is_plain_image

MAX_WHOLE_PX = 150_000_000  # 450 MB as RGB: what must be decoded in one piece may not be larger
_CACHE_BYTES = 32 << 20
_TO_PYRAMID = "convert it to a tiled pyramidal TIFF first (for example `vips tiffsave IN OUT.tif --tile --pyramid`)"


class FlatImage:
    """One image, one level (or the levels of a TIFF pyramid). Safe to read from several threads."""

    associated: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._tiff: Any = None
        self._pages: list[Any] = []
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
        page = self._pages[level]
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
            self._pages = self._levels()
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError, OSError, TypeError, RuntimeError) as error:
            raise UnreadableSlide(f"{path.name} is a damaged or truncated TIFF: {error}") from error
        first = self._pages[0]
        for page in self._pages:
            self._refuse_what_cannot_be_read(page)
        self.vendor = "tiff"
        self.level_dimensions = tuple((int(p.imagewidth), int(p.imagelength)) for p in self._pages)
        w0, h0 = self.level_dimensions[0]
        self.level_downsamples = tuple((w0 / w + h0 / h) / 2 for w, h in self.level_dimensions)
        self.properties: Mapping[str, str] = _tiff_properties(first)

    def _levels(self) -> list[Any]:
        """The pages of the first image's pyramid; its first page alone where it is no simple pyramid."""
        first = self._tiff.pages[0]
        levels = [level.pages[0] for level in self._tiff.series[0].levels if len(level.pages) == 1]
        sizes = [p.imagewidth for p in levels]
        whole = len(levels) == len(self._tiff.series[0].levels) and sizes == sorted(sizes, reverse=True)
        return levels if whole and levels and levels[0].imagewidth == first.imagewidth else [first]

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

    def _segment(self, level: int, index: int) -> np.ndarray:
        """Strip or tile `index` as RGB, from the cache or decoded now."""
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
            rgb = self._decode(level, index)
            self._cache[level, index] = rgb
            while len(self._cache) > 1 and sum(a.nbytes for a in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
            return rgb

    def _decode(self, level: int, index: int) -> np.ndarray:
        page = self._pages[level]
        per_plane = len(page.dataoffsets) // page.samplesperpixel
        numbers = [index + k * per_plane for k in range(page.samplesperpixel)] if page.planarconfig == 2 else [index]
        planes = []
        for n in numbers:
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
            if segment is None:  # a sparse TIFF leaves blank segments out
                shape = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
                return np.full((*shape, 3), 255, np.uint8)
            planes.append(segment[0])  # (h, w, samples)
        return _tiff_rgb(np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0], page)

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


def _tiff_properties(page: Any) -> dict[str, str]:
    """The tags that the mpp chain reads, named as OpenSlide names them."""
    out = {"tiff.ImageDescription": str(page.description or "")}
    unit = page.tags.get("ResolutionUnit")
    out["tiff.ResolutionUnit"] = {1: "none", 2: "inch", 3: "centimeter"}.get(int(unit.value) if unit else 2, "none")
    for axis in "XY":
        tag = page.tags.get(f"{axis}Resolution")
        if tag is not None and isinstance(tag.value, tuple) and tag.value[1]:
            out[f"tiff.{axis}Resolution"] = repr(tag.value[0] / tag.value[1])
    return out


def _tiff_rgb(samples: np.ndarray, page: Any) -> np.ndarray:
    """(h, w, samples) as decoded -> uint8 (h, w, 3)."""
    photometric = int(page.photometric)
    if photometric == 3 and page.colormap is not None:  # palette, 16 bits a colour
        return np.ascontiguousarray((page.colormap >> 8).astype(np.uint8).T[samples[..., 0]])
    if page.bitspersample < 8:  # 0 .. 2^bits - 1, bilevel included
        samples = (samples.astype(np.uint16) * 255 // (2**page.bitspersample - 1)).astype(np.uint8)
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
    return np.minimum(laid, 255).astype(np.uint8)


def _pil_rgb(image: Any) -> np.ndarray:
    """Any mode of Pillow -> uint8 (h, w, 3), alpha on white."""
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        a = rgba[..., 3:].astype(np.uint16)
        return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))
