"""The only code that knows file layouts: where things lie in a work folder, and how they are read and written.

In: arrays and attributes, or a path. Out: Zarr v3 folders that any Zarr reader opens, with large plain chunks that
this module maps into memory without copying. A thing that has its final name is complete; nothing here decides what
must be made. Layout of a work folder:

    cohort.csv                              slide id, path and mpp of every slide seen by `tile`
    tiles/<slide id>.zarr                   coords, tissue ... of one slide          (stage `tile`)
    overlays/<slide id>.jpg                 picture of tissue and tiles
    features/<encoder>/<slide id>.zarr      features, coords                         (stage `extract`)
    runs/<name>/                            one training: config, splits, folds, predictions, metrics, heatmaps
    runs/<id>.jsonl                         what each command did, append-only
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mhim.pipeline.store import disk, plain_zarr, seals
from mhim.pipeline.store.owner import machine as machine
from mhim.pipeline.store.owner import owner as owner

FORMAT = 1  # raise when the meaning of a stored array or attribute changes
NUMBERS = 2  # how `metrics.json` counts: 2 takes pairs inside trainings, and decisions by the frozen thresholds
SEAL = seals.SEAL


class StoreError(Exception):
    """A stored thing is missing, damaged or not what was asked for; the message names it."""


class Work:
    """Paths of one work folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def cohort(self) -> Path:
        return self.root / "cohort.csv"

    @property
    def tiles(self) -> Path:
        return self.root / "tiles"

    @property
    def overlays(self) -> Path:
        return self.root / "overlays"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def tile_store(self, slide_id: str) -> Path:
        return self.tiles / f"{slide_id}.zarr"

    def overlay(self, slide_id: str) -> Path:
        return self.overlays / f"{slide_id}.jpg"

    def features(self, encoder: str) -> Path:
        # an encoder's name may hold characters that a file system or shell dislikes ("timm:resnet18")
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in encoder)
        return self.root / "features" / (name if name.strip(".") else "-" * max(1, len(name)))  # ".." is no name

    def feature_store(self, encoder: str, slide_id: str) -> Path:
        return self.features(encoder) / f"{slide_id}.zarr"

    def run(self, name: str) -> Path:
        return self.runs / name


# ---------------------------------------------------------------------------------------------- fingerprints


def fingerprint(fields: dict[str, Any]) -> str:
    """16 hex digits over `fields` (plain JSON values), independent of their order."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- reading


def stored(path: Path) -> Path | None:
    """Where the thing of this name lies: the folder, its packed form (`.zip` added), or None if it is missing."""
    if path.is_dir():
        return path
    packed = path.with_name(path.name + ".zip")
    return packed if packed.is_file() else None


def _read_member(path: Path, member: str) -> bytes:
    """One description of a store, packed or not. Raises FileNotFoundError, and ValueError for one that is none by its
    size."""
    try:
        return seals.read_small(path / member)
    except (FileNotFoundError, NotADirectoryError):
        packed = path.with_name(path.name + ".zip")
        if not packed.is_file():
            raise FileNotFoundError(path / member) from None
    with zipfile.ZipFile(packed) as z:
        try:
            return seals.read_packed(z, member)
        except KeyError:
            raise FileNotFoundError(f"{packed}:{member}") from None


def read_attrs(path: Path) -> dict[str, Any]:
    """Attributes of the Zarr group (or the seal of another output) at `path`; 0.2 ms of the processor.

    Raises StoreError when nothing is there or it is damaged: a file that its seal lists is missing, or shorter, say."""
    found = seals.look(path)
    if found is None:
        raise StoreError(f"{path} is missing")
    if found.wrong:
        raise StoreError(damage(path, found.wrong))
    return found.attrs


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run. Raises StoreError naming it when it is damaged, FileNotFoundError when it is not there."""
    try:
        content = json.loads(seals.read_small(path))
        if not isinstance(content, dict):
            raise ValueError("no mapping in it")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise StoreError(damage(path, str(error))) from error
    return content


