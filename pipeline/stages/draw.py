"""Tile scores to pictures, as a resumable stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import Config
from mhim.mil.tasks import Task
from mhim.pipeline.cohort.identities import Identities
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels.rows import some
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.exchange import imported
from mhim.pipeline.pictures.layers import (
    contact_sheet,
    file_name,
    geojson,
    layers,
    low_resolution,
    overlay,
    save_jpeg,
    save_png,
    write_tiff,
)
from mhim.pipeline.results import picture_colours
from mhim.pipeline.results.present import Present
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.store.attributes import Geometry
from mhim.pipeline.training import bundle

FOLDER = "heatmaps"
PICTURES = ("heatmaps", "heatmap_scale", "top_tiles", "geojson", "tiff", "palette")


def drawing(session_work: layout.Work, config: Config, scored: Any) -> tuple[Draw, list[str]]:
    """The pictures of a scored stage, and of which slides there are none, and why. Features that were brought in find
    their slide by its name, as labels do."""
    known = {s.id: s for s in read_cohort(session_work)} if session_work.cohort.exists() else {}
    stores = {s: p for patient in scored.data.patients for s, p in zip(patient.slides, patient.stores, strict=True)}
    folders = next(iter(scored.models.values()))
    task = bundle.card_of(folders[0]).task.value
    file_of = {s: s for s in stores if s in known} | match.files_of((s for s in stores if s not in known), known)
    slides, lacking = [], {"their files are not in cohort.csv": [s for s in sorted(stores) if s not in file_of]}
    for slide in sorted(file_of):
        why = imported.unplaced(found.attrs) if (found := seals.look(stores[slide])) else "no features"
        if why:
            lacking.setdefault(why, []).append(slide)
        else:
            slides.append(replace(known[file_of[slide]], id=slide))
    told = [f"no pictures of {len(of)} slides ({some(of)}): {why}" for why, of in lacking.items() if of]
    return Draw(session_work, config, scored.out, slides, stores, task), told


def coloured(config: Config, pictures: Path) -> Config:
    """The settings with the palette that `auto` stands for in the folder `pictures`."""
    palette = picture_colours.resolved(config.score.palette, pictures)
    return config.model_copy(update={"score": config.score.model_copy(update={"palette": palette})})


@dataclass
class Draw(Stage):
    """Tile scores to pictures: `heatmaps/<slide id>/`. Changed picture settings draw again without asking."""

    work: layout.Work
    config: Config
    out: Path  # folder with scores/
    slides: list[SlideEntry]
    stores: dict[str, Path]  # slide id -> feature store, whose attributes tell the tiles' geometry
    task: Task
    untrusted = True

    def __post_init__(self) -> None:
        self.name = f"draw {self.out.name}"
        self.config = coloured(self.config, self.root)
        self.identities = Identities(self.work.root)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.out / FOLDER

    def items(self) -> list[Item]:
        made = []
        present = Present(self.out)
        for slide in self.slides:
            scores = self.out / "scores" / f"{slide.id}.zarr"
            found = seals.look(scores)
            if found is not None and (found.wrong or not present.of_others(found)):
                wrong = reading.damage(scores, found.wrong) if found.wrong else ""
                made.append(Item(slide.id, self.root / slide.id, {"scores": found.fingerprint}, slide, wrong=wrong))
        limit = self.config.score.heatmap_limit
        return made[:limit] if limit else made

    def settings(self) -> dict[str, Any]:
        dumped = self.config.score.model_dump(mode="json")
        usual = dumped["palette"] == picture_colours.UNRECORDED  # pictures from before the choice are still themselves
        return {f"score.{k}": dumped[k] for k in PICTURES if not (k == "palette" and usual)}

    def remake_fields(self) -> frozenset[str]:
        return frozenset({*(f"score.{k}" for k in PICTURES), "input.scores"})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        return self.make(item, out, out)

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        scores = self.out / "scores" / f"{item.key}.zarr"
        arrays = {name: np.asarray(reading.read_array(scores, name)) for name in reading.array_names(scores)}
        config = self.config.score
        wanted = layers(arrays, self.task, config.heatmaps)
        every = layers(arrays, self.task, "all")
        store = self.stores[item.key]
        with placed_on(item.data, store, arrays["coords"], self.identities, self.config) as (opened, tiles):
            out.mkdir(parents=True)
            if wanted:
                picture, frame = low_resolution(opened)
            for layer in wanted:
                drawn = overlay(picture, frame, layer, arrays, tiles, config, item.key)
                save_png(out / f"{file_name(layer.name)}.png", drawn)
            if config.tiff and every:
                write_tiff(out / "heatmap.tif", every[0], arrays, tiles, config)
            if config.geojson:
                (out / "tiles.geojson").write_text(geojson(every, arrays["coords"], tiles, item.key))
            if config.top_tiles:
                sheet = contact_sheet(opened, every[-1], arrays["coords"], tiles, config.top_tiles)
                save_jpeg(out / "tiles.jpg", sheet)
        missing = (
            ""
            if "evidence" in arrays or config.heatmaps in ("none", "attention")
            else ("this model tells no class evidence: only its attention is drawn")
        )
        return Made(notes=(missing,) if missing else ())


@contextmanager
def placed_on(
    slide: SlideEntry, store: Path, coords: np.ndarray, identities: Identities, config: Config
) -> Iterator[tuple[Any, Geometry]]:
    """The opened slide, found to be the one that was tiled, and where the tiles of the features in `store` lie on
    it."""
    from mhim.extract.slide.slide import open_slide

    attrs = reading.read_attrs(store)
    identities.check_same(slide.path, attrs)
    told = attrs.get("slide_mpp")
    mpp = (float(told[0]), float(told[1])) if told else slide.mpp
    with open_slide(slide.path, mpp, config.tile, file_tiles=True) as opened:
        yield opened, imported.placed(attrs, opened, coords, store)


def picture(
    work: layout.Work,
    config: Config,
    slide: str,
    store: Path,
    arrays: dict[str, np.ndarray],
    task: Task,
    layer: str,
    out: Path,
) -> np.ndarray:
    """One layer on one slide as `Draw` draws it, uint8 (h, w, 3). store: of its features; arrays: its scores; out:
    folder of the results, whose saved pictures it is to look like. Raises StoreError for a layer that the model has
    not, or a slide whose tiles have no place."""
    every = {found.name: found for found in layers(arrays, task, "all")}
    if layer not in every:
        raise layout.StoreError(f"no layer {layer!r} of slide {slide}; there is: {', '.join(every)}")
    known = {s.id: s for s in read_cohort(work)} if work.cohort.exists() else {}
    entry = known.get(slide) or known.get(match.files_of([slide], known).get(slide, ""))
    attrs = reading.read_attrs(store)
    why = imported.unplaced(attrs) if entry else f"its file is not in {work.cohort}"
    if entry is None or why:
        raise layout.StoreError(f"no picture of {slide}: {why}")
    with placed_on(entry, store, arrays["coords"], Identities(work.root), config) as (opened, tiles):
        below, frame = low_resolution(opened)
        score = coloured(config, out / FOLDER).score
        return overlay(below, frame, every[layer], arrays, tiles, score, slide)
