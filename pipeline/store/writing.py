"""Stored things written: aside, flushed, sealed, and given their final name by one rename."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.store import disk, plain_zarr, seals
from mhim.pipeline.store.layout import SEAL, fingerprint
from mhim.pipeline.store.owner import machine as machine
from mhim.pipeline.store.owner import owner as owner
from mhim.pipeline.store.reading import stored


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


def write_if_other(path: Path, text: str) -> None:
    """Write a small text file, unless these are its bytes already. What a damaged one holds need not be text."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)


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

    Files that only the old seal lists go first (of several targets, say, where there is one now): later nobody would
    know that they are of other models. Then the old seal: while entries are being replaced nothing claims that they are
    complete."""
    folder.mkdir(parents=True, exist_ok=True)
    fsync(out)
    old = seals.look(folder, seal_name)
    for name in (seals.listed(old.attrs) or {}) if old else ():
        if not (out / name).exists() and not Path(name).is_absolute() and ".." not in Path(name).parts:
            _remove_file(folder, name)
    (folder / seal_name).unlink(missing_ok=True)
    for entry in sorted(out.iterdir(), key=lambda p: (p.name == seal_name, p.name)):
        target = folder / entry.name
        if entry.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(entry, target)
    out.rmdir()


def _remove_file(folder: Path, name: str) -> None:
    """Remove `folder / name` if it is there, and the folders between that are empty then."""
    (folder / name).unlink(missing_ok=True)
    for parent in Path(name).parents[:-1]:
        try:
            (folder / parent).rmdir()
        except OSError:  # it holds something else, or is not there
            return


def remove_store(path: Path, private: Path | None = None) -> None:
    """Remove an output, and its packed form if both are there.

    A rename first, so that no half of it keeps the final name when the removal is cut short: into the folder `private`,
    which the caller removes, or to a private name beside it."""
    while (found := stored(path)) is not None:
        doomed = (private or found.parent) / f".tmp-{owner()}-{uuid.uuid4().hex[:8]}"
        os.rename(found, doomed)
        if private is None:
            shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
