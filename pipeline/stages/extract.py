"""Tiles to features, as a resumable stage."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhim.configs.schema import Config
from mhim.pipeline.cohort import provenance
from mhim.pipeline.cohort.identities import Identities
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.live import Live, Teller
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import kept_chunks, layout, reading, seals, writing
from mhim.pipeline.store.attributes import Geometry

if TYPE_CHECKING:
    pass


@dataclass
class Extract(Stage):
    """Tiles to features: `features/<encoder>/<slide id>.zarr`. One process feeds the model; reading runs ahead."""

    work: layout.Work
    config: Config
    slides: list[SlideEntry]
    name = "extract"
    untrusted = True

    def __post_init__(self) -> None:
        from mhim.extract.encoders import identity
        from mhim.extract.features import whole_machine
        from mhim.pipeline.stages.encoding import Encoding

        self.identities = Identities(self.work.root)
        self.identity = identity(self.config.extract)
        self.heavy = whole_machine(self.config.extract)
        self.encoding = Encoding(self.config.extract, cores=0 if self.heavy else 1)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.features(self.config.extract.encoder)

    def items(self) -> list[Item]:
        items = []
        for slide in self.slides:
            found = seals.look(self.work.tile_store(slide.id))
            # not tiled: `tile` has told why, and `status` lists it as missing
            if found is not None and (found.wrong or not found.attrs.get("empty")):
                output = self.work.feature_store(self.config.extract.encoder, slide.id)
                wrong = reading.damage(self.work.tile_store(slide.id), found.wrong) if found.wrong else ""
                items.append(Item(slide.id, output, {"tiles": found.fingerprint}, slide, wrong=wrong))
        return items

    def settings(self) -> dict[str, Any]:
        return fingerprints.extract(self.config.extract, self.identity)

    def parts(self) -> list[Stage]:
        """One per GPU of `extract.gpus`: they share the list of slides."""
        gpus = self.config.extract.gpus
        if len(gpus) < 2:
            return []
        one = [self.config.extract.model_copy(update={"gpus": (gpu,)}) for gpu in gpus]
        return [replace(self, config=self.config.model_copy(update={"extract": e})) for e in one]

    def prefetch(self, item: Item) -> None:
        with suppress(Exception):  # only a hint: `make` meets the same and tells it
            self.encoding.ready().prefetch(self._job(item))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.extract.encoders import check_tiles

        config = self.config.extract
        tiles = reading.read_attrs(self.work.tile_store(item.key))
        self.identities.check_same(item.data.path, tiles)
        place = Geometry.of(tiles, self.work.tile_store(item.key))
        mismatch = check_tiles(self.identity, place.tile_px, place.mpp, config.allow_mismatch)
        extractor = self.encoding.ready()
        job = self._job(item)
        rows = writing.even_chunk(len(job.coords_l0), config.chunk_rows)
        writer = writing.StoreWriter(out, self._attrs(item, tiles, mismatch))
        features = writer.create(
            "features",
            (len(job.coords_l0), extractor.encoder.dim),
            config.dtype,
            config.chunk_rows,
            config.compress,
        )
        start = 0
        for first, chunk in kept_chunks.kept(partial):  # that an earlier run left when it was killed
            features[first : first + len(chunk)] = chunk
            start = first + len(chunk)
        told, began = Teller(partial), time.monotonic()
        for first, chunk in self.encoding.encode(job, start):
            features[first : first + len(chunk)] = chunk
            if len(job.coords_l0) > rows:  # a slide of one chunk has nothing worth keeping before its end
                kept_chunks.keep(partial, first, chunk)
                there = first + len(chunk)
                each_s = (time.monotonic() - began) / (there - start)
                told.tell(Live("tile", there, len(job.coords_l0), begun=start, each_s=each_s))
        writer.write("coords", job.coords_l0, config.chunk_rows)
        stats = extractor.stats
        notes = (f"not read directly: {stats.note}",) if stats.note and config.reader == "auto" else ()
        return Made(notes=notes, numbers={"tiles": len(job.coords_l0), **stats.numbers()})

    def close(self) -> None:
        self.encoding.close()

    def _job(self, item: Item) -> Any:
        from mhim.extract import SlideJob

        path = self.work.tile_store(item.key)
        place = Geometry.of(reading.read_attrs(path), path)
        coords = np.asarray(reading.read_array(path, "coords"))
        return SlideJob(item.data.path, coords, place.tile_px, place.mpp, place.slide_mpp)

    def _attrs(self, item: Item, tiles: dict[str, Any], mismatch: str) -> dict[str, Any]:
        """What the features carry: the tiles' own facts, and the encoder's."""
        keep = ("mpp", "mpp_source", "slide_mpp", "tile_px", "tile_l0", "overlap_um", "size_l0", "bounds_l0", "content")
        attrs = {k: tiles[k] for k in keep if k in tiles} | self.encoding.ready().attrs()
        attrs[provenance.TILING] = provenance.tiling_of(tiles, self.work.tile_store(item.key))
        return attrs | ({"mismatch": mismatch} if mismatch else {})
