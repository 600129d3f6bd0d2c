"""One opened slide: its facts, its µm per px, and pixels of any region at a requested mpp.

In: a path. Out: RGB uint8 arrays, alpha laid on white. What OpenSlide does not read goes through `flat.py`.
Knows nothing of tissue, tiles or the cohort.

Frames: `_l0` is px of the full-resolution plane (level 0), x before y; sizes are (w, h), arrays are (h, w, 3).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import openslide

from mhim.configs.schema import TileConfig
from mhim.extract import MissingMpp, UnreadableSlide
from mhim.extract.slide.formats import SUFFIXES, may_be_dicom, suffix
from mhim.extract.slide.mpp import Resolved, resolve
from mhim.extract.slide.source import Source, _OpenSlideSource
from mhim.extract.slide.tiffcheck import missing_bytes, vast_tile
from mhim.extract.units import Mpp

_BLOCK_PX = 1 << 22  # pixels read at once: 16 MiB as RGBA
_MAX_SIDE_L0 = 1 << 22  # the largest scans are 2.5 million px high (whole-slide stacks); more is a damaged header


@dataclass(frozen=True)
class ReadPlan:
    """How a tile is read: `read_px` (w, h) at `level`, then resized by `resize` (output px per read px)."""

    level: int
    read_px: tuple[int, int]
    resize: float

    def __str__(self) -> str:
        w, h = self.read_px
        return f"read level {self.level} at {w} x {h} px, resize by {self.resize:.4g}"


class Slide:
    """An open slide; close it or use it as a context manager. Safe to read from several threads.

    size_l0: (w, h). bounds_l0: (x, y, w, h) of the scanned part. slide_mpp: µm per level-0 px, (x, y).
    quickhash: OpenSlide's digest of the slide, "" where there is none. associated: names of label, macro ... images.
    notes: oddities met while opening.
    """

    def __init__(self, path: Path, source: Source, resolved: Resolved) -> None:
        self.path = path
        self.source = source
        self._resolved = resolved
        self.vendor = source.vendor
        self.properties = source.properties
        self.level_dimensions = source.level_dimensions
        self.level_downsamples = source.level_downsamples
        self.associated = source.associated
        self.size_l0 = source.level_dimensions[0]
        self.bounds_l0 = _bounds(source.properties, self.size_l0)
        self.quickhash = source.properties.get("openslide.quickhash-1", "")
        self.mpp_source = resolved.source
        self.notes = resolved.notes

    @property
    def has_mpp(self) -> bool:
        return self._resolved.mpp is not None

    @property
    def slide_mpp(self) -> tuple[Mpp, Mpp]:
        """µm per px of level 0, (x, y). Raises MissingMpp."""
        if self._resolved.mpp is None:
            why = "; ".join(self.notes) or "no vendor key, resolution tag or OME-XML tells it"
            raise MissingMpp(
                f"{self.path.name} opens, but its µm per pixel is unknown ({why}); write it into the column `mpp` "
                "of the manifest, or pass --mpp-of-slides for all slides"
            )
        x, y = self._resolved.mpp
        return Mpp(x), Mpp(y)

    def plan_read(self, mpp: Mpp, tile_px: int) -> ReadPlan:
        """The coarsest level that is not coarser than `mpp` (to 1 %), and the reduction from there."""
        mx, my = self.slide_mpp
        level = self._level_for(mpp * 1.01)
        scale = self.level_downsamples[level]
        read = (max(1, round(tile_px * mpp / (mx * scale))), max(1, round(tile_px * mpp / (my * scale))))
        return ReadPlan(level, read, tile_px / math.sqrt(read[0] * read[1]))

    def read_region(self, x_l0: int, y_l0: int, size_px: int | tuple[int, int], mpp: Mpp) -> np.ndarray:
        """uint8 (h, w, 3): `size_px` (edge, or (w, h)) pixels of `mpp`, whose top-left corner is (x_l0, y_l0).

        Area-averaged from the level of `plan_read`, from its pixel nearest to that corner on (`corners_on_level`);
        white outside the slide. Raises UnreadableSlide.
        """
        w, h = (size_px, size_px) if isinstance(size_px, int) else size_px
        mx, my = self.slide_mpp
        level = self._level_for(mpp * 1.01)
        scale = self.level_downsamples[level]
        read_w, read_h = max(1, round(w * mpp / (mx * scale))), max(1, round(h * mpp / (my * scale)))
        x, y = (round(v * scale) for v in corners_on_level(np.array((x_l0, y_l0)), scale).tolist())
        return resized(self.source.read(x, y, level, read_w, read_h), (w, h))

    def read_level(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray:
        """uint8 (h, w, 3): `w` x `h` pixels of a level, as they are, whose corner is at level-0 (x_l0, y_l0)."""
        return self.source.read(x_l0, y_l0, level, w, h)

    def image_at(self, mpp: Mpp, max_px: int = 1 << 40) -> tuple[np.ndarray, tuple[Mpp, Mpp]]:
        """The bounds as one low-resolution image, uint8 (h, w, 3), with its true µm per px (x, y).

        The image is an integer reduction of one level, the one nearest to `mpp`, by area average: pixel (0, 0) starts
        at the bounds' corner and no pixel mixes uneven shares. Read in blocks of 16 MiB, whatever the slide's size.
        Coarser than asked for where it would have more than `max_px` pixels.
        """
        mx, my = self.slide_mpp
        x0, y0, w_l0, h_l0 = self.bounds_l0
        level = self._level_for(mpp * 1.2)  # 8.5 µm for 8 µm is welcome: the next finer level has 4 times the pixels
        scale = self.level_downsamples[level]
        kx, ky = max(1, round(mpp / (mx * scale))), max(1, round(mpp / (my * scale)))
        w, h = max(1, int(w_l0 / scale)), max(1, int(h_l0 / scale))  # of the level
        while -(-w // kx) * -(-h // ky) > max_px:
            kx, ky = kx + 1, ky + max(1, round(ky / kx))
        out = np.empty((-(-h // ky), -(-w // kx), 3), np.uint8)
        for x, y, bw, bh in _blocks(w, h, kx, ky):
            rgb = self.source.read(x0 + round(x * scale), y0 + round(y * scale), level, bw, bh)
            out_w, out_h = -(-bw // kx), -(-bh // ky)
            if (kx, ky) != (1, 1):
                if (out_w * kx, out_h * ky) != (bw, bh):  # last block: the few px left count as a whole one
                    rgb = cv2.copyMakeBorder(rgb, 0, out_h * ky - bh, 0, out_w * kx - bw, cv2.BORDER_REPLICATE)
                rgb = cv2.resize(rgb, (out_w, out_h), interpolation=cv2.INTER_AREA)
            out[y // ky : y // ky + out_h, x // kx : x // kx + out_w] = rgb
        return out, (Mpp(mx * scale * kx), Mpp(my * scale * ky))

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _level_for(self, mpp: float) -> int:
        """The coarsest level of at most `mpp`; level 0 if all are coarser."""
        fine = max(self.slide_mpp)
        fitting = [i for i, scale in enumerate(self.level_downsamples) if fine * scale <= mpp]
        return max(fitting, key=lambda i: self.level_downsamples[i], default=0)


def corners_on_level(coords_l0: np.ndarray, scale: float) -> np.ndarray:
    """Level-0 corners -> int64, the nearest whole pixels of a level that is `scale` times coarser.

    The one rule for all that reads tiles: nothing starts between two pixels, where OpenSlide would mix both. (Where a
    level is not a whole number of times coarser, OpenSlide itself can only be asked for the level-0 px nearest to it.)
    """
    return np.rint(np.asarray(coords_l0, np.float64) / scale).astype(np.int64)


def resized(rgb: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """uint8 (h, w, 3) at `size` (w, h), area-averaged where it gets smaller; into `out` if given."""
    h, w = rgb.shape[:2]
    if (w, h) == size and out is None:
        return rgb
    smaller = w >= size[0] and h >= size[1]
    return cv2.resize(rgb, size, dst=out, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def squared(rgb: np.ndarray, mpp: tuple[Mpp, Mpp]) -> tuple[np.ndarray, tuple[Mpp, Mpp]]:
    """A picture, uint8 (h, w, 3), of `mpp` (x, y) and the same with square pixels, as coarse as the coarser axis, with
    its true µm per px. Untouched where its pixels are squares to 1 %."""
    coarse = max(mpp)
    if coarse <= 1.01 * min(mpp):
        return rgb, mpp
    h, w = rgb.shape[:2]
    size = (max(1, round(w * mpp[0] / coarse)), max(1, round(h * mpp[1] / coarse)))
    return resized(rgb, size), (Mpp(mpp[0] * w / size[0]), Mpp(mpp[1] * h / size[1]))


def open_slide(
    path: Path,
    mpp: float | tuple[float, float] | None = None,
    config: TileConfig | None = None,
    require_mpp: bool = True,
    file_tiles: bool = False,
) -> Slide:
    """Open `path`; `mpp` is the manifest's value for it, or the (x, y) that its tiles were laid out with. file_tiles:
    decode the file's own tiles where that gives the same pixels as OpenSlide.

    Raises UnreadableSlide (with the cause), and MissingMpp if nothing tells the mpp, unless `require_mpp` is False.
    """
    path = Path(path)
    source = _open_source(path)
    try:
        for w, h in source.level_dimensions:
            if not (0 < w <= _MAX_SIDE_L0 and 0 < h <= _MAX_SIDE_L0):
                raise UnreadableSlide(f"{path.name}: its header claims {w} x {h} px: the file is damaged")
        if file_tiles:
            from mhim.extract.slide.filetiles import FileTiles

            source = FileTiles(source, path)
        if isinstance(mpp, tuple):
            resolved = Resolved(mpp, "tiles")
        else:
            resolved = resolve(source.properties, config or TileConfig(), mpp)
        slide = Slide(path, source, resolved)
        if require_mpp:
            slide.slide_mpp  # noqa: B018  raises MissingMpp now rather than at the first read
    except Exception:
        source.close()
        raise
    return slide


def _open_source(path: Path) -> Source:
    """The first reader that takes the file; otherwise UnreadableSlide saying what stands in the way."""
    name = path.name
    if path.is_symlink() and not path.exists():
        raise UnreadableSlide(f"{name} is a symbolic link to {os.readlink(path)}, which does not exist")
    if not path.exists():
        raise UnreadableSlide(f"{name}: there is no such file ({path}); if it was moved, tile the folder it is in now")
    if not (path.is_file() or path.is_dir()):
        raise UnreadableSlide(f"{name} is a pipe, a socket or a device, not a file: remove it")
    if not os.access(path, os.R_OK):
        raise UnreadableSlide(f"{name}: no permission to read it")
    if path.is_file() and path.stat().st_size == 0:
        raise UnreadableSlide(f"{name} is empty (0 bytes): copy it again from its source")
    opened = path
    if path.is_dir() or may_be_dicom(path):
        from mhim.extract.slide import (
            dicom,  # where a file may be one: the library takes a quarter of a second to import
        )

        opened = dicom.to_open(path)
    # NDPI keeps 64-bit offsets in 32-bit fields in a way of its own; all other TIFFs can be checked for their end.
    missing = missing_bytes(opened) if suffix(opened) != ".ndpi" else 0
    if missing:
        raise UnreadableSlide(
            f"{name} is truncated: {missing:,} bytes or more are missing at its end; copy it again from its source"
        )
    if (tile := vast_tile(opened)) is not None:
        raise UnreadableSlide(
            f"{name}: its header claims a tile of {tile[0]} x {tile[1]} px, as no scanner writes: the file is damaged"
        )
    return _of_file(opened, name)


def _of_file(path: Path, name: str) -> Source:
    """OpenSlide, this project's own reader for what it leaves out, or both. name: what the user calls the slide."""
    from mhim.extract.slide import channels
    from mhim.extract.slide.flat import FlatImage, with_sub_levels

    try:
        vendor = openslide.OpenSlide.detect_format(str(path))
    except openslide.OpenSlideError as error:
        raise UnreadableSlide(f"{name}: OpenSlide recognises it but cannot open it: {error}") from error
    layout = channels.examine(path, vendor)
    if vendor is None and suffix(path) not in SUFFIXES:
        raise UnreadableSlide(f"{name}: not a format that OpenSlide reads, nor a plain image")
    if vendor is None or layout.join:
        return FlatImage(path, layout.join)
    if vendor == "generic-tiff" and layout.bits > 8:
        flat = FlatImage(path)
        if flat.bits < 16:  # OpenSlide takes the upper eight of 16, which are black where the lower 12 count
            return flat
        flat.close()
    try:
        source = _OpenSlideSource(path)
    except openslide.OpenSlideError as error:
        if "nsupported TIFF" in str(error) and vendor in ("generic-tiff", "aperio"):
            return FlatImage(path)  # a compression that only the library of codecs knows: JPEG 2000, WebP, JPEG XL ...
        hint = "; convert it to OME-TIFF, in QuPath for example" if vendor in ("zeiss", "dicom") else ""
        raise UnreadableSlide(f"{name}: OpenSlide recognises it but cannot open it: {error}{hint}") from error
    channels.of_properties(name, source.properties)
    return with_sub_levels(source, path) if vendor == "generic-tiff" and layout.has_sub_levels else source


def _bounds(properties: Mapping[str, str], size_l0: tuple[int, int]) -> tuple[int, int, int, int]:
    """The scanned part of level 0, (x, y, w, h), from the `openslide.bounds-*` keys; else all of it."""
    try:
        x, y, w, h = (int(properties[f"openslide.bounds-{k}"]) for k in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return (0, 0, *size_l0)
    x, y = max(0, x), max(0, y)
    w, h = min(w, size_l0[0] - x), min(h, size_l0[1] - y)
    return (x, y, w, h) if w > 0 and h > 0 else (0, 0, *size_l0)


def _blocks(w: int, h: int, kx: int, ky: int) -> Iterator[tuple[int, int, int, int]]:
    """(x, y, w, h) blocks of a level, each at most `_BLOCK_PX` and cut at multiples of (kx, ky)."""
    step_x = min(-(-w // kx) * kx, max(1, _BLOCK_PX // (256 * kx)) * kx)
    step_y = max(1, min(-(-h // ky), _BLOCK_PX // (step_x * ky))) * ky
    for y in range(0, h, step_y):
        for x in range(0, w, step_x):
            yield x, y, min(step_x, w - x), min(step_y, h - y)
