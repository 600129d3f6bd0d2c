"""Regions that people draw on a slide in the viewer, as GeoJSON files of the work folder: `regions/<slide id>.geojson`.

In: what the page sends, and a work folder. Out: files that `pipeline tile --regions` takes and QuPath opens, written by
the one writer (`extract/tiles/geojson.py`) and read by the one reader. Nothing that the page sends becomes part of a
path. Regions count in px of level 0, from its corner.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mhim.extract.tiles import geojson
from mhim.extract.tiles.region_files import read_shapes
from mhim.extract.tiles.regions import counted_from
from mhim.pipeline.store import layout, writing

FOLDER = "regions"
MAX_BYTES = 8 << 20  # of what the page may send
_MAX_NAME = 80  # characters of a class
_MAX_REGIONS = 5000


class BadDrawing(ValueError):
    """What the page sent is no list of regions; the message says why."""


def file_of(work: layout.Work, slide: str) -> Path:
    """Where the regions of a slide lie. Raises BadDrawing if that is not within the work folder: a link in a stranger's
    folder must lead no write elsewhere."""
    path = work.root / FOLDER / f"{slide}.geojson"
    if not path.resolve().is_relative_to(work.root.resolve()):
        raise BadDrawing(f"{path} leads out of the work folder; nothing is written there")
    return path


def read(path: Path, origin_l0: tuple[int, int], frame: str = "auto") -> list[dict[str, Any]]:
    """The regions of a file as the page has them: {"name": class or "", "rings": [[[x, y], ...], ...]}, one for each
    polygon. origin_l0: corner of the scanned bounds. frame: `tile.regions_frame`. Raises BadRegions."""
    shapes, own = read_shapes(path)
    shift = np.asarray(counted_from(own, frame, origin_l0)[1], float)
    return [
        {"name": shape.names[0] if shape.names else "", "rings": [(ring + shift).tolist() for ring in polygon]}
        for shape in shapes
        for polygon in shape.polygons
    ]


def text(sent: Any, origin_l0: tuple[int, int], size_l0: tuple[int, int]) -> str:
    """GeoJSON of what the page sent, `{"regions": [...]}` as `read` gives them, clipped to the slide; "" where no
    region is left. Raises BadDrawing."""
    regions = [_checked(k, one, size_l0) for k, one in enumerate(_list(sent))]
    return geojson.dumps(geojson.region_features(regions, origin_l0), say_frame=True) if regions else ""


def save(work: layout.Work, slide: str, written: str) -> Path | None:
    """Keep the GeoJSON of a slide; None where there is none: then the file is gone too. Raises BadDrawing, and OSError
    where the folder cannot be written."""
    path = file_of(work, slide)
    if not written:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path = file_of(work, slide)  # again, now that its folder is there
    writing.write_atomic(path, written)
    return path


def _list(sent: Any) -> list[Any]:
    regions = sent.get("regions") if isinstance(sent, dict) else None
    if not isinstance(regions, list):
        raise BadDrawing("`regions` is no list")
    if len(regions) > _MAX_REGIONS:
        raise BadDrawing(f"{len(regions)} regions; at most {_MAX_REGIONS} are kept")
    return regions


def _checked(k: int, one: Any, size_l0: tuple[int, int]) -> tuple[str, list[np.ndarray]]:
    """(class, rings) of a region, clipped to the slide: each ring of three or more finite corners."""
    name = one.get("name", "") if isinstance(one, dict) else None
    rings = one.get("rings") if isinstance(one, dict) else None
    if not isinstance(name, str) or len(name) > _MAX_NAME or not name.isprintable():
        raise BadDrawing(f"region {k}: its class is no text of at most {_MAX_NAME} characters")
    if not isinstance(rings, list) or not rings:
        raise BadDrawing(f"region {k} has no ring")
    checked = []
    for ring in rings:
        whole = isinstance(ring, list) and len(ring) >= 3 and all(isinstance(p, list) and len(p) == 2 for p in ring)
        if not whole or not all(_is_number(v) for p in ring for v in p):
            raise BadDrawing(f"region {k}: a ring needs three or more corners [x, y]")
        corners = np.asarray(ring, np.float64)
        if (corners[0] == corners[-1]).all() and len(corners) > 3:
            corners = corners[:-1]  # the writer closes it
        checked.append(np.clip(corners, 0, np.asarray(size_l0, np.float64)))
    return name.strip(), checked


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
