"""A map as files: `maps/<name>/` with its tables and its card, written in one go and read again.

In: the parts of a map. Out: `tiles.csv`, `slides.csv`, `patients.csv`, `clusters.csv`, `prototypes.csv`, `map.json`;
and `Stored`, what is read of them. Numbers of places are written with six digits. Knows no page and no picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.store import reading, seals, tables
from mhim.pipeline.store.layout import StoreError, Work

CARD = "map.json"
GALLERY = "gallery"  # folder of the tiles that are cut, beside the tables
TABLES = ("tiles", "slides", "patients", "clusters", "prototypes")
AXES = {"pca": ("pca_1", "pca_2"), "umap": ("umap_1", "umap_2")}


def short(value: float) -> float | None:
    """Six digits of a number; None of one that is not known."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records of features are of one encoder, and of the same in all that both tell (µm per px, tile size,
    weights). one, other: as of `Sample.facts`."""
    return one.get("encoder") == other.get("encoder") and all(one[k] == other[k] for k in one.keys() & other.keys())


def write(out: Path, card: dict[str, Any], parts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write a map into the new folder `out`. parts: rows of each of TABLES."""
    out.mkdir(parents=True)
    for name in TABLES:
        (out / f"{name}.csv").write_text(tables.of_mappings(parts[name]), encoding="utf-8")
    (out / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """A map that was made. fingerprint: of its seal."""

    name: str
    folder: Path
    fingerprint: str
    card: dict[str, Any]

    def rows(self, table: str) -> list[dict[str, str]]:
        """A table of TABLES as text."""
        return tables.read(self.folder / f"{table}.csv")

    @cached_property
    def slides(self) -> list[dict[str, str]]:
        return self.rows("slides")

    @cached_property
    def tiles(self) -> dict[str, np.ndarray]:
        """Columns of `tiles.csv`: slide int (n,), place in `slides`; the others float64 (n,), NaN where empty."""
        place = {row["slide"]: k for k, row in enumerate(self.slides)}
        rows = self.rows("tiles")
        names = list(rows[0]) if rows else []
        found = {"slide": np.array([place[r["slide"]] for r in rows], np.int64)}
        for name in names[1:]:
            found[name] = np.array([float(r[name]) if r[name] else np.nan for r in rows])
        return found


def read(folder: Path) -> Stored:
    """Raises StoreError where it is missing or damaged."""
    found = seals.look(folder)
    if found is None:
        raise StoreError(f"{folder} is missing; `pipeline map` makes it")
    if found.wrong:
        raise StoreError(reading.damage(folder, found.wrong))
    return Stored(folder.name, folder, found.fingerprint, reading.read_json(folder / CARD))


def names(work: Work) -> list[str]:
    """The maps of a work folder, sorted."""
    root = work.maps
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []
