"""The commands whose items failed, again, for those items only.

In: a work folder's run logs. Out: command lines. A log says which command line it belongs to and where that was given;
for a task of a batch job, the job's folder says what was submitted.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline import runlog, store

_VERBS = ("tile", "extract", "train", "score")  # the commands that take --items


@dataclass(frozen=True)
class Again:
    """One command line to give again. args: without the program's name. folder: where. keys: what failed."""

    args: list[str]
    folder: str
    keys: list[str]


def commands(work: store.Work) -> list[Again]:
    """What to run so that everything that failed is tried again, in the order of the verbs. Writes the lists of keys
    that `--items` takes into `jobs/`."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for (label, key), start in sorted(runlog.last_failures(work.runs).items()):
        args, _ = _plain(work, start)
        name = json.dumps([args, start.get("folder"), label if args[:1] and args[0] in _VERBS else ""])
        groups.setdefault(name, (start, []))[1].append(key)
    again = []
    for start, keys in groups.values():
        args, folder = _plain(work, start)
        if args and args[0] in _VERBS:
            listed = work.root.resolve() / "jobs" / f"retry-{time.time_ns():x}.items"
            store.write_atomic(listed, "".join(f"{key}\n" for key in keys))
            args = [*args, "--items", str(listed)]
        again.append(Again(args, folder, keys))
    order = {verb: n for n, verb in enumerate(_VERBS)}
    return sorted(again, key=lambda a: order.get(a.args[0] if a.args else "", len(order)))


def _plain(work: store.Work, start: dict[str, Any]) -> tuple[list[str], str]:
    """The command line of a log and its folder, without what chose a share of the items; a task's as a submission."""
    args = _without(start["command"][1:], "--items", "--shard")
    args = args[1:] if args[:1] == ["--log-json"] else args
    job = start.get("SLURM_ARRAY_JOB_ID")
    if job is None:
        return args, start.get("folder", ".")
    for card_path in sorted(work.root.glob("jobs/*/job.json")):
        card = json.loads(card_path.read_text())
        if any(array["job"] == job for array in card["arrays"]):
            # the task's own settings decide the result; partition, account and the like stand in what was submitted
            own = _without(args, "--backend")
            asked = _values(card["command"][1:], "--config", "-c")
            sets = [s for s in _values(card["command"][1:], "--set") if s.startswith("cluster.")]
            given = _values(own, "--config", "-c")
            own = _without(own, "--config", "-c")
            own += [part for c in (*asked, *given) for part in ("--config", c)]
            own += [part for s in sets for part in ("--set", s)]
            return [*own, "--backend", "slurm"], start.get("folder", ".")
    return _without(args, "--backend"), start.get("folder", ".")


def _without(args: list[str], *flags: str) -> list[str]:
    """`args` without these flags and their values."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg in flags:
            skip = True
        elif not arg.startswith(tuple(f"{flag}=" for flag in flags)):
            kept.append(arg)
    return kept


def _values(args: list[str], *flags: str) -> list[str]:
    """The values of these flags in `args`, in order."""
    found = [after for arg, after in pairwise(args) if arg in flags]
    return found + [a.partition("=")[2] for a in args if a.startswith(tuple(f"{f}=" for f in flags if f[:2] == "--"))]
