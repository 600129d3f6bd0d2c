"""HDF5 files whose data lies elsewhere are refused: what is imported is what the file itself holds.

In: an open file. Out: nothing, or the name of what points out of it. HDF5 lets a dataset be a link into another file,
raw bytes of any other file (external storage), or a mosaic of other files' datasets (virtual); a received file could
thus turn anything readable on this machine into features. Soft links stay within the file: they are followed only where
no link on their way leaves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mhim.pipeline.cohort.labels.rows import CohortError

MOST = 10_000  # objects of one file; the known layouts have fewer than fifty


def check(h5: Any, file: Path) -> None:
    """Look at every link and dataset of the open file `h5`. Raises CohortError naming what lies outside of it."""
    import h5py

    seen: set[Any] = set()
    waiting: list[tuple[str, Any]] = [("", h5)]
    while waiting:
        path, group = waiting.pop()
        for name in group:
            at = f"{path}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise _outside(file, at, f"is a link into another file ({link.filename})")
            if isinstance(link, h5py.SoftLink):
                continue  # where it leads to is looked at by its own name
            if not isinstance(link, h5py.HardLink):
                raise _outside(file, at, "is a link of a kind of its own")
            thing = group[name]
            if isinstance(thing, h5py.Dataset):
                _of_a_dataset(thing, at, file)
            elif isinstance(thing, h5py.Group):
                address = h5py.h5o.get_info(thing.id)
                if (address.fileno, address.addr) not in seen:
                    seen.add((address.fileno, address.addr))
                    waiting.append((at, thing))
            if len(seen) > MOST:
                raise CohortError(f"{file}: holds more than {MOST} groups; no known program writes features like that")


def _of_a_dataset(dataset: Any, at: str, file: Path) -> None:
    if dataset.external:
        raise _outside(file, at, f"has its bytes in another file ({dataset.external[0][0]}: external storage)")
    if dataset.is_virtual:
        where = ", ".join(sorted({source.file_name for source in dataset.virtual_sources()})[:3])
        raise _outside(file, at, f"is made up of other datasets ({where}: a virtual dataset)")
    if dataset.size and dataset.shape and not dataset.id.get_storage_size():
        raise CohortError(f"{file}: {at} has a shape ({dataset.shape}) and no data: it was never written")


def _outside(file: Path, at: str, why: str) -> CohortError:
    return CohortError(f"{file}: {at} {why}; only files that hold their own data are taken. Copy it in first")
