"""A reader's side of a slide: levels and regions in their own pixels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import openslide

from mhim.extract import UnreadableSlide

CACHE_BYTES = 32 << 20  # decoded file tiles kept per process, shared by all its slides


class Source(Protocol):
    """What a reader offers; satisfied by `_OpenSlideSource`, `flat.FlatImage` and `filetiles.FileTiles`."""

    vendor: str
    properties: Mapping[str, str]
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    associated: tuple[str, ...]

    def read(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray: ...

    def close(self) -> None: ...


class _OpenSlideSource:
    """OpenSlide behind the `Source` protocol."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._handle = openslide.OpenSlide(str(path))
        self._handle.set_cache(_cache())
        self.properties: Mapping[str, str] = dict(self._handle.properties)
        self.vendor = self.properties.get("openslide.vendor", "unknown")
        self.level_dimensions = tuple(self._handle.level_dimensions)
        self.level_downsamples = tuple(self._handle.level_downsamples)
        self.associated = tuple(sorted(self._handle.associated_images))

    def read(self, x_l0: int, y_l0: int, level: int, w: int, h: int) -> np.ndarray:
        try:
            rgba = np.asarray(self._handle.read_region((x_l0, y_l0), level, (w, h)))
        except openslide.OpenSlideError as error:
            raise UnreadableSlide(
                f"{self._name} opens, but cannot be decoded at ({x_l0}, {y_l0}) of level {level} ({error}): the "
                "file is damaged or truncated, copy it again from its source"
            ) from error
        return on_white(rgba)

    def close(self) -> None:
        self._handle.close()


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 4), straight alpha -> uint8 (h, w, 3) laid on white."""
    rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return rgb
    a = alpha[..., None].astype(np.uint16)
    return ((rgb * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


@functools.cache
def _cache() -> openslide.OpenSlideCache:
    return openslide.OpenSlideCache(CACHE_BYTES)
