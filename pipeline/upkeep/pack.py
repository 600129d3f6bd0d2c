"""Finished stores as one read-only file each, and back: for cohorts whose file count hurts.

In: a work folder. Out: `<store>.zip` beside where the folder was, stored without compression, so that any Zarr reader
opens it; every reader here takes either form. The zip gets its name before the folder goes, and the folder before the
zip goes: killed at any moment, the store is there and the same command goes on. Knows layouts through `store` only.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mhim.pipeline.resume import leftovers
from mhim.pipeline.resume.claims import Claims
from mhim.pipeline.store import disk, ids, layout, reading, seals, writing

_BLOCK = 2**20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date a zip can hold: equal stores give equal files


@dataclass
class Packed:
    """What a command did: stores it changed, those that somebody is making anew, and the files there were and are.
    damaged: one message for each store that was left as it is."""

    stores: int = 0
    busy: int = 0
    files_before: int = 0
    files_after: int = 0
    damaged: list[str] = field(default_factory=list)


def pack(work: layout.Work) -> Packed:
    """Turn every finished tile and feature store into one file. Raises StoreError where there is no work
    folder, OSError when the disk is full or read-only."""
    _there(work)
    result = Packed()
    leftovers.sweep_work(work)
    for root in _roots(work):
        with disk.naming(root), Claims(root / ".claims", 300.0) as claims:
            for folder in list(_stores(root)):
                if claims.take(_key(root, folder)) is not None:
                    result.busy += 1
                    continue
                try:
                    found = seals.look(folder)
                    if found is not None and found.wrong:
                        result.damaged.append(reading.damage(folder, found.wrong))
                        continue
                    files = _pack_one(root, folder)
                except layout.StoreError as error:
                    result.damaged.append(str(error))
                    continue
                finally:
                    claims.release(_key(root, folder))
                result.stores += 1
                result.files_before += files
                result.files_after += 1
            claims.sweep()
        _tidy(root)
    return result


def _there(work: layout.Work) -> None:
    if not work.root.is_dir():
        raise layout.StoreError(f"{work.root} does not exist; say which work folder with --work")


def unpack(work: layout.Work) -> Packed:
    """Turn every packed store back into a folder. Raises as `pack`."""
    _there(work)
    result = Packed()
    leftovers.sweep_work(work)
    for root in _roots(work):
        with disk.naming(root), Claims(root / ".claims", 300.0) as claims:
            for packed in list(_zips(root)):
                folder = packed.with_name(packed.name.removesuffix(".zip"))
                if claims.take(_key(root, folder)) is not None:
                    result.busy += 1
                    continue
                try:
                    files = _unpack_one(root, packed, folder)
                except layout.StoreError as error:
                    result.damaged.append(str(error))
                    continue
                finally:
                    claims.release(_key(root, folder))
                result.stores += 1
                result.files_before += 1
                result.files_after += files
            claims.sweep()
        _tidy(root)
    return result


def _pack_one(root: Path, folder: Path) -> int:
    """Pack one store; returns how many files it was."""
    members = sorted(p for p in folder.rglob("*") if p.is_file())
    packed = folder.with_name(folder.name + ".zip")
    with writing.aside(packed, root) as tmp:
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_STORED) as z:
            for member in members:
                info = zipfile.ZipInfo(member.relative_to(folder).as_posix(), _EPOCH)
                info.external_attr = 0o444 << 16
                with open(member, "rb") as source, z.open(info, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, _BLOCK)
        with zipfile.ZipFile(tmp) as z:
            bad = z.testzip()
            if bad is not None or len(z.namelist()) != len(members):
                raise layout.StoreError(f"{packed} came out damaged at {bad}; {folder} is kept. Is the disk sound?")
        tmp.chmod(0o444)
    _remove(root, folder)
    return len(members)


def _unpack_one(root: Path, packed: Path, folder: Path) -> int:
    """Unpack one store; returns how many files it is. A folder of that name is newer and stays."""
    try:
        with leftovers.private(root) as private, disk.naming(folder), zipfile.ZipFile(packed) as z:
            names = z.namelist()
            if not folder.exists():
                check_members(z, packed)
                z.extractall(private)  # checks each member's sum
                writing.commit(private, folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise layout.StoreError(reading.damage(packed, str(error))) from error
    packed.unlink()
    return len(names)


def check_members(z: zipfile.ZipFile, packed: Path) -> None:
    """Refuse what `pack` does not write: links, names that leave the folder, a name twice, more bytes than there are.

    Raises StoreError naming the member; nothing was written then."""
    seen: set[str] = set()
    room = packed.stat().st_size
    for info in z.infolist():
        name = info.filename
        kind = info.external_attr >> 16
        why = ids.leaves_the_folder(name) or ("it holds a backslash" if "\\" in name else "")
        if stat.S_IFMT(kind) not in (0, stat.S_IFREG) or info.is_dir():
            why = "it is a link, a folder or a device, not a file"
        elif os.path.normpath(name) in seen:
            why = "it is there twice"
        elif info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            why = "it is compressed, and packed stores are not"
        elif info.file_size > room:
            why = "the members hold more bytes than the file has"
        if why:
            raise layout.StoreError(
                f"{packed}: member {name!r} is refused: {why}. It is no store that `pack` made; "
                "delete it and make it again"
            )
        seen.add(os.path.normpath(name))
        room -= info.file_size


def _remove(root: Path, folder: Path) -> None:
    """Remove a folder, renaming it first: half of it never has the final name, and a dead command's rest is swept."""
    with leftovers.private(root) as private:
        os.rename(folder, private)
        shutil.rmtree(private)


def _roots(work: layout.Work) -> Iterator[Path]:
    features = work.root / "features"
    for root in (work.tiles, *(sorted(features.iterdir()) if features.is_dir() else ())):
        if root.is_dir():
            yield root


def _stores(root: Path) -> Iterator[Path]:
    """Finished stores that are folders, sorted; never looks into a store or a private folder."""
    for here, names, _ in os.walk(root):
        found = sorted(n for n in names if n.endswith(".zarr"))
        names[:] = sorted(n for n in names if not n.endswith(".zarr") and not n.startswith("."))
        yield from (Path(here, n) for n in found)


def _zips(root: Path) -> Iterator[Path]:
    for here, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.endswith(".zarr") and not n.startswith("."))
        yield from (Path(here, n) for n in sorted(files) if n.endswith(".zarr.zip"))


def _key(root: Path, folder: Path) -> str:
    """The item's key of a store: the slide id."""
    return folder.relative_to(root).as_posix().removesuffix(".zarr")


def _tidy(root: Path) -> None:
    for name in (".tmp", ".claims"):
        try:
            (root / name).rmdir()
        except OSError:
            continue  # absent, or others are at work
