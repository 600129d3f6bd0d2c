"""What slide2vec writes beside a slide's tile embeddings: where the tiles are and how large.

In: the path of `tile_embeddings/<id>.pt`. Out: corners and sizes, or None where the file is not slide2vec's. Plain
JSON and NumPy files; no object in them is ever loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.cohort.labels.rows import CohortError


@dataclass(frozen=True)
class Told:
    """coords: level-0 px (N, 2), or None without a file of them. mpp: µm per tile px, 0 if unknown. tile_l0: tile edge,
    level-0 px."""

    coords: np.ndarray | None
    mpp: float
    tile_px: int | None
    tile_l0: float | None
    facts: dict[str, Any]


def beside(embeddings: Path) -> Told | None:
    """Raises CohortError where the files that belong to these embeddings cannot be read."""
    folder, name = embeddings.parent, embeddings.stem
    meta = folder / f"{name}.meta.json"
    if folder.name != "tile_embeddings" and folder.parent.name != "tile_embeddings" and not meta.is_file():
        return None
    facts: dict[str, Any] = {}
    root = folder.parent if folder.name == "tile_embeddings" else folder.parent.parent
    tiles = root / "tiles" if folder.name == "tile_embeddings" else root / "tiles" / folder.name
    placed, how = tiles / f"{name}.coordinates.npz", tiles / f"{name}.coordinates.meta.json"
    try:
        said = json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {}
        more = json.loads(how.read_text(encoding="utf-8")) if how.is_file() else {}
        coords = None
        if placed.is_file():
            with np.load(placed, allow_pickle=False) as arrays:
                coords = np.stack([arrays["x"], arrays["y"]], axis=1)
    except (OSError, ValueError, KeyError) as error:
        raise CohortError(
            f"{embeddings}: what slide2vec wrote beside it cannot be read ({error}); copy the whole output folder again"
        ) from error
    tiling = {**more.get("tiling", {}), **said}
    for key in ("encoder_name", "requested_spacing_um", "requested_tile_size_px", "tile_size_lv0"):
        if isinstance(tiling.get(key), (str, int, float)):
            facts[key] = tiling[key]
    base = more.get("slide", {}).get("base_spacing_um")
    if isinstance(base, (int, float)):
        facts["base_spacing_um"] = base
    px, lv0 = tiling.get("requested_tile_size_px"), tiling.get("tile_size_lv0")
    return Told(
        coords,
        float(tiling.get("requested_spacing_um") or 0.0),
        int(px) if px else None,
        float(lv0) if lv0 else None,
        facts,
    )
