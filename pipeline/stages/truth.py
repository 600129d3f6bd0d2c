"""Maps of scored slides held against the truth of their tiles, where a folder tells it (`score --truth`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mhim.configs.schema import Config
from mhim.extract import SlideError
from mhim.pipeline.cohort.labels.rows import CohortError, some
from mhim.pipeline.cohort.patients import StoredBag
from mhim.pipeline.pictures.layers import layers
from mhim.pipeline.results import tile_truth, truth
from mhim.pipeline.results.present import Present
from mhim.pipeline.resume import leftovers
from mhim.pipeline.resume.console import escape
from mhim.pipeline.store import layout, reading
from mhim.pipeline.training import bundle

SHOWN = 3  # notes on how files were read; a folder of one program's files has the same for each


def demand(folder: Path) -> None:
    """Raise CohortError, before any work, where there is no such folder."""
    if not folder.is_dir():
        raise CohortError(
            f"--truth {folder} is no folder: it holds a file <slide id>.geojson (regions) or <slide id>.csv (tiles) "
            "for each slide whose truth is known"
        )


def held_against(config: Config, scored: Any, folder: Path, out: Console) -> int:
    """Measure the maps of a scored stage on the slides of which `folder` tells, write `truth.json` and show it. Returns
    1 where a slide's truth could not be used. Raises CohortError where no file is called as a slide is."""
    task = bundle.card_of(next(iter(scored.models.values()))[0]).task.value
    known, failed, without, read_as, kept = [], {}, [], list[str](), list[tile_truth.Kept]()
    present = Present(scored.out)
    for patient in scored.data.patients:
        for slide, store in zip(patient.slides, patient.stores, strict=True):
            scores = scored.out / "scores" / f"{slide}.zarr"
            found = present.scores(slide)
            if patient.id not in scored.models or found is None:
                continue  # not scored, which its stage has told
            try:
                path = truth.file_of(folder, slide)
                if path is None:
                    without.append(slide)
                    continue
                arrays = {name: np.asarray(reading.read_array(scores, name)) for name in reading.array_names(scores)}
                attrs = reading.read_attrs(store)
                told = truth.of_tiles(path, arrays["coords"], attrs, config.tile.regions_frame)
                made_of = {"input.scores": found.fingerprint, "input.truth": layout.sha256(path)}
                frame = {"tile.regions_frame": config.tile.regions_frame}
                kept.append(tile_truth.Kept(slide, told, path.name, {**made_of, **frame}))
                bag_tiles = sum(StoredBag(patient.stores).rows())
            except (truth.BadTruth, SlideError, layout.StoreError) as error:
                failed[slide] = str(error)
                continue
            maps = {layer.name: layer.scores for layer in layers(arrays, task, "all")}
            read_as += [f"truth of {slide}: {note}" for note in told.notes]
            grid = truth.grid_of(arrays["coords"], attrs)
            training = ";".join(str(f.relative_to(f.parents[1])) for f in scored.models[patient.id])
            known.append(truth.Known(slide, told.true, maps, grid, training, bag_tiles))
    if not known and not failed:
        like = f" (like {without[0]}.geojson)" if without else ""
        raise CohortError(f"no file in {folder} is called as a slide is{like}")
    every = (slide for patient in scored.data.patients for slide in patient.slides)
    other = truth.of_no_slide(folder, every) if without else []  # else none of them was meant for a slide of the run
    if other:
        out.print(escape(f"truth not used, called as no slide of {scored.out.name}: {some(other)}"))
    more = [f"and {len(read_as) - SHOWN} more such notes"] if len(read_as) > SHOWN else []
    for line in (*read_as[:SHOWN], *more):
        out.print(escape(line))
    with leftovers.private(scored.out) as private:
        tile_truth.keep(scored.out, kept, private)
    _show(scored.out.name, truth.write(scored.out, known, len(without), failed), without, out)
    return 1 if failed else 0


def _show(name: str, found: dict[str, Any], without: list[str], out: Console) -> None:
    for slide, why in found["failed"].items():
        out.print(escape(f"truth of {slide} not used: {why}"))
    told = f"truth of {found['slides']} slides, {found['with_findings']} with findings"
    told += f"; none of {len(without)} ({some(without)})" if without else ""
    out.print(escape(told))
    table = Table(title=f"{name}: do the maps point at the truth?")
    for column in truth.COLUMNS:
        table.add_column(column, justify="left" if column == "map" else "right")
    for row in truth.rows(found):
        table.add_row(*map(escape, row))
    out.print(table)
