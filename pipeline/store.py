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

from pipeline import disk, plain_zarr
from pipeline.owner import machine as machine
from pipeline.owner import owner as owner

FORMAT = 1  # raise when the meaning of a stored array or attribute changes
NUMBERS = 2  # how `metrics.json` counts: 2 takes pairs inside trainings, and decisions by the frozen thresholds
SEAL = "manifest.json"  # carries the fingerprint of outputs that are not Zarr stores


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
    """One file of a store, packed or not. Raises FileNotFoundError."""
    try:
        return (path / member).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        packed = path.with_name(path.name + ".zip")
        if not packed.is_file():
            raise FileNotFoundError(path / member) from None
    with zipfile.ZipFile(packed) as z:
        try:
            return z.read(member)
        except KeyError:
            raise FileNotFoundError(f"{packed}:{member}") from None


def seal_bytes(path: Path, seal: str | None = None) -> bytes | None:
    """The raw JSON text that carries the fingerprint of the output at `path`, or None if there is no such output."""
    # texts and not paths, and one look for a packed form: planning 100,000 new items takes a third of the time
    members = (seal,) if seal else ("zarr.json", SEAL)
    for member in members:
        try:
            with open(f"{path}/{member}", "rb") as f:
                return f.read()
        except (FileNotFoundError, NotADirectoryError):
            continue
    if not os.path.isfile(f"{path}.zip"):
        return None
    for member in members:
        try:
            return _read_member(path, member)
        except FileNotFoundError:
            continue
    return None


def read_attrs(path: Path) -> dict[str, Any]:
    """Attributes of the Zarr group (or the seal of another output) at `path`, in about 50 µs.

    Raises StoreError when nothing is there or it is damaged."""
    raw = seal_bytes(path)
    if raw is None:
        raise StoreError(f"{path} is missing")
    try:
        parsed = json.loads(raw)
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run again") from error
    attrs: dict[str, Any] = parsed.get("attributes", parsed) if "zarr_format" in parsed else parsed
    return attrs


def read_array(path: Path, name: str) -> np.ndarray:
    """Array `name` of the store at `path`, read-only; plain single chunks are mapped, not read.

    A bag of 12,000 x 1024 float16 thus opens at the speed of a .npy file. Raises StoreError.
    """
    try:
        meta = json.loads(_read_member(path, f"{name}/zarr.json"))
    except FileNotFoundError as error:
        raise StoreError(f"{path} has no array {name!r}") from error
    shape = tuple(meta["shape"])
    chunk = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
    plain = [c["name"] for c in meta["codecs"]] == ["bytes"]
    rows_only = chunk[1:] == shape[1:]
    folder = stored(path)
    if plain and rows_only and shape and folder == path and meta["chunk_key_encoding"]["name"] == "default":
        return _read_plain(path / name, shape, chunk, np.dtype(meta["data_type"]), meta["fill_value"])
    import zarr

    assert folder is not None
    if folder == path:
        return np.asarray(zarr.open_array(str(path / name), mode="r")[...])
    with zarr.storage.ZipStore(str(folder), mode="r") as packed:
        return np.asarray(zarr.open_array(packed, path=name, mode="r")[...])


def _read_plain(folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype, fill: Any) -> np.ndarray:
    """Uncompressed row chunks: one is mapped, several are copied into one array. Absent chunks hold the fill value."""
    n = shape[0]
    tail = ("0",) * (len(shape) - 1)

    def mapped(i: int) -> np.ndarray | None:
        file = folder.joinpath("c", str(i), *tail)
        try:
            return np.memmap(file, dtype=dtype, mode="r", shape=chunk)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StoreError(f"{file} is shorter than its metadata says; delete the store and run again") from error

    n_chunks = -(-n // chunk[0])
    if n_chunks == 1:
        one = mapped(0)
        if one is not None:
            return one[:n]
    out = np.full(shape, fill, dtype)
    for i in range(n_chunks):
        part = mapped(i)
        if part is not None:
            rows = min(chunk[0], n - i * chunk[0])
            out[i * chunk[0] : i * chunk[0] + rows] = part[:rows]
    return out


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
    """Write the fingerprint and its fields into the finished private folder `out`: into the Zarr attributes where there
    are some, else into `manifest.json` (or `seal_name`)."""
    marks = {**more, "fingerprint": fingerprint(fields), "settings": fields}
    zarr_json = out / "zarr.json"
    if seal_name is None and zarr_json.exists():
        meta = json.loads(zarr_json.read_text())
        meta["attributes"].update(marks)
        zarr_json.write_text(json.dumps(meta, indent=2))
    else:
        (out / (seal_name or SEAL)).write_text(json.dumps(marks, indent=2) + "\n")


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
