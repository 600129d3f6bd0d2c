"""The tiles that stand for a map's clusters and classes, cut from the slides: `maps/<name>/gallery/<slide id>/`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mhim.configs.schema import Config
from mhim.pipeline.cohort.identities import Identities
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels.rows import some
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.exchange import imported
from mhim.pipeline.maps import stored
from mhim.pipeline.pictures.layers import save_jpeg
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.stages.draw import placed_on
from mhim.pipeline.store import layout, reading, seals


@dataclass
class Cut(Stage):
    """One slide's tiles, each `<tile>.jpg`. A slide that cannot be read fails alone, in a process of its own."""

    work: layout.Work
    config: Config
    folder: Path  # of the map
    slides: list[SlideEntry]
    wanted: dict[str, list[int]]  # slide -> which of its tiles
    stores: dict[str, Path]
    untrusted = True

    def __post_init__(self) -> None:
        self.name = f"gallery {self.folder.name}"
        self.identities = Identities(self.work.root)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.folder / stored.GALLERY

    def items(self) -> list[Item]:
        made = []
        for slide in self.slides:
            found = seals.look(self.stores[slide.id])
            if found is not None:
                wrong = reading.damage(self.stores[slide.id], found.wrong) if found.wrong else ""
                inputs = {"features": found.fingerprint, "tiles": self.wanted[slide.id]}
                made.append(Item(slide.id, self.root / slide.id, inputs, slide, wrong=wrong))
        return made

    def settings(self) -> dict[str, Any]:
        return {}

    def remake_fields(self) -> frozenset[str]:
        return frozenset({"input.features", "input.tiles"})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        return self.make(item, out, out)

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        store = self.stores[item.key]
        coords = np.asarray(reading.read_array(store, "coords"))
        with placed_on(item.data, store, coords, self.identities, self.config) as (opened, tiles):
            out.mkdir(parents=True)
            for tile in self.wanted[item.key]:
                x, y = coords[tile].tolist()
                save_jpeg(out / f"{tile}.jpg", opened.read_region(x, y, tiles.tile_px, tiles.mpp))
        return Made(numbers={"tiles": len(self.wanted[item.key])})


def cutting(work: layout.Work, config: Config, made: stored.Stored, features: Path) -> tuple[Cut, list[str]]:
    """The gallery of a map, and of which slides no tiles can be cut, and why. features: folder of their stores."""
    wanted: dict[str, list[int]] = {}
    for row in made.rows("prototypes"):
        own = wanted.setdefault(row["slide"], [])
        if int(row["tile"]) not in own:
            own.append(int(row["tile"]))
    stores = {s: p for s, p in layout.feature_stores(features).items() if s in wanted}
    known = {s.id: s for s in read_cohort(work)} if work.cohort.exists() else {}
    file_of = {s: s for s in stores if s in known} | match.files_of((s for s in stores if s not in known), known)
    slides, lacking = [], {"their files are not in cohort.csv": [s for s in sorted(stores) if s not in file_of]}
    for slide in sorted(file_of):
        found = seals.look(stores[slide])
        if why := imported.unplaced(found.attrs) if found else "no features":
            lacking.setdefault(why, []).append(slide)
        else:
            slides.append(replace(known[file_of[slide]], id=slide))
    told = [f"no tiles cut of {len(of)} slides ({some(of)}): {why}" for why, of in lacking.items() if of]
    return Cut(work, config, made.folder, slides, {s: sorted(t) for s, t in wanted.items()}, stores), told
