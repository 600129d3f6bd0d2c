"""What a work folder holds of one slide or one patient: tiles, pixels and features, read when asked for.

In: a work folder and a name. Out: NumPy arrays. Knows no model; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mhim.configs.errors import UserError
from mhim.configs.schema import ExtractConfig
from mhim.pipeline.api.bags import Bag
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort.identities import Identities
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.store import layout, reading
from mhim.pipeline.store.attributes import Geometry

if TYPE_CHECKING:
    import anndata

    from mhim.extract import SlideJob


class MissingPackage(UserError, ImportError):
    """Something that only some need is not installed; the message names the extra that brings it."""


def encoders_of(work: layout.Work) -> list[str]:
    """The folders of features in a work folder, sorted: the encoders' names as they name folders."""
    root = work.root / "features"
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []


@dataclass(frozen=True)
class Slide:
    """One slide of a work folder. id: as `cohort.csv` has it. path: its file, None for features without one."""

    id: str
    path: Path | None
    _work: layout.Work = field(repr=False, compare=False)
    _entry: SlideEntry | None = field(default=None, repr=False, compare=False)

    @property
    def tiled(self) -> bool:
        """Whether its tiles are here; `pipeline status` tells why they are not."""
        return reading.stored(self._work.tile_store(self.id)) is not None

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """What its tiling recorded: mpp and tile_px of its tiles, slide_mpp, size_l0, bounds_l0, tile_l0 ... Raises
        StoreError where it is not tiled."""
        return reading.read_attrs(self._work.tile_store(self.id))

    @property
    def coords(self) -> npt.NDArray[np.int32]:
        """int32 (N, 2): the tiles' top-left corners in level-0 px, x then y, row by row; mapped, read-only."""
        return reading.read_array(self._work.tile_store(self.id), "coords")

    @property
    def encoders(self) -> list[str]:
        """The encoders that it has features of."""
        stored = (e for e in encoders_of(self._work) if reading.stored(self._work.feature_store(e, self.id)))
        return list(stored)

    def features(self, encoder: str | None = None) -> npt.NDArray[np.floating]:
        """float16 or float32 (N, D), one row per tile; mapped from the disk, read-only. encoder: needed where the slide
        has features of several. Raises StoreError."""
        return reading.read_array(self._store(encoder), "features")

    def bag(self, encoder: str | None = None) -> Bag:
        """The features with the place of each tile, as a model receives them."""
        features, coords, tile_l0 = cases.StoredBag((self._store(encoder),))()
        return Bag(features, coords, tile_l0)

    def tile(self, row: int) -> npt.NDArray[np.uint8]:
        """uint8 RGB (tile_px, tile_px, 3): one tile, as in `tiles`. Raises SlideError."""
        pixels: npt.NDArray[np.uint8] = next(self.tiles([row]))[0]
        return pixels

    def tiles(self, rows: Sequence[int] | None = None, batch: int = 64) -> Iterator[npt.NDArray[np.uint8]]:
        """The slide's own pixels of its tiles at their mpp, uint8 RGB (B, tile_px, tile_px, 3), up to `batch` at a
        time, in the order of `coords`, or those of `rows`; without the stain normalisation of `extract.stain_norm`.
        The file is opened in this process. Raises SlideError, and IdentityError for another file than the one that was
        tiled."""
        from mhim.extract.reading.readers import open_reader

        job = self._job()
        chosen = np.arange(len(job.coords_l0)) if rows is None else np.asarray(rows, dtype=np.int64)
        reader = open_reader(job, ExtractConfig())
        try:
            for first in range(0, len(chosen), batch):
                corners = job.coords_l0[chosen[first : first + batch]]
                out = np.empty((len(corners), job.tile_px, job.tile_px, 3), np.uint8)
                reader.fill(corners, out)
                yield out
        finally:
            reader.close()

    def to_anndata(self, encoder: str | None = None) -> anndata.AnnData:
        """The features as AnnData: X float32 (N, D); obs x_l0 and y_l0; obsm["spatial"] the tiles' centres, float64
        (N, 2) level-0 px; uns["mhim"] slide, encoder, mpp, tile_px. Needs the extra `anndata`: MissingPackage."""
        try:
            import anndata
        except ImportError as error:
            raise MissingPackage(
                f"to_anndata needs a package that is not installed ({error.name}): pip install 'mhim-pipeline[anndata]'"
            ) from error
        store = self._store(encoder)
        attrs = reading.read_attrs(store)
        coords = np.asarray(reading.read_array(store, "coords"))
        table = {"x_l0": coords[:, 0], "y_l0": coords[:, 1]}
        made = anndata.AnnData(reading.read_array(store, "features").astype(np.float32), obs=table)
        made.obs_names = [f"{self.id}:{x}:{y}" for x, y in coords.tolist()]
        edge = np.broadcast_to(np.asarray(attrs.get("tile_l0") or 0.0, dtype=np.float64), (2,))
        made.obsm["spatial"] = coords + edge / 2
        facts = {k: v for k, v in cases.facts_of(attrs).items() if k in ("encoder", "weights_id", "mpp", "tile_px")}
        made.uns["mhim"] = {"slide": self.id, "tile_l0": edge.tolist(), **facts}
        return made

    def _store(self, encoder: str | None) -> Path:
        """The feature store that is meant. Raises StoreError listing what there is."""
        there = self.encoders
        if encoder is None and len(there) != 1:
            raise layout.StoreError(
                f"slide {self.id} has features of {', '.join(there)}: name one (encoder=...)"
                if there
                else f"slide {self.id} has no features; run `pipeline extract` first"
            )
        store = self._work.feature_store(encoder or there[0], self.id)
        if reading.stored(store) is None:
            raise layout.StoreError(f"slide {self.id} has no features of {encoder!r}; there is: {', '.join(there)}")
        return store

    def _job(self) -> SlideJob:
        from mhim.extract import SlideJob

        if self._entry is None:
            raise layout.StoreError(f"slide {self.id} is not in {self._work.cohort}: only its features are here")
        tiles = self.attributes
        Identities(self._work.root).check_same(self._entry.path, tiles)
        place = Geometry.of(tiles, self._work.tile_store(self.id))
        return SlideJob(self._entry.path, np.asarray(self.coords), place.tile_px, place.mpp, place.slide_mpp)


@dataclass(frozen=True)
class Patient:
    """A patient of a label table: one bag. label: of a classification; time and event (1 seen, 0 censored) of survival;
    None where nothing is known. of: the patient, where each slide is a bag and `id` is that slide's; else empty."""

    id: str
    slides: tuple[Slide, ...]
    label: str | None
    time: float | None
    event: int | None
    _bag: cases.StoredBag = field(repr=False, compare=False)
    of: str = ""

    def bag(self) -> Bag:
        """All slides as one bag, as a model receives it: several stand below each other, a tile apart."""
        features, coords, tile_l0 = self._bag()
        return Bag(features, coords, tile_l0)
