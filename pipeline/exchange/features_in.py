"""Features of other programs in: CLAM, TRIDENT, STAMP, AtlasPatch and slide2vec files, plain .pt and .npy folders.

In: a folder (or file) of one of these layouts. Out: stores that `train` takes at once, one per file, with where they
came from (`bridges_out.py` goes the other way). Coordinates become level-0 px. What a file does not say stays unknown
(mpp 0, no tile size): a nominal magnification is no mpp and is never turned into one.

Layouts, told apart by what is in a file, not by its name, as the programs' own sources write them:

- CLAM (extract_features_fp.py): `features` (N, D), `coords` (N, 2) level-0 px, without attributes; those of its
  coordinate files (wsi_core: patch_size at patch_level, downsample) are used where somebody kept them. CLAM pt: a
  tensor (N, D), no coordinates.
- TRIDENT (IO.py `coords_to_h5`, `save_h5`; WSI.py `extract_patch_features`): the same arrays; attributes of `coords`
  are patch_size, patch_size_level0, level0_magnification, target_magnification, overlap, name, savetodir,
  level0_width, level0_height; None is the text "None".
- STAMP (preprocessing/__init__.py; modeling/data.py `get_coords`): `feats` (N, D) float16, `coords` (N, 2) x and y;
  attributes unit "um", tile_size_um (since 2.1; tile_size before), tile_size_px, feat_type "tile". Before version 2
  there is no unit: STAMP then assumes 256 µm in 224 px; here such corners stay in the file's own, unknown unit.
- AtlasPatch (services/storage.py `H5PatchWriter`, utils/feature_h5.py): group `features` with one array per encoder,
  `coords` int32 (N, 5): level-0 x and y, then what was read; attributes of the file are patch_size, patch_size_level0,
  level0_magnification, target_magnification, overlap, level0_width, level0_height, wsi_path ...
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.exchange import hdf5_safe, slide2vec
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import disk, ids, reading, seals, writing
from mhim.pipeline.store import layout as store

SUFFIXES = (".h5", ".hdf5", ".pt", ".npy")
FEATURES = ("features", "feats", "embeddings", "embedding", "feature", "feat")
COORDS = ("coords", "coordinates", "coord")
NO_TILES = "the file holds no tiles"


@dataclass(frozen=True)
class Foreign:
    """One file as read: features (N, D), coords int32 (N, 2) or None; coords, tile_l0 in level-0 px. mpp 0: unknown."""

    layout: str
    features: np.ndarray
    coords: np.ndarray | None
    mpp: float = 0.0
    tile_px: int | None = None
    tile_l0: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------- in


def import_folder(
    source: Path,
    work: store.Work,
    encoder: str,
    slide_mpp: Callable[[str], float | None] | None = None,
    inner: str | None = None,
) -> list[str]:
    """Write each file under `source` as features of `encoder`; returns the slide ids. Same files again change nothing.

    slide_mpp: µm per level-0 px of a slide id where it is known (STAMP's coordinates in µm need it). inner: which
    encoder of AtlasPatch files. Raises CohortError naming the file.
    """
    files = files_in(source)
    if not files:
        raise CohortError(f"{source}: no {', '.join(SUFFIXES)} file in it")
    leftovers.sweep_work(work)
    seen: dict[str, Path] = {}
    for file in files:  # what can be told at once is told before anything is written
        slide = file.stem
        if slide in seen:
            raise CohortError(f"{file} and {seen[slide]} are both named {slide}: import one folder at a time")
        if why := ids.wrong(slide):
            raise CohortError(f"{str(file)!r}: {slide!r} cannot be the name of a slide: {why}; rename the file")
        seen[slide] = file
        if file.suffix.lower() in (".h5", ".hdf5"):
            with _opened(file):
                pass
    width: tuple[int, Path] | None = None
    for slide, file in seen.items():
        found = read(file, slide_mpp(slide) if slide_mpp else None, inner)
        if len(found.features):
            width = width or (found.features.shape[1], file)
            if found.features.shape[1] != width[0]:
                raise CohortError(
                    f"{file} has {found.features.shape[1]} numbers per tile, {width[1]} has {width[0]}: two encoders?"
                )
        _write(found, file, work, encoder, slide)
    return list(seen)


def mpp_of_slides(work: store.Work, names: Iterable[str]) -> dict[str, float]:
    """µm per level-0 px of those slides that were tiled in `work`, by the names of their files of features."""
    if not work.cohort.exists():
        return {}
    found = {}
    for name, slide in match.files_of(names, [s.id for s in read_cohort(work)]).items():
        tiles = work.tile_store(slide)
        mpp = reading.read_attrs(tiles).get("slide_mpp") if reading.stored(tiles) is not None else None
        if mpp:
            found[name] = float(mpp[0])
    return found


def files_in(source: Path) -> list[Path]:
    """The files of features below a folder, each slide once."""
    if source.is_file():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    whole = ("slide_embeddings", "patient_embeddings", "slide_latents")  # slide2vec: one vector for all tiles
    return _without_twins([p for p in files if p.parent.name not in whole])


def _without_twins(files: list[Path]) -> list[Path]:
    """CLAM writes each slide twice, h5 and pt: the pt, which lacks coordinates, is left out then."""
    with_coords = {p.stem for p in files if p.suffix.lower() in (".h5", ".hdf5")}
    return [p for p in files if p.suffix.lower() != ".pt" or p.stem not in with_coords]


def read(file: Path, slide_mpp: float | None = None, inner: str | None = None) -> Foreign:
    """One file of any known layout. Raises CohortError."""
    kind = file.suffix.lower()
    if kind == ".npy":
        try:
            return Foreign("npy", _matrix(np.load(file, allow_pickle=False), file), None)
        except ValueError as error:
            raise CohortError(f"{file}: not a plain array ({error})") from error
    if kind == ".pt":
        return _read_pt(file)
    with _opened(file) as h5:
        return _read_h5(h5, file, slide_mpp, inner)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """An HDF5 file that holds all of its data itself. Raises CohortError."""
    import h5py

    try:
        with h5py.File(file, "r") as h5:
            hdf5_safe.check(h5, file)
            yield h5
    except (OSError, RuntimeError, MemoryError) as error:
        raise CohortError(f"{file}: cannot be read as HDF5 ({error}); copy it again from its source") from error


def _read_pt(file: Path) -> Foreign:
    import pickle

    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CohortError(f"{file}: not a plain tensor file, refused or damaged ({first})") from error
    coords = None
    if isinstance(content, dict):
        picked = [next((content[n] for n in options if n in content), None) for options in (FEATURES, COORDS)]
        if picked[0] is None:
            raise CohortError(
                f"{file}: has {', '.join(map(str, content)) or 'nothing'}; features are expected under "
                f"one of the names {', '.join(FEATURES)}"
            )
        content, coords = picked
    if not isinstance(content, torch.Tensor):
        raise CohortError(f"{file}: holds {type(content).__name__}, not a tensor (tiles, width)")
    half = content.dtype == torch.float16
    features = _matrix((content.detach() if half else content.detach().double()).numpy(), file)
    told = slide2vec.beside(file)
    if told is not None and coords is None:
        xy = _corners(told.coords, len(features), file) if told.coords is not None else None
        return Foreign("slide2vec", features, xy, told.mpp, told.tile_px, told.tile_l0, told.facts)
    xy = None if coords is None else _corners(np.asarray(coords), len(features), file)
    return Foreign("pt", features, xy)


def _read_h5(h5: Any, file: Path, slide_mpp: float | None, inner: str | None) -> Foreign:
    import h5py

    if "feats" in h5:
        return _read_stamp(h5, file, slide_mpp)
    called = next((n for n in FEATURES if n in h5), None)
    if called is None:
        raise CohortError(
            f"{file}: has {', '.join(h5) or 'nothing'}; features are expected under one of the names "
            f"{', '.join(FEATURES)}: rename the array"
        )
    attrs = {**_plain(h5.attrs)}
    placed = next((n for n in COORDS if n in h5), None)
    if placed:
        attrs |= _plain(h5[placed].attrs)
    layout = "trident" if "patch_size_level0" in attrs or "target_magnification" in attrs else "clam"
    array = h5[called]
    if isinstance(array, h5py.Group):
        layout = "atlaspatch"
        names = sorted(array)
        name = inner or (names[0] if len(names) == 1 else None)
        if name not in names:
            raise CohortError(f"{file}: holds features of {', '.join(names)}; say which with --inner NAME")
        attrs["inner"] = name
        array = array[name]
    features = _matrix(array[...], file)
    coords = _corners(h5[placed][...], len(features), file) if placed else None
    size, level0 = _number(attrs.get("patch_size")), _number(attrs.get("patch_size_level0"))
    if level0 is None and size is not None and "patch_level" in attrs:  # CLAM: px of that level
        downsample = attrs.get("downsample")
        downsample = _number(downsample[0] if isinstance(downsample, list) else downsample)
        level0 = None if downsample is None else size * downsample
    return Foreign(layout, features, coords, 0.0, int(size) if size else None, level0, attrs)


def _read_stamp(h5: Any, file: Path, slide_mpp: float | None) -> Foreign:
    attrs = _plain(h5.attrs)
    if attrs.get("feat_type", "tile") != "tile":
        raise CohortError(f"{file}: features of a whole {attrs['feat_type']}, not of tiles")
    features = _matrix(h5["feats"][...], file)
    um, px = _number(attrs.get("tile_size_um")), _number(attrs.get("tile_size_px"))
    if um is None and attrs.get("unit") == "um":
        um = _number(attrs.get("tile_size"))
    tile_mpp = um / px if um and px else 0.0
    coords, tile_l0 = None, None
    if "coords" in h5 and um is None and "unit" not in attrs:
        coords = _corners(h5["coords"][...], len(features), file)
        attrs["coords_frame"] = "unknown: the file tells no unit (STAMP before version 2)"
    elif "coords" in h5:
        if attrs.get("unit", "um") not in ("um", "µm"):
            raise CohortError(f"{file}: its coordinates are in {attrs['unit']!r}; only µm are known")
        scale = slide_mpp or tile_mpp
        if not scale:
            raise CohortError(
                f"{file}: its coordinates are in µm, and nothing tells the µm per px of the slide: pass --slide-mpp"
            )
        coords = _corners(np.asarray(h5["coords"][...], np.float64) / scale, len(features), file)
        tile_l0 = um / scale if um else None
        if slide_mpp is None:
            attrs["coords_frame"] = f"px of {tile_mpp:g} µm: the slide's own µm per px is unknown"
    return Foreign("stamp", features, coords, tile_mpp, int(px) if px else None, tile_l0, attrs)


def _number(value: Any) -> float | None:
    """A positive number, or None for what is missing or says so ("None", -1)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number > 0 else None


def _plain(attrs: Any) -> dict[str, Any]:
    """HDF5 attributes as plain JSON values; what is none is kept as text."""
    out: dict[str, Any] = {}
    for key, value in attrs.items():
        value = value.decode() if isinstance(value, bytes) else value.tolist() if hasattr(value, "tolist") else value
        out[str(key)] = value if isinstance(value, (str, int, float, bool, list)) or value is None else str(value)
    return out


def _flat(array: np.ndarray) -> np.ndarray:
    """Without an axis of one that programs put before the tiles, (1, N, D), or behind them, (N, 1, D)."""
    if array.ndim == 3 and array.shape[0] == 1:
        tiles: np.ndarray = array[0]
        return tiles
    return array[:, 0] if array.ndim == 3 and array.shape[1] == 1 else array


def _matrix(array: np.ndarray, file: Path) -> np.ndarray:
    """(N, D) in float16 or float32, of any numbers; (0, D) without tiles. CohortError for NaN and other shapes."""
    array = _flat(array)
    if array.size == 0:
        return np.zeros((0, array.shape[-1] if array.ndim == 2 and array.shape[-1] else 1), np.float32)
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise CohortError(
            f"{file}: features are {array.dtype} of shape {array.shape}, not numbers (tiles, width): "
            "save them as one such array"
        )
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise CohortError(
            f"{file}: NaN or Inf in the features of tile {row}: extract the slide again"
            + (" in float32 (they overflow float16)" if array.dtype == np.float16 else "")
        )
    largest = float(np.abs(array).max())
    if largest > float(np.finfo(np.float32).max):
        raise CohortError(f"{file}: features as large as {largest:.3g} fit no float32: divide all files by one number")
    return np.ascontiguousarray(array, np.float16 if array.dtype == np.float16 else np.float32)


def _corners(coords: np.ndarray, n: int, file: Path) -> np.ndarray:
    coords = _flat(coords)
    if n == 0 and coords.size == 0:
        return np.zeros((0, 2), np.int32)
    if coords.ndim != 2 or coords.shape[1] < 2 or len(coords) != n:
        raise CohortError(f"{file}: {n} tiles, but coordinates of shape {coords.shape}: one x and y per tile needed")
    if not np.isfinite(coords[:, :2]).all() or np.abs(coords[:, :2]).max() > np.iinfo(np.int32).max:
        raise CohortError(f"{file}: coordinates that are no places on a slide: write level-0 px, or leave them out")
    return np.ascontiguousarray(np.rint(coords[:, :2]), np.int32)


def _write(found: Foreign, file: Path, work: store.Work, encoder: str, slide: str) -> None:
    """Commit one store; one that is there with the same content is left, with another content refused."""
    n, width = found.features.shape
    coords = found.coords
    if coords is None:  # a column of tiles one px apart: `coords_frame` says that it means nothing
        coords = np.stack([np.zeros(n, np.int32), np.arange(n, dtype=np.int32)], axis=1)
    digest = hashlib.sha256(found.features.tobytes() + coords.tobytes()).hexdigest()
    final = work.feature_store(encoder, slide)
    there = seals.look(final)
    if there is not None and not there.wrong:
        if there.fingerprint != digest[:16]:
            raise CohortError(f"{final} holds other features already; import under another --encoder or --work")
        return
    tile_l0 = found.tile_l0 or _spacing(coords)
    attrs: dict[str, Any] = {
        "encoder": encoder, "weights_id": "imported", "dim": width, "mpp": found.mpp, "tile_l0": [tile_l0, tile_l0],
        "fingerprint": digest[:16],
        "imported": {"layout": found.layout, "file": file.name, "sha256": store.sha256(file), **found.facts},
    }  # fmt: skip
    if found.tile_px is not None:
        attrs["tile_px"] = found.tile_px
    if found.tile_l0 is None:
        attrs["tile_l0_source"] = "smallest distance of two corners: the file does not tell the tiles' size"
    if not n:
        attrs["empty"] = NO_TILES
    if found.coords is None:
        attrs["coords_frame"] = "none: the file has no coordinates"
    with leftovers.private(work.features(encoder)) as out, disk.naming(final):
        writer = writing.StoreWriter(out, attrs)
        writer.write("features", found.features)
        writer.write("coords", coords)
        writing.sum_up(out)
        writing.remove_store(final)  # nothing, or a copy that was cut short
        writing.commit(out, final)


def _spacing(coords: np.ndarray) -> float:
    """Smallest distance of two rows or columns of corners; 1 if there is only one of each."""
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    return float(steps.min()) if len(steps) else 1.0
