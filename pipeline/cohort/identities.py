"""The identity of each slide of a work folder, hashed once: remembered in `.slide-identities`, a file of records.

In: paths of slides. Out: their identities (`extract.slide.identity`). A record is used as long as the file system says
that nothing changed, so planning 100,000 slides again costs a `stat` each.

The file only saves time. A record is one line, appended in one write, that carries its own check: a line that was cut
short, or written into by another machine, is passed over and made again. As in git, what changed within seconds of
being hashed is not recorded, since a second change within one tick of the file system's clock would not show.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mhim.extract.slide.identity import identity, same, stamp
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.store import layout

NAME = ".slide-identities"
_SETTLED_NS = 10_000_000_000  # file systems tick every 10 ms to 2 s; the rest is for clocks of servers that go wrong
_THREADS = 16


class Identities:
    """Those of one work folder. Picklable: each process reads the file at its first question."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._known: dict[str, str] | None = None

    def of(self, path: Path) -> str | None:
        """The identity of the slide at `path`, from the record or hashed now. None: it cannot be read."""
        now_ns = time.time_ns()
        before = stamp(path)
        if before is None:
            return None
        found = self._records().get(before.key)
        if found is not None:
            return found
        try:
            made = identity(path)
        except OSError:
            return None
        if now_ns - before.newest_ns >= _SETTLED_NS and stamp(path) == before:
            self._records()[before.key] = made
            self._append(f"{before.key} {made}")
        return made

    def expect(self, paths: Iterable[Path]) -> None:
        """Hash those that are not recorded yet, several at once, so that `of` finds them."""
        known = self._records()
        unknown = [path for path in paths if (found := stamp(path)) is not None and found.key not in known]
        if unknown:
            with ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(self.of, unknown):
                    pass

    @contextmanager
    def unchanged(self, path: Path) -> Iterator[str | None]:
        """The slide's identity, for work on its pixels. Raises StoreError at the end if the file changed meanwhile."""
        before = stamp(path)
        yield self.of(path)
        if stamp(path) != before:
            raise layout.StoreError(f"{path} was changed while it was being read; run the same command again")

    def check_same(self, path: Path, tiles: dict[str, Any]) -> None:
        """Raise StoreError if the slide at `path` is not the file that a store's attributes `tiles` are of.

        Where they record no identity (work folders of 0.1), the file's length decides."""
        settings = tiles.get("settings", {})
        then, now = tiles.get("content"), self.of(path)
        equal = same(then, now)
        facts = f"its content was {then} when it was tiled, and is {now}"
        if equal is None and path.is_file() and (bytes_then := settings.get("input.bytes")) is not None:
            bytes_now = path.stat().st_size
            equal = bytes_now == bytes_then
            facts = f"{bytes_then} bytes when it was tiled, {bytes_now} now"
        if equal is False:
            raise layout.StoreError(
                f"{path} is not the file that its tiles are of: {facts}. Tile it again (`pipeline tile ... "
                "--replace`), or give this cohort a --work folder of its own"
            )

    def _records(self) -> dict[str, str]:
        if self._known is None:
            known: dict[str, str] = {}
            lines = 0
            with suppress(OSError):
                for line in self._file.read_bytes().splitlines():
                    lines += 1
                    text, _, check = line.rpartition(b" ")
                    if check == _check(text):
                        key, _, made = text.decode("ascii").partition(" ")
                        known[key] = made
            self._known = known
        return self._known

    def _append(self, text: str) -> None:
        """Add a record; a folder that is not there or cannot be written is none of a reader's business."""
        line = text.encode() + b" " + _check(text.encode()) + b"\n"
        with suppress(OSError):
            file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(file, line)
            finally:
                os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


def _check(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def inputs_of(slide: SlideEntry, regions_frame: str) -> dict[str, Any]:
    """What a slide's tiles depend on besides settings and content, at the cost of a `stat`: for `Item.inputs`."""
    try:
        size = slide.path.stat().st_size
    except (OSError, ValueError):
        size = None  # a dangling link, a file that is gone, a name that none can have: `make` says so
    inputs: dict[str, Any] = {"bytes": size, "mpp": slide.mpp}
    if slide.regions is not None:
        try:
            inputs["regions"] = layout.sha256(slide.regions)
        except (OSError, ValueError):
            inputs["regions"] = "missing"  # or not to be read, which `make` says
        if regions_frame != "auto":  # as before there was a choice
            inputs["regions_frame"] = regions_frame
    return inputs