def check_scored(run: Path) -> None:
    """Raise StoreError if a file of a run's results (predictions, metrics) is not as long as it was written."""
    found = seals.look(run, "score.json")
    if found is not None and found.wrong:
        raise StoreError(damage(run, found.wrong))


def damage(path: Path, wrong: str) -> str:
    """The message for a damaged output: what is wrong with it, and what to do."""
    return (
        f"{path} is damaged: {wrong}. Give the command that made it again, which makes it anew, or copy it from "
        "its source once more"
    )


def read_array(path: Path, name: str) -> np.ndarray:
    """Array `name` of the store at `path`, read-only; plain single chunks are mapped, not read.

    A bag of 12,000 x 1024 float16 thus opens at the speed of a .npy file. Raises StoreError, also for a chunk that is
    missing or of another size."""
    folder = stored(path)
    try:
        meta = json.loads(_read_member(path, f"{name}/zarr.json"))
        shape = tuple(meta["shape"])
        rows_only = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])[1:] == shape[1:]
        plain = [c["name"] for c in meta["codecs"]] == ["bytes"] and np.dtype(meta["data_type"]).isnative
        plain = plain and meta["chunk_key_encoding"]["name"] == "default" and rows_only and bool(shape)
        if plain and folder == path:
            return plain_zarr.read_array(path / name, meta, lambda chunk: _absent(path, f"{name}/{chunk}"))
        _check_listed(path, name)
        import zarr

        if folder == path:
            return np.asarray(zarr.open_array(str(path / name), mode="r")[...])
        with zarr.storage.ZipStore(str(folder), mode="r") as packed:
            return np.asarray(zarr.open_array(packed, path=name, mode="r")[...])
    except FileNotFoundError as error:
        raise StoreError(f"{path} has no array {name!r}" if folder else f"{path} is missing") from error
    except StoreError:
        raise
    except Exception as error:  # whatever a decoder says of bytes that are not those it wrote
        raise StoreError(damage(path, f"array {name!r} cannot be read ({error or type(error).__name__})")) from error


def _absent(path: Path, member: str) -> None:
    """Raise StoreError if the seal lists this chunk: one of zeros alone has no file, and is not listed."""
    found = seals.look(path)
    if found is not None and member in (seals.listed(found.attrs) or {}):
        raise StoreError(damage(path, f"{member} is missing"))


def _check_listed(path: Path, name: str) -> None:
    """Raise StoreError unless the files of array `name` have their sizes: the library reads a lost chunk as zeros."""
    found = seals.look(path)
    if found is None:
        return
    wrong = found.wrong
    if path.is_dir() and (files := seals.listed(found.attrs)) is not None:  # damage of other arrays is not this one's
        wrong = seals.misfit(path, {k: v for k, v in files.items() if k.startswith(f"{name}/")})
    if wrong:
        raise StoreError(damage(path, wrong))


def array_names(path: Path) -> list[str]:
    """Names of the arrays in the store at `path`, sorted."""
    folder = stored(path)
    if folder is None:
        raise StoreError(f"{path} is missing")
    if folder == path:
        return sorted(p.parent.relative_to(path).as_posix() for p in path.rglob("zarr.json") if p.parent != path)
    with zipfile.ZipFile(folder) as z:
        return sorted(n.removesuffix("/zarr.json") for n in z.namelist() if n.endswith("/zarr.json"))


# ---------------------------------------------------------------------------------------------- writing


def even_chunk(n: int, most: int) -> int:
    """Rows per chunk: at most `most`, evened out so that the last chunk is hardly padded (a chunk is stored whole)."""
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


