"""Processes of this machine: whether one still runs, and how many cores there are for them.

The one rule for claims, private folders and copies of slides, and for everything that takes "one per core"."""

from __future__ import annotations

import os
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process has this number; whose it is does not matter. Numbers are used again, see `claims.py`.

    One that has ended and that its parent has not asked for yet (a zombie) does nothing any more: a container whose
    first process asks for none would keep what a killed worker left for ever."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not Path("/proc/self/stat").exists()  # it has ended since, or this system has no /proc
    return state not in ("Z", "X")


def usable_cores() -> int:
    """Cores that this process may run on: those that a scheduler or a container leaves it, not all of the machine.
    PYTHON_CPU_COUNT says another number, as it does for Python itself from 3.13 on."""
    told = os.environ.get("PYTHON_CPU_COUNT", "")
    if told.isdigit() and int(told):
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
