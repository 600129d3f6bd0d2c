"""What a run says of each tile of a slide, and what is known of them: the layers that the viewer shows.

In: the results of a run in the work folder. Out: layers, where their pictures lie, and the truth that `score --truth`
kept. It opens no slide and knows no HTTP.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mhim.mil.heatmap import Frame
from mhim.mil.tasks import Task
from mhim.pipeline.pictures import layers
from mhim.pipeline.pictures.kinds.kind import Layer
from mhim.pipeline.results import evidence, tile_truth
from mhim.pipeline.results.present import SCORES, Present
from mhim.pipeline.store import reading
from mhim.pipeline.store.attributes import Geometry

LAYER_PX = 2048  # long side of a layer's picture
TRUTH = "truth"  # the layer of what is known of the tiles


def layers_of(present: Present, slide: str, task: Task, logits: slice | None) -> list[Layer]:
    """The layers of a slide: those of the models, the smallest sets of tiles that keep the answer, and the truth. Of
    what was not scored, is damaged, or is of trainings that are there no more, there are none: `Present.look` tells
    why. Raises StoreError.

    logits: of several targets, which columns of the evidence are the target's own."""
    folder, found = present.folder, present.scores(slide)
    if found is None:
        return []
    scores = folder / SCORES / f"{slide}.zarr"
    arrays = {name: np.asarray(reading.read_array(scores, name)) for name in reading.array_names(scores)}
    if logits is not None and "evidence" in arrays:
        arrays["evidence"] = arrays["evidence"][:, logits]
    made = layers.layers(arrays, task, "all")
    sets = evidence.needed(folder, slide, found.fingerprint)
    made += [Layer(name, chosen, share=True, means="1 in the set") for name, chosen in sets.items()]
    kept = tile_truth.read(folder, slide, found.fingerprint)
    if kept is not None:
        means = "of the tile" if kept.file.endswith(".csv") else "share of the tile"  # a table may hold labels
        made.append(Layer(TRUTH, kept.told.shares, share=True, means=means))
    return made


def truth_of(present: Present, slide: str) -> dict[str, Any]:
    """What was drawn as the truth of a slide: the name of its file, "" of none, and rings of corners, level-0 px, x and
    y in turn."""
    found = present.scores(slide)
    kept = tile_truth.read(present.folder, slide, found.fingerprint) if found is not None else None
    rings = [np.rint(ring).astype(int).ravel().tolist() for ring in kept.told.rings] if kept else []
    return {"file": kept.file if kept else "", "rings": rings}


def layer_frame(tiles: Geometry) -> Frame:
    """Where the pictures of a slide's layers lie: from the slide's corner, a whole number of level-0 px per px. It
    divides the tile's edge where such a number is near: tiles are then coloured to their very edge. (Where level 0 has
    oblong pixels that number counts along the finer of its axes: the picture's are squares.)"""
    mpp = tiles.slide_mpp
    sx, sy = (m / min(mpp) for m in mpp)
    w, h = tiles.size_l0
    least = max(1, math.ceil(max(w * sx, h * sy) / LAYER_PX))
    edges = [edge * s for edge, s in zip(tiles.tile_l0, (sx, sy), strict=True)]
    down = next((d for d in range(least, 2 * least + 1) if all(edge % d == 0 for edge in edges)), least)
    size = (math.ceil(w * sx / down), math.ceil(h * sy / down))
    return Frame((0, 0), (down / sx, down / sy), size, down * min(mpp))