class StoreWriter:
    """A new Zarr v3 group at `path` (which must not exist). Whole chunks only, one writer, deterministic bytes."""

    def __init__(self, path: Path, attrs: dict[str, Any]) -> None:
        self._path = path
        plain_zarr.write_group(path, attrs)

    def create(self, name: str, shape: tuple[int, ...], dtype: str, chunk_rows: int, compress: bool = False) -> Any:
        """An empty array cut along its first axis; fill it in whole chunks."""
        import zarr
        from zarr.codecs import ZstdCodec

        return zarr.open_group(str(self._path), mode="r+").create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(even_chunk(shape[0], chunk_rows), *shape[1:]),
            compressors=(ZstdCodec(level=3),) if compress else None,
            filters=None,
        )

    def write(self, name: str, data: np.ndarray, chunk_rows: int = 16384, compress: bool = False) -> None:
        """A whole array at once."""
        if not compress and data.ndim and plain_zarr.fits(data.dtype):
            plain_zarr.write_array(self._path / name, data, even_chunk(data.shape[0], chunk_rows))
            return
        array = self.create(name, data.shape, str(data.dtype), chunk_rows, compress)
        if data.shape[0]:
            array[...] = data


def seal(out: Path, fields: dict[str, Any], seal_name: str | None = None, **more: Any) -> None:
    """Write the fingerprint and its fields, and the sums of all files, into the finished private folder `out`: into the
    Zarr attributes where there are some, else into `manifest.json` (or `seal_name`)."""
    sum_up(out, seal_name, **more, fingerprint=fingerprint(fields), settings=fields)


def sum_up(out: Path, seal_name: str | None = None, **marks: Any) -> None:
    """Write `marks` and the sums of all files into the seal of the finished private folder `out`."""
    zarr_json = out / "zarr.json"
    if seal_name is None and zarr_json.exists():
        meta = json.loads(zarr_json.read_text())
        attrs = meta["attributes"]
        attrs.update(marks, **{seals.FILES: seals.sums(out, zarr_json.name)})
        attrs[seals.OWN] = seals.own_sum(attrs)
        zarr_json.write_text(json.dumps(meta, indent=2))
    else:
        name = seal_name or SEAL
        marks[seals.FILES] = seals.sums(out, name)
        marks[seals.OWN] = seals.own_sum(marks)
        (out / name).write_text(json.dumps(marks, indent=2) + "\n")


def write_atomic(path: Path, data: bytes | str, private: Path | None = None) -> None:
    """Write a small file so that its name never shows half of it. private: as in `aside`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path, private) as tmp:
        tmp.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def aside(path: Path, private: Path | None = None) -> Iterator[Path]:
    """A private name, flushed and renamed onto `path` if the block succeeds.

    It lies in `private`, an item's private folder that is swept after a kill, or else in the folder of `path`."""
    tmp = (private or path.parent) / f".tmp-{owner()}-{uuid.uuid4().hex[:8]}"
    try:
        with disk.naming(path):
            yield tmp
            fsync(tmp)
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with disk.naming(file):
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def commit(out: Path, final: Path) -> bool:
    """Give the private folder `out` its final name in one rename. False if another was first (`out` is dropped)."""
    final.parent.mkdir(parents=True, exist_ok=True)
    fsync(out)
    try:
        os.rename(out, final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True


def commit_spread(out: Path, folder: Path, seal_name: str) -> None:
    """Move every entry of `out` into the existing `folder`, replacing older ones, the seal last.

    The old seal goes first: while entries are being replaced nothing claims that they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    fsync(out)
    (folder / seal_name).unlink(missing_ok=True)
    for entry in sorted(out.iterdir(), key=lambda p: (p.name == seal_name, p.name)):
        target = folder / entry.name
        if entry.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(entry, target)
    out.rmdir()


def remove_store(path: Path, private: Path | None = None) -> None:
    """Remove an output, and its packed form if both are there.

    A rename first, so that no half of it keeps the final name when the removal is cut short: into the folder `private`,
    which the caller removes, or to a private name beside it."""
    while (found := stored(path)) is not None:
        doomed = (private or found.parent) / f".tmp-{owner()}-{uuid.uuid4().hex[:8]}"
        os.rename(found, doomed)
        if private is None:
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
