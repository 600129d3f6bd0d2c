"""Which tiles a map is of: equally many of each slide, drawn by a seed, read slide by slide.

In: a folder of feature stores. Out: a `Sample`. A slide whose store is damaged is left out with the reason, and changes
no other slide's tiles. One store is open at a time: 1,000 slides of 10,000 tiles cost the memory of the sample.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.store.layout import StoreError


@dataclass(frozen=True)
class Sample:
    """n tiles of the `slides`. tiles: how many each slide has in all. marks: fingerprint of each slide's features.
    slide: int32 (n,), place in `slides`. row: int32 (n,), which of the slide's tiles. coords: int32 (n, 2), corner in
    level-0 px. features: (n, D) as stored. facts: what all features share. left_out: slide -> why."""

    slides: tuple[str, ...]
    tiles: tuple[int, ...]
    marks: tuple[str, ...]
    slide: np.ndarray
    row: np.ndarray
    coords: np.ndarray
    features: np.ndarray
    facts: dict[str, Any]
    left_out: dict[str, str]

    @property
    def digest(self) -> str:
        """Hash of which slides, with which features: 16 hex digits. A slide that is left out is not among them."""
        return hashlib.sha256(json.dumps([self.slides, self.marks]).encode()).hexdigest()[:16]


def rows_of(slide: str, n: int, most: int, seed: int) -> np.ndarray:
    """Which `most` of a slide's n tiles, in order: by the seed and the slide's name alone."""
    if n <= most:
        return np.arange(n)
    drawn = np.random.default_rng([seed, zlib.crc32(slide.encode())])
    return np.sort(drawn.choice(n, most, replace=False))


def draw(folder: Path, most: int, seed: int) -> Sample:
    """At most `most` tiles of the stores below `folder`; of more slides than that, one tile of as many, by the seed.

    Raises CohortError where nothing can be drawn, or features of two encoders lie there."""
    stores = layout.feature_stores(folder)
    if not stores:
        raise CohortError(f"no features in {folder}; run `pipeline extract` first (or name their --encoder)")
    looked = {i: seals.look(path) for i, path in stores.items()}
    left_out = {
        i: reading.damage(stores[i], found.wrong if found else "it is missing")
        for i, found in looked.items()
        if found is None or found.wrong
    }
    usable = [i for i, found in looked.items() if i not in left_out and found and not found.attrs.get("empty")]
    if len(usable) > most:
        usable = [usable[k] for k in rows_of("", len(usable), most, seed).tolist()]
    each = max(1, most // max(1, len(usable)))
    facts: dict[str, Any] = {}
    first = ""
    kept: list[tuple[str, str, int, np.ndarray, np.ndarray, np.ndarray]] = []
    for slide in usable:
        found = looked[slide]
        assert found is not None
        try:
            rows, coords, features, n = _read(stores[slide], slide, each, seed)
        except StoreError as error:
            left_out[slide] = str(error)
            continue
        mine = cases.facts_of(found.attrs)
        facts, first = (mine, slide) if not kept else (facts, first)
        differ = sorted(k for k in facts.keys() | mine.keys() if facts.get(k) != mine.get(k))
        if differ or (kept and features.shape[1] != kept[0][5].shape[1]):
            raise CohortError(
                f"features of {slide} and {first} differ in {', '.join(differ) or 'their width'}: a map is of one "
                "encoder"
            )
        kept.append((slide, found.fingerprint, n, rows, coords, features))
    if sum(len(k[3]) for k in kept) < 3:
        why = next(iter(left_out.values()), "the slides have no tiles")
        raise CohortError(f"no tiles in {folder} that a map could be made of: {why}")
    kept = [k for k in kept if len(k[3])]
    return Sample(
        tuple(k[0] for k in kept),
        tuple(k[2] for k in kept),
        tuple(k[1] for k in kept),
        np.repeat(np.arange(len(kept), dtype=np.int32), [len(k[3]) for k in kept]),
        np.concatenate([k[3] for k in kept]).astype(np.int32),
        np.concatenate([k[4] for k in kept]),
        np.concatenate([k[5] for k in kept]),
        facts,
        dict(sorted(left_out.items())),
    )


def _read(path: Path, slide: str, most: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(rows, their corners, their features, how many tiles the slide has). Raises StoreError."""
    features = reading.read_array(path, "features")
    coords = reading.read_array(path, "coords")
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise StoreError(reading.damage(path, f"features {features.shape} and coords {coords.shape} do not fit"))
    rows = rows_of(slide, len(features), most, seed)
    some = np.array(features[rows])
    if not np.isfinite(some).all():
        raise StoreError(f"{path}: features that are no finite numbers; extract this slide again")
    return rows, np.array(coords[rows], dtype=np.int32), some, len(features)
