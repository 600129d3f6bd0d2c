"""One target of a run: what compares, shows or draws results works on a view, and each view is as a run of it alone.

In: a scored run, or a folder of new slides that a run scored. Out: its views. A run with a single target is its own
view. One with several has, per target, `targets/<name>/predictions.csv` and `metrics.json`; a name that is no name of a
folder is written there with % and hexadecimal numbers, as in addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from mhim.pipeline.store import reading
from mhim.pipeline.store.layout import StoreError

FOLDER = "targets"
_METRICS = "metrics.json"


@dataclass(frozen=True)
class View:
    """run: the scored folder. target: the name of one of several; "" of a single one."""

    run: Path
    target: str = ""

    @property
    def folder(self) -> Path:
        """Where its `predictions.csv` and `metrics.json` are."""
        return self.run / FOLDER / file_name(self.target) if self.target else self.run

    @property
    def name(self) -> str:
        """The run, and of several targets which."""
        return f"{self.run.name}, {self.target}" if self.target else self.run.name


def file_name(target: str) -> str:
    """The folder of a target."""
    found = quote(target, safe=" +()[],=@")
    return "%2E" + found[1:] if found.startswith(".") else found


def of(run: Path) -> list[View]:
    """Every view of a scored folder, in the order of the targets."""
    folder = run / FOLDER
    if not folder.is_dir():
        return [View(run)]
    there = sorted(unquote(p.name) for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    order: list[str] = []
    if (run / _METRICS).exists():
        found = reading.read_json(run / _METRICS)
        order = list(found.get("targets") or {})
    return [View(run, name) for name in sorted(there, key=lambda n: (order.index(n) if n in order else len(order), n))]


def pick(run: Path, target: str | None) -> View:
    """The view that a user named, or the only one. Raises StoreError listing the targets."""
    every = of(run)
    names = [view.target for view in every]
    if target is None and len(every) == 1:
        return every[0]
    if target in names and target:
        return every[names.index(target)]
    if names == [""]:
        raise StoreError(f"{run.name} has a single target; leave --target {target} away")
    wrong = f"{run.name} has no target {target!r}" if target else f"{run.name} has several targets: name one"
    raise StoreError(f"{wrong} with --target: {', '.join(names)}")
