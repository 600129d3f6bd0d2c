"""A cohort of tiny feature stores: what `extract` leaves behind, without slides."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mhim.pipeline.cohort.labels.rows import Row
from mhim.pipeline.store import layout, writing

WIDTH = 5


def make_features(
    work: layout.Work,
    patients: int = 12,
    slides_each: int = 1,
    seed: int = 0,
    encoder: str = "texture",
    shift: float = 0.0,
    prefix: str = "",
    **attrs: object,
) -> list[Row]:
    """Features of `patients` patients, odd ones positive in some tiles; the rows of their labels.

    prefix: of the names of slides and patients, so that two cohorts have nobody in common."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(patients):
        for j in range(slides_each):
            n = int(rng.integers(4, 12))
            x = rng.normal(shift, size=(n, WIDTH)).astype(np.float16)
            x[: 1 + n // 3, 0] += 3 * (i % 2)
            slide = f"{prefix}s{i:02d}_{j}.svs"
            facts = {
                "encoder": encoder,
                "weights_id": "w1",
                "mpp": 0.5,
                "tile_px": 256,
                "stain_norm": "none",
                "dim": WIDTH,
                "tile_l0": [256.0, 256.0],
                "fingerprint": f"{seed}-{i}-{j}",
                **attrs,
            }
            writer = writing.StoreWriter(work.feature_store(encoder, slide), facts)
            writer.write("features", x)
            writer.write("coords", (np.stack([np.arange(n) % 4, np.arange(n) // 4], 1) * 256).astype(np.int32))
            rows.append(Row(len(rows) + 2, slide, f"{prefix}p{i:02d}", ("no", "yes")[i % 2]))
    return rows


def write_labels(path: Path, rows: list[Row]) -> Path:
    """The rows as labels.csv."""
    lines = ["slide,patient,label", *(f"{r.slide},{r.patient},{r.label}" for r in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every result file below a folder: its bytes by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sets(*settings: str) -> list[str]:
    """`--set` before each of `section.key=value`, as a command line wants them."""
    return [part for setting in settings for part in ("--set", setting)]
