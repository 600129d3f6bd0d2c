"""The only code that knows file layouts: where things lie in a work folder, and how they are read and written.

In: arrays and attributes, or a path. Out: Zarr v3 folders that any Zarr reader opens, with large plain chunks that
this module maps into memory without copying. A thing that has its final name is complete; nothing here decides what
must be made. Layout of a work folder:

    cohort.csv                              slide id, path and mpp of every slide seen by `tile`
    tiles/<slide id>.zarr                   coords, tissue ... of one slide          (stage `tile`)
    overlays/<slide id>.jpg                 picture of tissue and tiles
    features/<encoder>/<slide id>.zarr      features, coords                         (stage `extract`)
    runs/<name>/                            one training: config, splits, folds, predictions, metrics, heatmaps
    runs/<id>.jsonl                         what each command did, append-only
    maps/<name>/                            the cohort as a map: tiles, patients, clusters   (stage `map`)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mhim.configs.errors import UserError
from mhim.pipeline.store import seals
from mhim.pipeline.store.owner import machine as machine
from mhim.pipeline.store.owner import owner as owner

FORMAT = 1  # raise when the meaning of a stored array or attribute changes
NUMBERS = 2  # how `metrics.json` counts: 2 takes pairs inside trainings, and decisions by the frozen thresholds
SEAL = seals.SEAL
CARD = "model.json"  # of a trained fold


class StoreError(UserError):
    """A stored thing is missing, damaged or not what was asked for; the message names it."""


class Work:
    """Paths of one work folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def cohort(self) -> Path:
        return self.root / "cohort.csv"

    @property
    def tiles(self) -> Path:
        return self.root / "tiles"

    @property
    def overlays(self) -> Path:
        return self.root / "overlays"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def maps(self) -> Path:
        return self.root / "maps"

    def tile_store(self, slide_id: str) -> Path:
        return self.tiles / f"{slide_id}.zarr"

    def overlay(self, slide_id: str) -> Path:
        return self.overlays / f"{slide_id}.jpg"

    def features(self, encoder: str) -> Path:
        # an encoder's name may hold characters that a file system or shell dislikes ("timm:resnet18")
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in encoder)
        return self.root / "features" / (name if name.strip(".") else "-" * max(1, len(name)))  # ".." is no name

    def feature_store(self, encoder: str, slide_id: str) -> Path:
        return self.features(encoder) / f"{slide_id}.zarr"

    def run(self, name: str) -> Path:
        return self.runs / name


# ---------------------------------------------------------------------------------------------- fingerprints


def fingerprint(fields: dict[str, Any]) -> str:
    """16 hex digits over `fields` (plain JSON values), independent of their order."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def trained(run: Path) -> list[Path]:
    """Folders of all trained folds of a run (or the folder itself, if it is one bundle), in order."""
    if (run / CARD).is_file():
        return [run]
    return sorted(p.parent for p in run.glob(f"*/{CARD}") if not p.parent.name.startswith("."))


def cells(run: Path) -> list[Path]:
    """Folders of the cells of a grid that have trained folds, in order."""
    return sorted({p.parent.parent for p in run.glob(f"grid/*/*/{CARD}")})


def feature_stores(root: Path) -> dict[str, Path]:
    """slide id -> feature store, for every committed store below `root`, packed ones too."""
    found: dict[str, Path] = {}
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith("."))
        here = Path(folder)
        for name in [n for n in names if n.endswith(".zarr")]:
            found[(here / name).relative_to(root).as_posix().removesuffix(".zarr")] = here / name
        names[:] = [n for n in names if not n.endswith(".zarr")]
        for name in [f for f in files if f.endswith(".zarr.zip")]:
            path = here / name.removesuffix(".zip")
            found.setdefault(path.relative_to(root).as_posix().removesuffix(".zarr"), path)
    return dict(sorted(found.items()))
