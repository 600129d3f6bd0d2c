"""Leases on items, so that several processes and machines share one work folder without doing the same work twice.

In: a folder for the claims and an item's key. Out: a held claim, or the owner of the one that is there. Claims only
save work: outputs are committed by a rename that one worker wins, so a claim lost or taken over by mistake costs time,
never correctness. No file locks (NFS lacks them): a claim is a file made by exclusive create; its modification time is
the heartbeat, compared with the time of the same file system, so that clocks of machines need not agree. Each claim
says how long its owner's lease is, so that commands with different leases judge each other rightly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from mhim.configs import processes
from mhim.pipeline.store.owner import machine, owner

_TORN_S = 10.0  # a claim without content for so long is the torn remains of a crash, not one being written


class Claims:
    """All claims that this process holds in one folder, kept alive by one thread. Use as a context manager."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self._mark = uuid.uuid4().hex
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._clock = folder / f".clock-{owner()}-{self._mark[:8]}"

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # a folder that became read-only or full cannot be tidied; claims expire, and the error under way matters more
        with contextlib.suppress(OSError):
            for path in list(self._held):
                self._drop(path)
            self._clock.unlink(missing_ok=True)

    def take(self, key: str, note: dict[str, Any] | None = None) -> str | None:
        """Claim `key`. None: it is ours. A text: who holds it (`host:pid`). OSError if nothing can be written.

        note: plain values for whoever finds the claim, see `note`."""
        path = self._path(key)
        pid = os.getpid()
        claim = {"host": machine(), "pid": pid, "start": _start_time(pid), "lease_s": self.lease_s, "key": key}
        content = json.dumps({**claim, "mark": self._mark, **({"note": note} if note is not None else {})})
        for _ in range(3):
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True)  # a command that ended has tidied the empty folder away
                continue
            except FileExistsError:
                holder = self._holder(path)
                if holder is not None:
                    return holder
                self._take_away(path)
                continue
            self._held.add(path)
            try:
                with os.fdopen(fd, "w") as f:
                    f.write(content)
            except BaseException:
                self._held.discard(path)
                path.unlink(missing_ok=True)  # a claim without content would keep others waiting
                raise
            return None
        return "another process"

    def release(self, key: str) -> None:
        """Give `key` back."""
        self._drop(self._path(key))

    def holder(self, key: str) -> str | None:
        """Who holds a living claim on `key`, or None."""
        return self._holder(self._path(key))

    def note(self, key: str) -> dict[str, Any] | None:
        """What the owner of `key` noted; None if the claim is free, is being written or has no note."""
        try:
            claim = _parsed(self._path(key).read_text())
        except FileNotFoundError:
            return None
        return claim.get("note") if claim else None

    def sweep(self) -> None:
        """Remove what dead owners left: claims, clocks, graves."""
        for path in list(self.folder.glob("*.json")):
            if path not in self._held and self._holder(path) is None:
                self._take_away(path)
        for path in list(self.folder.glob(".clock-*")):
            if owner_alive(path.name.removeprefix(".clock-").rsplit("-", 1)[0]) is False:
                path.unlink(missing_ok=True)
        for path in list(self.folder.glob(".stale-*")):
            if self._holder(path) is None:
                path.unlink(missing_ok=True)
        self._clock.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def _drop(self, path: Path) -> None:
        if path in self._held:
            self._held.discard(path)
            if self._ours(path):
                path.unlink(missing_ok=True)

    def _ours(self, path: Path) -> bool:
        """Whether the claim at `path` is still this one: a process that slept past its lease may have lost it."""
        try:
            return self._mark in path.read_text()
        except FileNotFoundError:
            return False

    def _holder(self, path: Path) -> str | None:
        """The living owner of the claim at `path`; None when it is free, expired, or its process is dead."""
        try:
            with open(path) as f:  # opening first makes NFS fetch fresh attributes
                raw = f.read()
                beat = os.fstat(f.fileno()).st_mtime
        except FileNotFoundError:
            return None
        claim = _parsed(raw)
        if claim is None:
            return "an unknown process" if self._now() - beat <= min(self.lease_s, _TORN_S) else None
        if claim["host"] == machine() and not _alive(claim["pid"], claim.get("start")):
            return None
        lease_s = float(claim.get("lease_s", self.lease_s))
        return f"{claim['host']}:{claim['pid']}" if self._now() - beat <= lease_s else None

    def _now(self) -> float:
        """The file system's own time: the modification time of a file touched now."""
        try:
            os.utime(self._clock)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clock.touch()
        return self._clock.stat().st_mtime

    def _take_away(self, path: Path) -> None:
        """Remove a stale claim. By renaming it first, only one of several takers wins."""
        grave = path.with_name(f".stale-{uuid.uuid4().hex[:12]}")
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return
        if self._holder(grave) is not None:
            # between our look and the rename somebody else took it over: give it back
            with contextlib.suppress(OSError):
                os.link(grave, path)
        grave.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(max(0.05, self.lease_s / 5)):
            for path in list(self._held):
                try:
                    if self._ours(path):
                        os.utime(path)
                except OSError:
                    continue  # removed this moment, or the server is away: the next beat tries again


def _parsed(raw: str) -> dict[str, Any] | None:
    """A claim's content; None while it is being written, or if a crash tore it."""
    try:
        claim = json.loads(raw)
    except json.JSONDecodeError:
        return None
    return claim if isinstance(claim, dict) and {"host", "pid", "key"} <= claim.keys() else None


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (tells a reused pid), None where /proc does not exist."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _alive(pid: int, start: int | None) -> bool:
    """Whether the process that started at `start` still runs under `pid` on this machine."""
    if not processes.alive(pid):
        return False
    return start is None or _start_time(pid) in (None, start)


def owner_alive(host_pid: str) -> bool | None:
    """For a name made by `store.owner()`: True or False for a process of this machine, None for another machine's."""
    host, _, pid = host_pid.rpartition("-")
    if host != machine() or not pid.isdigit():
        return None
    return _alive(int(pid), None)


@contextlib.contextmanager
def alone(folder: Path, key: str, lease_s: float = 60.0) -> Iterator[None]:
    """Within it no other process holds `key` in `folder`: waits until it can be claimed. OSError if nothing can be
    written."""
    with Claims(folder, lease_s) as claims:
        while claims.take(key) is not None:
            time.sleep(0.02)
        yield
    with contextlib.suppress(OSError):  # others are at work
        folder.rmdir()


def running_keys(folder: Path) -> set[str]:
    """Keys of the living claims in `folder`: a heartbeat within the lease, and no dead process of this machine."""
    keys = set()
    for path in folder.glob("*.json") if folder.is_dir() else []:
        try:
            claim, beat = _parsed(path.read_text()), path.stat().st_mtime
        except FileNotFoundError:
            continue  # given back at this moment
        if claim is None or (claim["host"] == machine() and not _alive(claim["pid"], claim.get("start"))):
            continue
        # looking must not write, so this machine's clock has to do; a second lease covers its skew
        if time.time() - beat <= 2 * float(claim.get("lease_s", 300.0)):
            keys.add(claim["key"])
    return {key for key in keys if not key.startswith(".")}  # those are of the folder, not of an item
