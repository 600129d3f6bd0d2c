"""Our features out, in the files that CLAM, TRIDENT, STAMP, AtlasPatch and slide2vec load (layouts: `bridges.py`).

In: a folder of feature stores. Out: one file (or a few) per slide, named by the slide's id without its suffix, as those
programs name them. Written by a rename each; what is there already is replaced. Numbers are those of the store.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mhim.pipeline.cohort.labels.match import without_suffix
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import layout as store
from mhim.pipeline.store import reading, seals, writing

FORMATS = ("clam", "trident", "stamp", "atlaspatch", "slide2vec")


@dataclass(frozen=True)
class Bag:
    """One slide to write. name: id without suffix and folders. tile_l0, overlap_px: 0 where unknown or none."""

    name: str
    features: np.ndarray  # (N, D) float16 or float32
    coords: np.ndarray  # (N, 2) int32, level-0 px
    encoder: str
    mpp: float
    slide_mpp: float
    tile_px: int
    tile_l0: float
    overlap_px: int
    size_l0: tuple[int, int] | None


def export(
    features: Path, out: Path, layout: str, damaged: list[str] | None = None, empty: list[str] | None = None
) -> Iterator[str]:
    """Write every store under `features` to `out` in the layout of a program; yields the slide ids.

    damaged: filled with one message for each damaged store, which is left out; without it StoreError is raised.
    empty: filled with the ids of slides without tiles, of which no file is written.
    Raises CohortError before anything is written where two slides would be one file, or the layout needs what the
    features do not tell."""
    if layout not in FORMATS:
        raise CohortError(f"--format {layout}: there is {', '.join(FORMATS)}")
    looked = {i: (p, seals.look(p)) for i, p in store.feature_stores(features).items()}
    wrong = [reading.damage(p, found.wrong) for p, found in looked.values() if found is not None and found.wrong]
    if wrong and damaged is None:
        raise store.StoreError(wrong[0])
    (damaged if damaged is not None else []).extend(wrong)
    sound = {i: (p, found.attrs.get("empty")) for i, (p, found) in looked.items() if found and not found.wrong}
    (empty if empty is not None else []).extend(i for i, (_, why) in sound.items() if why)
    stores = {i: p for i, (p, why) in sound.items() if not why}
    if not stores:
        raise CohortError(f"no features in {features}")
    named: dict[str, str] = {}
    for slide, path in stores.items():
        name = without_suffix(PurePosixPath(slide).name)
        other = named.setdefault(name.casefold(), slide)
        if other != slide:
            raise CohortError(
                f"{slide} and {other} would both be written as {name}: export them from work folders of their own"
            )
        attrs = reading.read_attrs(path)
        if layout == "stamp" and not _one(attrs.get("slide_mpp")):
            raise CohortError(
                f"{slide}: STAMP keeps coordinates in µm, and the µm per px of this slide is unknown; "
                "choose another --format, or import the features again where the slides are tiled"
            )
    write: dict[str, Callable[[Bag, Path], None]] = {
        "clam": _clam, "trident": _trident, "stamp": _stamp, "atlaspatch": _atlaspatch, "slide2vec": _slide2vec,
    }  # fmt: skip
    for folder in (out, *(p for p in out.glob("*") if p.is_dir())):
        leftovers.sweep(folder)
    for slide, path in stores.items():
        write[layout](_bag(slide, path), out)
        yield slide


def _one(value: Any) -> float:
    value = value[0] if isinstance(value, (list, tuple)) else value
    return float(value or 0.0)


def _bag(slide: str, path: Path) -> Bag:
    attrs = reading.read_attrs(path)
    coords = np.asarray(reading.read_array(path, "coords"))
    tile_l0, tile_px, mpp = _one(attrs.get("tile_l0")), int(attrs.get("tile_px") or 0), float(attrs.get("mpp") or 0.0)
    if "overlap_um" in attrs and mpp:
        overlap = round(float(attrs["overlap_um"]) / mpp)
    else:  # features of before, or of others: the nearest neighbours tell
        steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
        near = float(steps.min()) if len(steps) else tile_l0
        overlap = round((tile_l0 - near) / tile_l0 * tile_px) if 1.5 < near < tile_l0 - 1.5 else 0
    size = attrs.get("size_l0")
    return Bag(
        without_suffix(PurePosixPath(slide).name),
        np.asarray(reading.read_array(path, "features")),
        coords,
        str(attrs.get("encoder", "")),
        mpp,
        _one(attrs.get("slide_mpp")),
        tile_px,
        tile_l0,
        overlap,
        (int(size[0]), int(size[1])) if size else None,
    )


def _h5(path: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any], on: str = "") -> None:
    """One HDF5 file. on: the array that carries the attributes; empty: the file itself."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with writing.aside(path) as tmp, h5py.File(tmp, "w", track_order=True) as h5:
        for name, array in arrays.items():
            h5.create_dataset(name, data=array)
        (h5[on] if on else h5).attrs.update(attrs)


