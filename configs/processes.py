"""Whether a process of this machine still runs: the one rule for claims, private folders and copies of slides."""

from __future__ import annotations

import os


def alive(pid: int) -> bool:
    """Whether a process has this number; whose it is does not matter. Numbers are used again, see `claims.py`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
