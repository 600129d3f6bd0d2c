"""`pipeline qupath`: the tissue and tiles of a work folder as GeoJSON that QuPath opens, one file per slide.

In: a work folder with tiles. Out: `qupath/<slide id>.geojson`. Edited there and exported again, a file comes back by
the manifest's column `regions`. Knows layouts and names only; shapes are made by extract.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.resume import console, leftovers
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.store.attributes import Geometry, MaskPlace


def export(work: layout.Work, out: Path | None, tiles: bool = True) -> int:
    """Write every tiled slide's file; 1 if a slide has no tiles yet, or damaged ones. Raises CohortError."""
    from mhim.extract.tiles.geojson import dumps

    folder = out or work.root / "qupath"
    written = 0
    missing: list[str] = []
    damaged: list[str] = []
    leftovers.sweep(folder)
    for slide in read_cohort(work):
        path = work.tile_store(slide.id)
        if reading.stored(path) is None:
            missing.append(slide.id)
            continue
        try:
            features = _features(path, tiles, slide.id)
        except layout.StoreError as error:
            damaged.append(str(error))
            continue
        writing.write_atomic(folder / f"{slide.id}.geojson", dumps(features), folder)
        written += 1
    if not written and not damaged:
        raise CohortError(f"no slide in {work.root} has tiles; run `pipeline tile` first")
    console.out.print(f"{written} files in {folder}: drag one onto its slide in QuPath", markup=False)
    if missing:
        console.out.print(f"not tiled, hence left out: {', '.join(missing)}", markup=False)
    for line in damaged:
        console.out.print(f"left out: {line}", markup=False)
    return 1 if missing or damaged else 0


def _features(path: Path, tiles: bool, slide: str) -> list[dict[str, Any]]:
    """Tissue, and with `tiles` the tiles, of one tile store as GeoJSON features. Raises StoreError."""
    from mhim.extract.tiles.geojson import tile_features, tissue_features
    from mhim.extract.tiles.tiling import ARTEFACTS, unpack_mask

    attrs = reading.read_attrs(path)
    place, stored = Geometry.of(attrs, path), MaskPlace.of(attrs, path)
    per_px = (stored.mpp[0] / place.slide_mpp[0], stored.mpp[1] / place.slide_mpp[1])
    features = tissue_features(unpack_mask(reading.read_array(path, "mask"), stored.px[0]), per_px)
    if tiles:
        numbers = {n: np.asarray(reading.read_array(path, n)) for n in ("tissue", *ARTEFACTS)}
        coords = np.asarray(reading.read_array(path, "coords"))
        features += tile_features(coords, place.tile_l0, numbers, place.bounds_l0[:2], slide, "Tile")
    return features
