"""What killed commands leave behind, and how the next command removes it. One rule: the owner is in the name.

Everything that is not finished lies directly in the folder of a verb's outputs (a root: `tiles`, `features/<encoder>`,
`runs/<name>` ...), as `.tmp-<machine>-<pid>-<8 hex digits>` or as `.tmp/<machine>-<pid>-<8 hex digits>`. Whose process
lives keeps it; whose process is dead loses it; of another machine's process nothing is known but the age of what it
left, and a living one writes within its lease. Checkpoints (`.partial`) are no leftovers: the same command goes on
there.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhim.pipeline.resume.claims import Claims, owner_alive
from mhim.pipeline.store import layout
from mhim.pipeline.store.owner import owner

PREFIX = ".tmp-"
FOREIGN_S = 86400.0  # what another machine's process has not touched for so long is left over


@contextmanager
def private(root: Path) -> Iterator[Path]:
    """A path directly in `root` for a folder or file under way; what lies there when the block ends is removed."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{PREFIX}{owner()}-{uuid.uuid4().hex[:8]}"
    try:
        yield path
    finally:
        _remove(path)


def sweep(root: Path, lease_s: float = 300.0) -> None:
    """Remove what dead owners left directly in `root`. Others may be at work there, or sweep it too, meanwhile."""
    for path in (*_entries(root, PREFIX), *_entries(root / ".tmp", "")):
        alive = owner_alive(path.name.removeprefix(PREFIX).rsplit("-", 1)[0])
        if alive is None:
            with suppress(FileNotFoundError):
                alive = time.time() - path.stat().st_mtime <= max(FOREIGN_S, 10 * lease_s)
        if alive is False:
            _remove(path)
    claims = root / ".claims"
    if claims.is_dir():
        with suppress(OSError):  # a folder that cannot be written is told when the first item is claimed
            Claims(claims, lease_s).sweep()
    for folder in (root / ".tmp", claims):
        with suppress(OSError):  # not there, or not empty: others are at work
            folder.rmdir()


def sweep_work(work: layout.Work, lease_s: float = 300.0) -> None:
    """`sweep` every root of a work folder; one look at each root's names, none into its outputs."""
    root = work.root
    roots = [root, work.tiles, work.overlays, root / "tile_images", *_folders(root / "features")]
    for run in (work.runs, *_folders(work.runs)):
        roots += [run, run / "report", run / "heatmaps", *_folders(run / "new")]
    roots += [work.maps, *(folder / "gallery" for folder in _folders(work.maps))]
    for new in [r for r in roots if r.parent.name == "new"]:  # a work folder of its own, of new slides
        roots += [new / "tiles", new / "overlays", new / "heatmaps", *_folders(new / "features")]
    for found in roots:
        sweep(found, lease_s)


def _entries(folder: Path, prefix: str) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return [folder / entry.name for entry in found if entry.name.startswith(prefix)]
    except OSError:
        return []  # not there, or tidied away by another command


def _folders(parent: Path) -> list[Path]:
    return [p for p in _entries(parent, "") if not p.name.startswith(".") and p.is_dir()]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
