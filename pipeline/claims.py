"""Leases on items, so that several processes and machines share one work folder without doing the same work twice.

In: a folder for the claims and an item's key. Out: a held claim, or the owner of the one that is there. Claims only
save work: outputs are committed by a rename that one worker wins, so a claim lost or taken over by mistake costs time,
never correctness. No file locks (NFS lacks them): a claim is a file made by exclusive create; its modification time is
the heartbeat, compared with the time of the same file system, so that clocks of machines need not agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType


class Claims:
    """All claims that this process holds in one folder, kept alive by one thread. Use as a context manager."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._clock = folder / f".clock-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

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
        for path in list(self._held):
            self._drop(path)
        self._clock.unlink(missing_ok=True)

    def take(self, key: str) -> str | None:
        """Claim `key`. None: it is ours. A text: who holds it (`host:pid`)."""
        path = self._path(key)
        content = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_time(os.getpid()), "key": key}
        )
        for _ in range(3):
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                holder = self._holder(path)
                if holder is not None:
                    return holder
                self._take_away(path)
                continue
            with os.fdopen(fd, "w") as f:
                f.write(content)
            self._held.add(path)
            return None
        return "another process"

    def release(self, key: str) -> None:
        """Give `key` back."""
        self._drop(self._path(key))

    def holder(self, key: str) -> str | None:
        """Who holds a living claim on `key`, or None."""
        return self._holder(self._path(key))

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def _drop(self, path: Path) -> None:
        self._held.discard(path)
        path.unlink(missing_ok=True)

    def _holder(self, path: Path) -> str | None:
        """The living owner of the claim at `path`; None when it is free, expired, or its process is dead."""
        try:
            beat = path.stat().st_mtime
            raw = path.read_text()
        except FileNotFoundError:
            return None
        try:
            claim = json.loads(raw)
            name = f"{claim['host']}:{claim['pid']}"
        except (json.JSONDecodeError, KeyError, TypeError):
            claim, name = None, "an unknown process"  # being written at this moment, or torn by a crash
        if claim and claim["host"] == socket.gethostname() and not _alive(claim["pid"], claim.get("start")):
            return None
        return name if self._now() - beat <= self.lease_s else None

    def _now(self) -> float:
        """The file system's own time: the modification time of a file touched now."""
        self._clock.touch()
        os.utime(self._clock)
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
            with contextlib.suppress(FileExistsError, OSError):
                os.link(grave, path)
        grave.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(max(0.05, self.lease_s / 5)):
            for path in list(self._held):
                try:
                    os.utime(path)
                except FileNotFoundError:
                    self._held.discard(path)  # taken over: the commit will find out


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (tells a reused pid), None where /proc does not exist."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _alive(pid: int, start: int | None) -> bool:
    """Whether the process that started at `start` still runs under `pid` on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return start is None or _start_time(pid) in (None, start)


def owner_alive(host_pid: str) -> bool | None:
    """For a name made by `store.owner()`: True or False for a process of this machine, None for another machine's."""
    host, _, pid = host_pid.rpartition("-")
    if host != socket.gethostname() or not pid.isdigit():
        return None
    return _alive(int(pid), None)


def running_keys(folder: Path) -> set[str]:
    """Keys of the claims in `folder` whose owner is not known to be dead."""
    keys = set()
    for path in folder.glob("*.json") if folder.is_dir() else []:
        try:
            claim = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue  # given back, or being written, at this moment
        if claim["host"] != socket.gethostname() or _alive(claim["pid"], claim.get("start")):
            keys.add(claim["key"])
    return keys
