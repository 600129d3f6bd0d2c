"""Features of other programs and the slide they are of: whether their tiles can be placed on it, and how.

In: the attributes of a feature store, the opened slide. Out: the geometry that pictures need, or why there is none.
What a file of features did not tell is taken from the slide at hand; what both tell must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mhim.extract.units import Mpp, PxL0
from mhim.pipeline.store import layout
from mhim.pipeline.store.attributes import Geometry


def unplaced(attrs: dict[str, Any]) -> str:
    """Why nothing is known of where the tiles lie on the slide; empty where it is known."""
    frame = attrs.get("coords_frame") or attrs.get("imported", {}).get("coords_frame", "")
    if str(frame).startswith("none"):
        return "their features came without coordinates"
    return f"their coordinates are not level-0 px ({frame}): import them again with --slide-mpp" if frame else ""


def is_imported(attrs: dict[str, Any]) -> bool:
    """Whether a store holds features of another program or of a table."""
    return attrs.get("weights_id") == "imported"


def placed(attrs: dict[str, Any], slide: Any, coords: np.ndarray, called: str | Path) -> Geometry:
    """Where the tiles of the store `called` lie, with slide_mpp, size_l0, tile_px and mpp out of the slide where
    features of other programs lack them. coords: int (N, 2), level-0 px. Raises StoreError where the tiles are not
    those of this slide."""
    if attrs.get("slide_mpp"):
        return Geometry.of(attrs, called)
    said = attrs.get("imported", {})
    width, height = slide.size_l0
    for name, is_ in (("level0_width", width), ("level0_height", height)):
        if isinstance(said.get(name), (int, float)) and int(said[name]) != is_:
            raise layout.StoreError(
                f"the features were made of a slide of {said[name]} px ({name}), this one has {is_}"
                ": another slide or another scan of the same name"
            )
    tile_w, tile_h = map(float, attrs["tile_l0"])
    if len(coords) and (coords.min() < 0 or (coords.max(axis=0) >= (width, height)).any()):
        far = coords.max(axis=0).tolist()
        raise layout.StoreError(
            f"tiles lie at {far}, outside of this slide ({width} x {height} px): their "
            "coordinates are not its level-0 px, or it is another slide of the same name"
        )
    mx, my = slide.slide_mpp
    tile_px = int(attrs.get("tile_px") or round(tile_w))
    return Geometry(
        slide_mpp=(Mpp(mx), Mpp(my)),
        size_l0=(width, height),
        bounds_l0=(0, 0, width, height),
        tile_l0=(PxL0(tile_w), PxL0(tile_h)),
        tile_px=tile_px,
        mpp=Mpp(attrs.get("mpp") or tile_w * mx / tile_px),
    )