def _pt(path: Path, array: np.ndarray) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch refuses names that begin with a dot, and hides the reason when a disk is full
    torch.save(torch.from_numpy(np.array(array)), buffer)
    writing.write_atomic(path, buffer.getvalue())


def _clam(bag: Bag, out: Path) -> None:
    """h5_files/NAME.h5 and pt_files/NAME.pt, flat, in float32: CLAM feeds pt_files/{slide_id}.pt to float32 layers."""
    features = bag.features.astype(np.float32)
    _h5(out / "h5_files" / f"{bag.name}.h5", {"features": features, "coords": bag.coords}, {})
    _pt(out / "pt_files" / f"{bag.name}.pt", features)


def _sizes(bag: Bag) -> dict[str, Any]:
    """What is known of the tiles, as TRIDENT and AtlasPatch name it. Magnification: 10 µm/px over mpp, exactly."""
    said: dict[str, Any] = {
        "patch_size": bag.tile_px or None, "patch_size_level0": round(bag.tile_l0) or None, "overlap": bag.overlap_px,
        "target_magnification": 10 / bag.mpp if bag.mpp else None,
        "level0_magnification": 10 / bag.slide_mpp if bag.slide_mpp else None,
    }  # fmt: skip
    if bag.size_l0:
        said["level0_width"], said["level0_height"] = bag.size_l0
    return {k: v for k, v in said.items() if v is not None}


def _trident(bag: Bag, out: Path) -> None:
    """NAME.h5, the sizes as attributes of `coords`. overlap: px of a tile, at its own magnification."""
    arrays = {"features": bag.features, "coords": bag.coords}
    _h5(out / f"{bag.name}.h5", arrays, {"name": bag.name, **_sizes(bag)}, on="coords")


def _stamp(bag: Bag, out: Path) -> None:
    """NAME.h5 with `feats` in float16 where they fit, `coords` in µm, and the tile's size in µm and px."""
    feats = bag.features
    if np.abs(feats.astype(np.float32)).max(initial=0) <= np.finfo(np.float16).max:
        feats = feats.astype(np.float16)
    said = {"unit": "um", "tile_size_um": bag.tile_l0 * bag.slide_mpp, "tile_size_px": bag.tile_px,
            "extractor": bag.encoder, "feat_type": "tile"}  # fmt: skip
    coords = bag.coords.astype(np.float64) * bag.slide_mpp
    _h5(out / f"{bag.name}.h5", {"feats": feats, "coords": coords}, {k: v for k, v in said.items() if v})


def _atlaspatch(bag: Bag, out: Path) -> None:
    """patches/NAME.h5: features/ENCODER and `coords` (N, 5): x, y, the width and height read in level-0 px, level 0."""
    edge = round(bag.tile_l0)
    n = len(bag.coords)
    five = np.concatenate([bag.coords, np.full((n, 2), edge), np.zeros((n, 1))], axis=1).astype(np.int32)
    arrays = {"coords": five, f"features/{bag.encoder or 'features'}": bag.features}
    _h5(out / "patches" / f"{bag.name}.h5", arrays, {**_sizes(bag), "num_patches": n})


def _slide2vec(bag: Bag, out: Path) -> None:
    """tile_embeddings/NAME.pt and NAME.meta.json; tiles/NAME.coordinates.npz and NAME.coordinates.meta.json."""
    n = len(bag.coords)
    sizes = {"requested_tile_size_px": bag.tile_px or None, "requested_spacing_um": bag.mpp or None,
             "tile_size_lv0": round(bag.tile_l0) or None}  # fmt: skip
    half = bag.features.dtype == np.float16
    said = {"sample_id": bag.name, "artifact_type": "tile_embeddings", "encoder_name": bag.encoder,
            "encoder_level": "tile", "feature_dim": bag.features.shape[1], "feature_dtype": "fp16" if half else "fp32",
            "format": "pt", "num_tiles": n, **sizes}  # fmt: skip
    slide = {"base_spacing_um": bag.slide_mpp or None, "dimensions": bag.size_l0}
    how = {"provenance": {"sample_id": bag.name}, "slide": slide, "tiling": {**sizes, "n_tiles": n}}
    _pt(out / "tile_embeddings" / f"{bag.name}.pt", bag.features)
    writing.write_atomic(out / "tile_embeddings" / f"{bag.name}.meta.json", json.dumps(said, indent=1) + "\n")
    placed = out / "tiles" / f"{bag.name}.coordinates.npz"
    placed.parent.mkdir(parents=True, exist_ok=True)
    x, y = bag.coords.astype(np.int64).T
    unknown = np.full(n, np.nan, np.float32)  # features do not carry it
    arrays = {"x": x, "y": y, "tile_index": np.arange(n, dtype=np.int32), "tissue_fractions": unknown}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    writing.write_atomic(placed, buffer.getvalue())
    writing.write_atomic(out / "tiles" / f"{bag.name}.coordinates.meta.json", json.dumps(how, indent=1) + "\n")
