"""The truth of tiles beside the scores that were held against it, so that it can be looked at: `truth/<slide id>.zarr`.

In: what a file told of a slide (`results/truth.py`). Out: a store per slide, sealed: `share` float32 (n,), of each
tile; `corners` float64 (k, 2), level-0 px, and `ends` int64 (r,), where each ring of what is drawn ends among them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.results.truth import Told
from mhim.pipeline.store import reading, seals, writing

FOLDER = "truth"
_SCORES = "input.scores"


@dataclass(frozen=True)
class Kept:
    """file: name of what told it. fields: what decided it, with the fingerprint of the scores of the same tiles."""

    slide: str
    told: Told
    file: str
    fields: Mapping[str, Any]


def keep(out: Path, every: Sequence[Kept], private: Path) -> None:
    """Put the truth of the slides in place of what lay in `out` before. private: a path for a folder under way, which
    the caller removes."""
    made = private / FOLDER
    made.mkdir(parents=True)
    for one in every:
        store = made / f"{one.slide}.zarr"
        store.parent.mkdir(parents=True, exist_ok=True)
        writer = writing.StoreWriter(store, {"file": one.file})
        writer.write("share", one.told.shares.astype(np.float32))
        rings = one.told.rings
        if rings:
            writer.write("corners", np.concatenate(rings).astype(np.float64))
            writer.write("ends", np.cumsum([len(ring) for ring in rings], dtype=np.int64))
        writing.seal(store, {"stage": FOLDER, **one.fields})
    writing.fsync(made)
    if (out / FOLDER).exists():
        os.rename(out / FOLDER, private / "before")
    if every:
        os.rename(made, out / FOLDER)


def read(out: Path, slide: str, scores: str) -> Kept | None:
    """What is kept of a slide; None where nothing is, or of other scores than those of fingerprint `scores`."""
    path = out / FOLDER / f"{slide}.zarr"
    found = seals.look(path)
    if found is None or found.wrong or found.settings.get(_SCORES) != scores:
        return None
    rings: tuple[np.ndarray, ...] = ()
    if "corners" in reading.array_names(path):
        ends = np.asarray(reading.read_array(path, "ends"))
        rings = tuple(np.split(np.asarray(reading.read_array(path, "corners")), ends[:-1]))
    shares = np.asarray(reading.read_array(path, "share"))
    return Kept(slide, Told(shares, rings), str(found.attrs["file"]), found.settings)
