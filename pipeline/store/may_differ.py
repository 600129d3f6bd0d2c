"""Which files of a work folder may differ between two runs of the same commands; all others are equal, byte by byte.

The one list: tests of kills, of clusters and of chaos compare by it, and README points here. On a GPU also the last
bits of features and of what comes of them may differ with `extract.batch`.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

# pattern of the path below the work folder (* is any text, slashes too) -> why
MAY_DIFFER: dict[str, str] = {
    "runs/*.jsonl": "what each command did: when, where, with which versions",
    "runs/*.summary.md": "the same for a person",
    "jobs/*": "what was submitted to a scheduler: its numbers, paths of this machine, and the tasks' ends",
    "check/*": "`pipeline check` tells the rate of this machine",
    "runs/*/tensorboard/*": "an experiment log holds the time of each entry",
    ".slide-identities": "time stamps of the slide files, so that they are not hashed again",
    ".verified*": "how far a stopped `pipeline verify` had come",
    "damaged/*": "what `pipeline verify --repair` moved out of the way",
    "*/.partial/*": "a checkpoint of what is not finished yet: how far it came depends on when it was stopped",
    "*.tmp/*": "under way, or left by a killed command; the next one removes it",
    "*.tmp-*": "the same",
    "*.claims/*": "who is making what at this moment",
}


def reason(name: str) -> str | None:
    """Why the file `name`, relative to the work folder with slashes, may differ; None: it may not."""
    return next((why for pattern, why in MAY_DIFFER.items() if fnmatchcase(name, pattern)), None)


def results(work: Path) -> dict[str, bytes]:
    """Every file of a work folder that may not differ: its bytes by relative path."""
    named = ((p.relative_to(work).as_posix(), p) for p in sorted(work.rglob("*")) if p.is_file())
    return {name: p.read_bytes() for name, p in named if reason(name) is None}


def unfinished(work: Path) -> list[str]:
    """What lies there that only a living command may have: private files and folders, claims. Checkpoints are none."""
    found = (p.relative_to(work) for p in work.rglob("*"))
    marks = (".tmp", ".claims", ".stale-", ".clock-")
    return sorted(p.as_posix() for p in found if p.name.startswith(marks) and ".partial" not in p.parts)
