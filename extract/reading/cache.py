"""Slides staged from slow storage to a local folder ahead of use, within a size limit.

In: a slide's path and the settings. Out: the path to read it from: a copy in `cache_dir`, or the slide itself where
copying makes no sense. Knows nothing of tiles. Several processes may share one folder: copies appear by a rename, and a
copy in use carries a marker of its user, which keeps it from being removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from contextlib import suppress
from pathlib import Path

from mhim.configs import processes
from mhim.configs.schema import ExtractConfig

ONE_FILE = frozenset({".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide", ".czi"})  # others are many files
_MARK = ".use-"
_lock = threading.Lock()


class Staged:
    """Where one slide is read from; `release` when it is closed. path: the copy, or the slide itself. note: why."""

    def __init__(self, path: Path, mark: Path | None = None, note: str = "") -> None:
        self.path = path
        self.note = note
        self._mark = mark

    def release(self) -> None:
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)
            self._mark = None


def stage(path: Path, config: ExtractConfig) -> Staged:
    """Copy `path` into the cache (or find it there) and mark it as used. Falls back to `path`, with a note."""
    if config.cache_dir is None or not path.is_file():
        return Staged(path)
    if path.suffix.lower() not in ONE_FILE:
        return Staged(path, note="not cached: the slide is more than one file")
    folder = Path(config.cache_dir)
    stat = path.stat()
    limit = int(config.cache_gb * (1 << 30))
    if stat.st_size > limit:
        return Staged(path, note="not cached: larger than the whole cache")
    # the change time, which no program can set, tells another file of the same length and time stamp
    identity = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}|{stat.st_ctime_ns}"
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    copy = folder / f"{path.stem}.{digest}{path.suffix}"  # messages name the file that is read
    mark = folder / f"{copy.name}{_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with _lock:  # one copy at a time: the slow storage is the bottleneck
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
            if not copy.is_file():
                make_room(folder, limit - stat.st_size)
                aside = folder / f".{copy.name}.{os.getpid()}"
                try:
                    shutil.copyfile(path, aside)
                    os.replace(aside, copy)
                finally:
                    aside.unlink(missing_ok=True)
            os.utime(copy)
        except OSError as error:  # a full or read-only cache must not fail the slide
            with suppress(OSError):
                mark.unlink()
            return Staged(path, note=f"not cached: {error.strerror or error}")
    return Staged(copy, mark)


def make_room(folder: Path, room: int) -> None:
    """Remove the copies used longest ago, unless somebody uses them, until the rest is at most `room` bytes."""
    used: set[str] = set()
    copies: list[tuple[float, int, Path]] = []
    for file in folder.iterdir():
        name, found, who = file.name.partition(_MARK)
        if found:
            if processes.alive(int(who.split("-")[0])):
                used.add(name)
            else:
                file.unlink(missing_ok=True)
        elif file.name.startswith(".") and (maker := file.name.rpartition(".")[2]).isdigit():
            if not processes.alive(int(maker)):
                file.unlink(missing_ok=True)  # half a copy, whose process was killed
        elif not file.name.startswith(".") and file.suffix.lower() in ONE_FILE:
            stat = file.stat()
            copies.append((stat.st_mtime, stat.st_size, file))
    total = sum(size for _, size, _ in copies)
    for _, size, file in sorted(copies):
        if total <= room:
            return
        if file.name not in used:
            file.unlink(missing_ok=True)
            total -= size
