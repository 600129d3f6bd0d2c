"""The one writer of GeoJSON: tissue, tiles and drawn regions as QuPath opens them by drag and drop.

In: a mask, tiles with numbers, or drawn polygons. Out: features, and the text of their collection. QuPath counts px of
level 0 from the corner of the scanned bounds, so everything that is written does: hence `origin_l0`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from mhim.extract.tiles.region_files import FRAME_KEY

_COLOURS = {"Tissue": [0, 160, 0], "Tile": [30, 60, 200], "Exclude": [200, 40, 40]}


def tissue_features(mask: np.ndarray, per_px: tuple[float, float], class_name: str = "Tissue") -> list[dict[str, Any]]:
    """The pieces of `mask`, bool (H, W), whose px (0, 0) lies at the bounds' corner and has `per_px` (x, y) level-0 px,
    as annotations of a class: one feature per piece, holes kept."""
    # Contours run through px centres; on the mask enlarged twice they run along px edges to a quarter px.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    out = []
    for i, outer in enumerate(found):
        if tree[0][i][3] >= 0 or len(outer) < 3:
            continue
        holes = [found[j] for j in range(len(found)) if tree[0][j][3] == i and len(found[j]) >= 3]
        rings = [_ring((c[:, 0, :] + 0.5) / 2, per_px) for c in (outer, *holes)]
        out.append(_feature("annotation", {"type": "Polygon", "coordinates": rings}, class_name))
    return out


def tile_features(
    coords_l0: np.ndarray,
    tile_l0: tuple[float, float],
    measurements: Mapping[str, np.ndarray],
    origin_l0: tuple[int, int],
    slide: str,
    class_name: str | None = None,
) -> list[dict[str, Any]]:
    """Tiles as QuPath tile objects with named numbers.

    coords_l0: int (N, 2), corners of the tiles; each measurement: (N,). origin_l0: corner of the scanned bounds. slide:
    its id, from which the objects' ids are made, the same in every file."""
    out = []
    origin = np.asarray(origin_l0)
    for i, (x_l0, y_l0) in enumerate(coords_l0.tolist()):
        x, y = (coords_l0[i] - origin).tolist()
        x1, y1 = x + tile_l0[0], y + tile_l0[1]
        box = [[[x, y], [x1, y], [x1, y1], [x, y1], [x, y]]]
        feature = _feature("tile", {"type": "Polygon", "coordinates": box}, class_name)
        feature["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide}/{x_l0}/{y_l0}"))
        feature["properties"]["name"] = f"tile {i}"
        feature["properties"]["measurements"] = {k: float(v[i]) for k, v in measurements.items()}
        out.append(feature)
    return out


def region_features(
    drawn: Sequence[tuple[str, Sequence[np.ndarray]]], origin_l0: tuple[int, int]
) -> list[dict[str, Any]]:
    """Drawn regions as annotations that `regions.read` reads again: (class or "", rings each float (K, 2) in level-0 px
    of the whole slide, the outer ring first). origin_l0: corner of the scanned bounds."""
    shift = -np.asarray(origin_l0, dtype=np.float64)
    out = []
    for name, rings in drawn:
        coordinates = [_ring(np.asarray(ring, np.float64) + shift, (1.0, 1.0)) for ring in rings]
        out.append(_feature("annotation", {"type": "Polygon", "coordinates": coordinates}, name or None))
    return out


def dumps(features: list[dict[str, Any]], say_frame: bool = False) -> str:
    """The GeoJSON text of a feature collection. say_frame: it says that it counts from the bounds, so that it is read
    so whatever `tile.regions_frame` says of other files."""
    said = {FRAME_KEY: "bounds"} if say_frame else {}
    return json.dumps({"type": "FeatureCollection", **said, "features": features}, separators=(",", ":")) + "\n"


def _feature(kind: str, geometry: dict[str, Any], class_name: str | None) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if class_name:
        properties["classification"] = {"name": class_name, "color": _COLOURS.get(class_name, [120, 120, 120])}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _ring(points: np.ndarray, per_px: tuple[float, float]) -> list[list[float]]:
    """Closed ring in level-0 px from the bounds' corner, to a hundredth px."""
    at = np.round(points * np.array(per_px), 2).tolist()
    return [*at, at[0]]
