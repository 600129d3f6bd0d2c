"""Stored things read: attributes, arrays mapped into memory, JSON of a run; what is damaged is told, never read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from mhim.pipeline.store import plain_zarr, seals
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.store.owner import machine as machine
from mhim.pipeline.store.owner import owner as owner


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
        raise StoreError(damage(path, str(error), inside=True)) from error
    return content


def check_scored(run: Path, only: Collection[str] | None = None) -> None:
    """Raise StoreError if a file of a run's results (predictions, metrics) is not as long as it was written. only: of
    these files."""
    found = seals.look(run, "score.json")
    if found is None:
        return
    files = seals.listed(found.attrs)
    wrong = found.wrong
    if only is not None and files is not None:  # damage of others is not theirs
        wrong = seals.misfit(run, {name: told for name, told in files.items() if name in only})
    if wrong:
        raise StoreError(damage(run, wrong))


def damage(path: Path, wrong: str, inside: bool = False) -> str:
    """The message for a damaged output: what is wrong with it, and what to do. inside: its files may be as long as they
    were written, so that a command which looks at their lengths alone passes over it."""
    first = " (where it says that all was done before, after `pipeline verify --repair`)" if inside else ""
    return (
        f"{path} is damaged: {wrong}. Give the command that made it again{first}, which makes it anew, or copy it from "
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
        why = f"array {name!r} cannot be read ({error or type(error).__name__})"
        raise StoreError(damage(path, why, inside=True)) from error


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
