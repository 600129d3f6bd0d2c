"""Regions drawn in QuPath, in and out: GeoJSON <-> masks and tiles.

In: a GeoJSON file, or a mask and tiles. Out: an edited mask, or GeoJSON that QuPath opens by drag and drop. QuPath
counts px of level 0 from the corner of the scanned bounds: hence `origin_l0`. Knows nothing of how tissue is found.

What a region means is its class: `tissue` replaces the found tissue; `exclude`, `ignore*`, `artefact` and the like are
cut out; every other annotation, classified or not, is a region of interest to which the tissue is confined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from extract import SlideError

TISSUE, EXCLUDE, INCLUDE = "tissue", "exclude", "include"
_EXCLUDING = ("exclude", "ignore", "artifact", "artefact", "background", "pen", "fold", "other")
_SHIFT = 4  # OpenCV's fixed-point polygon corners: 1/16 px
_COLOURS = {"Tissue": [0, 160, 0], "Tile": [30, 60, 200]}


class BadRegions(SlideError):
    """The GeoJSON of a slide cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Region:
    """role: tissue, exclude or include. polygons: rings each, the outer first, float (K, 2), level-0 px, x then y."""

    role: str
    polygons: tuple[tuple[np.ndarray, ...], ...]


def read(path: Path, origin_l0: tuple[int, int] = (0, 0)) -> list[Region]:
    """The areas of a GeoJSON file; points and lines are no areas and are passed over. Raises BadRegions."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadRegions(f"regions file {path.name} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRegions(f"regions file {path.name} is no GeoJSON: {error}") from error
    features = parsed.get("features", [parsed]) if isinstance(parsed, dict) else parsed
    if not isinstance(features, list):
        raise BadRegions(f"regions file {path.name}: `features` is no list")
    out = []
    for number, feature in enumerate(features):
        try:
            geometry = feature.get("geometry", feature)
            polygons = _polygons(geometry, np.asarray(origin_l0, float))
            name = (feature.get("properties") or {}).get("classification") or {}
            name = name.get("name", "") if isinstance(name, dict) else str(name)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadRegions(f"regions file {path.name}: feature {number} is no valid GeoJSON ({error})") from error
        if polygons and (feature.get("properties") or {}).get("objectType", "annotation") == "annotation":
            out.append(Region(_role(name), polygons))
    if not out:
        raise BadRegions(f"regions file {path.name} holds no annotation with an area; export annotations from QuPath")
    return out


def apply(
    mask: np.ndarray, regions: list[Region], bounds_l0: tuple[int, int, int, int], per_px: tuple[float, float]
) -> np.ndarray:
    """Edit `mask`, bool (H, W), whose px (0, 0) lies at the bounds' corner and has `per_px` (x, y) level-0 px."""
    painted = {role: np.zeros(mask.shape, np.uint8) for role in {r.role for r in regions}}
    for region in regions:
        for polygon in region.polygons:
            corners = [(ring - np.array(bounds_l0[:2])) / np.array(per_px) - 0.5 for ring in polygon]
            fixed = [np.rint(c * (1 << _SHIFT)).astype(np.int32) for c in corners]
            one = np.zeros(mask.shape, np.uint8)
            cv2.fillPoly(one, fixed, 1, shift=_SHIFT)  # even-odd: rings within are holes
            painted[region.role] |= one
    out = painted[TISSUE] > 0 if TISSUE in painted else mask.copy()
    if INCLUDE in painted:
        out &= painted[INCLUDE] > 0
    if EXCLUDE in painted:
        out &= painted[EXCLUDE] == 0
    return out


def tissue_features(
    mask: np.ndarray, bounds_l0: tuple[int, int, int, int], per_px: tuple[float, float]
) -> list[dict[str, Any]]:
    """The mask's pieces as annotations of class `Tissue`, one feature per piece, holes kept."""
    # Contours run through px centres; on the mask enlarged twice they run along px edges to a quarter px.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, tree = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    out = []
    for i, outer in enumerate(found):
        if tree[0][i][3] >= 0 or len(outer) < 3:
            continue
        holes = [found[j] for j in range(len(found)) if tree[0][j][3] == i and len(found[j]) >= 3]
        rings = [_ring((c[:, 0, :] + 0.5) / 2, per_px) for c in (outer, *holes)]
        out.append(_feature("annotation", "Tissue", {"type": "Polygon", "coordinates": rings}))
    return out


def tile_features(
    coords_l0: np.ndarray,
    tile_l0: tuple[float, float],
    measurements: Mapping[str, np.ndarray],
    origin_l0: tuple[int, int] = (0, 0),
    classes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Tiles as QuPath tile objects with named numbers. coords_l0: int (N, 2); each measurement: (N,)."""
    out = []
    for i, (x, y) in enumerate((coords_l0 - np.array(origin_l0)).tolist()):
        x1, y1 = x + tile_l0[0], y + tile_l0[1]
        box = [[[x, y], [x1, y], [x1, y1], [x, y1], [x, y]]]
        numbers = {k: float(v[i]) for k, v in measurements.items()}
        name = classes[i] if classes is not None else "Tile"
        out.append(_feature("tile", name, {"type": "Polygon", "coordinates": box}, numbers))
    return out


def dumps(features: list[dict[str, Any]]) -> str:
    """The GeoJSON text of a feature collection."""
    return json.dumps({"type": "FeatureCollection", "features": features}, separators=(",", ":")) + "\n"


def _feature(kind: str, name: str, geometry: dict[str, Any], numbers: dict[str, float] | None = None) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "objectType": kind,
        "classification": {"name": name, "color": _COLOURS.get(name, [120, 120, 120])},
    }
    if numbers:
        properties["measurements"] = numbers
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _ring(points: np.ndarray, per_px: tuple[float, float]) -> list[list[float]]:
    """Closed ring in level-0 px from the bounds' corner, to a hundredth px."""
    at = np.round(points * np.array(per_px), 2).tolist()
    return [*at, at[0]]


def _polygons(geometry: Any, origin: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    kind = geometry["type"]
    if kind == "Polygon":
        raw = [geometry["coordinates"]]
    elif kind == "MultiPolygon":
        raw = geometry["coordinates"]
    elif kind == "GeometryCollection":
        return tuple(p for g in geometry["geometries"] for p in _polygons(g, origin))
    elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        return ()
    else:
        raise ValueError(f"unknown geometry {kind!r}")
    out = []
    for polygon in raw:
        rings = tuple(np.asarray(ring, float)[:, :2] + origin for ring in polygon)
        if any(len(r) < 3 or not np.isfinite(r).all() for r in rings):
            raise ValueError("a ring of fewer than 3 finite corners")
        out.append(rings)
    return tuple(out)


def _role(name: str) -> str:
    low = name.strip().lower()
    if low.startswith(TISSUE):
        return TISSUE
    return EXCLUDE if low.startswith(_EXCLUDING) else INCLUDE
