"""Slides to tiles, as a resumable stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mhim.configs.schema import Config, TileConfig, marked
from mhim.pipeline.cohort.identities import Identities, inputs_of
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.resume.stage import Item, Made, Stage
from mhim.pipeline.store import layout, reading, writing

if TYPE_CHECKING:
    pass


@dataclass
class Tile(Stage):
    """Slides to tiles: `tiles/<slide id>.zarr` and `overlays/<slide id>.jpg`."""

    work: layout.Work
    config: Config
    slides: list[SlideEntry]
    name = "tile"
    untrusted = True

    def __post_init__(self) -> None:
        self.identities = Identities(self.work.root)

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.tiles

    def items(self) -> list[Item]:
        frame = self.config.tile.regions_frame
        return [Item(s.id, self.work.tile_store(s.id), inputs_of(s, frame), s) for s in self.slides]

    def settings(self) -> dict[str, Any]:
        return self._settings

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Asked for by every slide, looked up once."""
        return fingerprints.tile(self.config.tile)

    def beside(self, item: Item) -> dict[str, Path]:
        found = {"overlay": self.work.overlay(item.key), "images": self._images(item.data)}
        return {name: path for name, path in found.items() if path is not None}

    def remake_fields(self) -> frozenset[str]:
        return frozenset(f"tile.{name}" for name in marked(TileConfig, "later"))

    def fields(self, item: Item) -> dict[str, Any]:
        """With the slide's content, which is read here and not in `items`: most new slides are never planned twice."""
        return super().fields(item) | {"input.content": self.identities.of(item.data.path)}

    def unrecorded(self) -> frozenset[str]:
        return frozenset({"input.content"})

    def lacks(self, item: Item) -> bool:
        """The picture of a slide that was tiled without one."""
        wanted = self.config.tile.overlay and not self.work.overlay(item.key).is_file()
        return wanted and item.data.path.is_file()

    def make_beside(self, item: Item, private: Path) -> None:
        from mhim.extract.tiles.overlay import jpeg
        from mhim.extract.tiles.tiling import drawn_again

        arrays = {name: reading.read_array(item.output, name) for name in ("mask", "coords")}
        attrs = reading.read_attrs(item.output)
        picture = drawn_again(item.data.path, self.config.tile, item.data.mpp, arrays, attrs)
        writing.write_atomic(self.work.overlay(item.key), jpeg(picture), private)

    def expect(self, items: list[Item]) -> None:
        self.identities.expect(item.data.path for item in items)

    def meaning(self, field: str) -> str:
        return "another file has taken the place of the slide that was tiled" if field == "input.content" else ""

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from mhim.extract import UnreadableSlide
        from mhim.extract.tiles.overlay import jpeg
        from mhim.extract.tiles.tiling import tile_slide

        slide: SlideEntry = item.data
        if slide.problem:
            raise UnreadableSlide(slide.problem)
        with self.identities.unchanged(slide.path) as content:
            images = out.parent / "images" if self.config.tile.save_tiles != "none" else None
            tiled = tile_slide(slide.path, self.config.tile, slide.mpp, slide.regions, images, out.parent / "drawing")
        tiled.attrs["content"] = content
        if tiled.overlay is not None:
            (out.parent / "overlay").write_bytes(jpeg(tiled.overlay))
        self._write(out, tiled.arrays, tiled.attrs)
        return Made(tiled.empty, (tiled.reads, *tiled.notes), {"tiles": len(tiled.arrays["coords"])})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        from mhim.extract.tiles.tiling import refilter, saved_again

        arrays = {name: reading.read_array(old, name) for name in reading.array_names(old)}
        attrs = {k: v for k, v in reading.read_attrs(old).items() if k not in ("fingerprint", "settings", "empty")}
        filtered = refilter(arrays, attrs, self.config.tile)
        slide: SlideEntry = item.data
        if (images := self._images(slide)) is not None:
            saved_again(
                slide.path, self.config.tile, slide.mpp, filtered.arrays["coords"], images, out.parent / "images"
            )
        self._write(out, filtered.arrays, filtered.attrs)
        return Made(filtered.empty, filtered.notes, {"tiles": len(filtered.arrays["coords"])})

    def _images(self, slide: SlideEntry) -> Path | None:
        return self.work.root / "tile_images" / slide.id if self.config.tile.save_tiles != "none" else None

    def _write(self, out: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any]) -> None:
        writer = writing.StoreWriter(out, attrs)
        for name, array in arrays.items():
            writer.write(name, array)
