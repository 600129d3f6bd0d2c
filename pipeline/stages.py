"""The four stages in order: Tile, Extract, Train, Score. Glue only: it hands files to extract and mil, and their
results to the store. The file to read first.

slide -> tissue -> tiles -> features -> bags -> model -> scores
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Config, TileConfig, fingerprint_fields, marked
from pipeline import store
from pipeline.cohort import SlideEntry
from pipeline.stage import Item, Made, Stage


def flat(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Settings named as in the configuration file: `section.field`."""
    return {f"{section}.{k}": v for k, v in fields.items()}


@dataclass
class Tile(Stage):
    """Slides to tiles: `tiles/<slide id>.zarr` and `overlays/<slide id>.jpg`."""

    work: store.Work
    config: Config
    slides: list[SlideEntry]
    name = "tile"

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.tiles

    def items(self) -> list[Item]:
        return [Item(s.id, self.work.tile_store(s.id), self._inputs(s), s) for s in self.slides]

    def settings(self) -> dict[str, Any]:
        fields = fingerprint_fields(self.config.tile)
        fields.pop("overlay")  # a picture beside the output changes none of its bytes
        return flat("tile", fields)

    def remake_fields(self) -> frozenset[str]:
        return frozenset(f"tile.{name}" for name in marked(TileConfig, "later"))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from extract.tiling import tile_slide

        slide: SlideEntry = item.data
        tiles_out = self.work.root / "tile_images" / slide.id if self.config.tile.save_tiles != "none" else None
        tiled = tile_slide(slide.path, self.config.tile, slide.mpp, slide.regions, tiles_out)
        if tiled.overlay is not None:
            store.write_atomic(self.work.overlay(slide.id), _jpeg(tiled.overlay))
        self._write(out, tiled.arrays, tiled.attrs)
        return Made(tiled.empty, tiled.notes, {"tiles": len(tiled.arrays["coords"])})

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        from extract.tiling import refilter

        arrays = {name: store.read_array(old, name) for name in store.array_names(old)}
        attrs = {k: v for k, v in store.read_attrs(old).items() if k not in ("fingerprint", "settings", "empty")}
        filtered = refilter(arrays, attrs, self.config.tile)
        self._write(out, filtered.arrays, filtered.attrs)
        return Made(filtered.empty, filtered.notes, {"tiles": len(filtered.arrays["coords"])})

    def _write(self, out: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any]) -> None:
        writer = store.StoreWriter(out, attrs)
        for name, array in arrays.items():
            writer.write(name, array)

    def _inputs(self, slide: SlideEntry) -> dict[str, Any]:
        try:
            size = slide.path.stat().st_size
        except OSError:
            size = None  # a dangling link or a file that is gone: `make` says so
        inputs: dict[str, Any] = {"bytes": size, "mpp": slide.mpp}
        if slide.regions is not None:
            inputs["regions"] = store.sha256(slide.regions) if slide.regions.is_file() else "missing"
        return inputs


def _jpeg(rgb: np.ndarray) -> bytes:
    import cv2

    ok, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not ok:
        raise store.StoreError("the overlay could not be encoded as JPEG")
    return bytes(data)


@dataclass
class Extract(Stage):
    """Tiles to features: `features/<encoder>/<slide id>.zarr`. One process feeds the model; reading runs ahead in it."""

    work: store.Work
    config: Config
    slides: list[SlideEntry]
    name = "extract"
    heavy = True

    def __post_init__(self) -> None:
        from extract.encoders import identity

        self.identity = identity(self.config.extract)
        self._extractor: Any = None

    @property
    def root(self) -> Path:  # type: ignore[override]
        return self.work.features(self.config.extract.encoder)

    def items(self) -> list[Item]:
        items = []
        for slide in self.slides:
            if store.stored(self.work.tile_store(slide.id)) is None:
                continue  # not tiled: `tile` has told why, and `status` lists it as missing
            attrs = store.read_attrs(self.work.tile_store(slide.id))
            if not attrs.get("empty"):
                output = self.work.feature_store(self.config.extract.encoder, slide.id)
                items.append(Item(slide.id, output, {"tiles": attrs["fingerprint"]}, slide))
        return items

    def settings(self) -> dict[str, Any]:
        return flat("extract", fingerprint_fields(self.config.extract)) | flat("encoder", self.identity)

    def prefetch(self, item: Item) -> None:
        self.extractor.prefetch(self._job(item))

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        from extract.encoders import check_tiles

        config = self.config.extract
        tiles = store.read_attrs(self.work.tile_store(item.key))
        mismatch = check_tiles(self.extractor.encoder, tiles["tile_px"], tiles["mpp"], config)
        job = self._job(item)
        rows = store.even_chunk(len(job.coords_l0), config.chunk_rows)
        writer = store.StoreWriter(out, self._attrs(tiles, mismatch))
        features = writer.create(
            "features", (len(job.coords_l0), self.extractor.encoder.dim), config.dtype, config.chunk_rows, config.compress
        )
        start = 0
        for file in sorted(partial.glob("*.npy")):  # whole chunks that an earlier run left when it was killed
            if file.name != f"{start:012d}.npy":
                break
            chunk = np.load(file, allow_pickle=False)
            features[start : start + len(chunk)] = chunk
            start += len(chunk)
        for first, chunk in self.extractor.encode(job, start, rows):
            features[first : first + len(chunk)] = chunk
            if len(job.coords_l0) > rows:  # a slide of one chunk has nothing worth keeping before its end
                partial.mkdir(parents=True, exist_ok=True)
                with store.aside(partial / f"{first:012d}.npy") as tmp, open(tmp, "wb") as f:
                    np.save(f, chunk, allow_pickle=False)
        writer.write("coords", job.coords_l0, config.chunk_rows)
        return Made(numbers={"tiles": len(job.coords_l0), **self.extractor.stats.numbers()})

    def close(self) -> None:
        if self._extractor is not None:
            self._extractor.close()

    @property
    def extractor(self) -> Any:
        """Built at first use, in the process that uses it."""
        if self._extractor is None:
            from extract.features import Extractor

            self._extractor = Extractor(self.config.extract)
        return self._extractor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_extractor": None}

    def _job(self, item: Item) -> Any:
        from extract import SlideJob

        path = self.work.tile_store(item.key)
        attrs = store.read_attrs(path)
        coords = np.asarray(store.read_array(path, "coords"))
        return SlideJob(item.data.path, coords, attrs["tile_px"], attrs["mpp"], tuple(attrs["slide_mpp"]))

    def _attrs(self, tiles: dict[str, Any], mismatch: str | None) -> dict[str, Any]:
        """What the features carry: the tiles' own facts, and the encoder's."""
        keep = ("mpp", "mpp_source", "slide_mpp", "tile_px", "tile_l0", "size_l0", "bounds_l0")
        attrs = {k: tiles[k] for k in keep if k in tiles} | self.extractor.attrs()
        return attrs | ({"mismatch": mismatch} if mismatch else {})
