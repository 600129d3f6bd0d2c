"""Attributes of stores as typed values, where they are used: plain checks and no models, since planning reads 100,000.

In: the attributes of a tile or feature store, and what it is called. Out: the geometry of its tiles, its settings. What
a stranger's store says in another type is one StoreError naming the store and the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhim.extract.units import Mpp, PxL0
from mhim.pipeline.store.layout import StoreError


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a store's tiles lie on their slide.

    slide_mpp: µm per level-0 px, (x, y). size_l0: (w, h) and bounds_l0: (x, y, w, h) of the scanned part, level-0 px.
    tile_l0: (w, h) of a tile in level-0 px. tile_px: its edge as the encoder saw it, px of `mpp` µm."""

    slide_mpp: tuple[Mpp, Mpp]
    size_l0: tuple[int, int]
    bounds_l0: tuple[int, int, int, int]
    tile_l0: tuple[PxL0, PxL0]
    tile_px: int
    mpp: Mpp

    @classmethod
    def of(cls, attrs: Mapping[str, Any], called: str | Path) -> Geometry:
        """Raises StoreError. Without bounds (imported features) the whole slide is taken for scanned."""
        size = w, h = _numbers(attrs, "size_l0", 2, called)
        bounds = _numbers(attrs, "bounds_l0", 4, called) if "bounds_l0" in attrs else (0, 0, w, h)
        return cls(
            slide_mpp=_numbers(attrs, "slide_mpp", 2, called),
            size_l0=size,
            bounds_l0=bounds,
            tile_l0=_numbers(attrs, "tile_l0", 2, called),
            tile_px=int(_number(attrs, "tile_px", called)),
            mpp=Mpp(float(_number(attrs, "mpp", called))),
        )


@dataclass(frozen=True, slots=True)
class MaskPlace:
    """The stored mask of the tissue. px: (w, h). mpp: µm per px of it, (x, y)."""

    px: tuple[int, int]
    mpp: tuple[Mpp, Mpp]

    @classmethod
    def of(cls, attrs: Mapping[str, Any], called: str | Path) -> MaskPlace:
        """Raises StoreError."""
        return cls(_numbers(attrs, "mask_px", 2, called), _numbers(attrs, "mask_mpp", 2, called))


def settings_of(attrs: Mapping[str, Any], called: str | Path) -> dict[str, Any]:
    """The settings that an output was made with, {} where it tells none. Raises StoreError."""
    found = attrs.get("settings", {})
    if not isinstance(found, dict):
        raise _wrong(called, "settings", found, "a mapping")
    return found


def _number(attrs: Mapping[str, Any], key: str, called: str | Path) -> Any:
    value = attrs.get(key)
    if not _is_number(value):
        raise _wrong(called, key, value, "a number")
    return value


def _numbers(attrs: Mapping[str, Any], key: str, n: int, called: str | Path) -> Any:
    value = attrs.get(key)
    if not isinstance(value, (list, tuple)) or len(value) != n or not all(map(_is_number, value)):
        raise _wrong(called, key, value, f"{n} numbers")
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(called: str | Path, key: str, value: object, wanted: str) -> StoreError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return StoreError(
        f"{called} does not hold what this program reads: {key} is {shown}, not {wanted}. Make it again, or copy "
        "it from its source once more"
    )
