"""A map of the cohort, as `pipeline map` leaves it.

In: a map's folder. Out: its tiles as arrays, its other tables as rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mhim.pipeline.maps import stored

_WHOLE = ("tile", "x_l0", "y_l0", "cluster")


@dataclass(frozen=True)
class Map:
    """A map of the cohort, as `Work.map` and `Work.make_map` give it.

    tiles: columns of `tiles.csv`, (N,) each: slide as text; tile (row of the slide's features), x_l0, y_l0 and cluster
    int64; pca_1, pca_2, and where they are there umap_1, umap_2 and attention, float64, NaN where unknown. slides,
    patients, clusters, prototypes: rows of these tables as text, column -> cell."""

    name: str
    folder: Path
    tiles: Mapping[str, npt.NDArray[np.generic]] = field(repr=False)
    slides: list[dict[str, str]] = field(repr=False)
    patients: list[dict[str, str]] = field(repr=False)
    clusters: list[dict[str, str]] = field(repr=False)
    prototypes: list[dict[str, str]] = field(repr=False)


def read(folder: Path) -> Map:
    """Raises StoreError where it is missing or damaged."""
    found = stored.read(folder)
    columns = dict(found.tiles)
    names = np.array([row["slide"] for row in found.slides])
    tiles = {k: names[v] if k == "slide" else v.astype(np.int64) if k in _WHOLE else v for k, v in columns.items()}
    rest = (found.rows(table) for table in ("patients", "clusters", "prototypes"))
    return Map(found.name, folder, tiles, found.slides, *rest)
