"""How far an item under way has come: a small file beside its checkpoints that whoever sees the folder may read.

In: what the item's process tells (`Teller`). Out: the same for the command that waits for it, for `pipeline status` and
for other machines (`under_way`): the file system is all that processes, Dask workers and a cluster's tasks share. It is
no output: nothing decides by it, it is not flushed, and it goes with the checkpoints when the item is committed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mhim.pipeline.resume.claims import running_keys
from mhim.pipeline.resume.stage import CHECKPOINTS

NAME = "live.json"


@dataclass(frozen=True)
class Live:
    """One item under way. done: units finished, of `of`. part: of the unit under way, 0 to 1. begun: units that were
    finished when this process took it up. each_s: seconds per unit, None before one is known. now: the newest numbers
    by name. best: the best unit so far: its number and its value of `headline`."""

    unit: str
    done: int
    of: int
    part: float = 0.0
    begun: float = 0.0
    each_s: float | None = None
    now: dict[str, float] = field(default_factory=dict)
    headline: str = ""
    best: tuple[int, float] | None = None

    @property
    def share(self) -> float:
        """The finished share of the item, 0 to 1."""
        return min(1.0, (self.done + self.part) / max(self.of, 1))

    @property
    def worked(self) -> float:
        """The share of the item that this process did, 0 to 1."""
        return max(0.0, self.share - self.begun / max(self.of, 1))

    @property
    def left_s(self) -> float | None:
        """Seconds to the end, at most: a training may end early."""
        return None if self.each_s is None else max(0.0, self.of - self.done - self.part) * self.each_s

    def told(self, counted: bool = True) -> str:
        """`epoch 12/40, loss 0.412, val_auc 0.831, best 0.853 (epoch 9), 3.2 s each, at most 90 s left`.

        counted: with the number of units, which a bar shows by itself."""
        parts = []
        if counted:
            slow = self.part > 0 and (self.each_s is None or self.each_s > 20)
            parts.append(f"{self.unit} {self.done}/{self.of}" + (f" + {100 * self.part:.0f} %" if slow else ""))
        parts += [f"{name} {value:.3f}" for name, value in self.now.items()]
        if self.best is not None:
            parts.append(f"best {self.best[1]:.3f} ({self.unit} {self.best[0]})")
        if self.each_s is not None and self.left_s is not None:
            fast = self.each_s < 0.5
            parts.append(
                f"{1 / max(self.each_s, 1e-6):.3g} {self.unit}s/s" if fast else f"{duration(self.each_s)} each"
            )
            parts.append(f"{'at most' if self.headline else 'about'} {duration(self.left_s)} left")
        return ", ".join(parts)


class Teller:
    """Writes how far one item has come, at most every `every_s` seconds, into its folder of checkpoints."""

    def __init__(self, partial: Path, every_s: float = 0.5) -> None:
        self.path = partial / NAME
        self._every_s = every_s
        self._last = -every_s

    @property
    def due(self) -> bool:
        """Whether it is time to tell again."""
        return time.monotonic() - self._last >= self._every_s

    def tell(self, live: Live) -> None:
        """Write it, if it is time. A disk that is full or gone stops no work for this: what matters will tell."""
        if not self.due:
            return
        aside = self.path.with_name(f".tmp-{NAME}-{os.getpid()}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(asdict(live)))
            os.replace(aside, self.path)
        self._last = time.monotonic()


def read(path: Path) -> Live | None:
    """What an item told last; None where it told nothing that this version understands."""
    try:
        found = json.loads(path.read_text())
        best = found.pop("best", None)
        live = Live(**found, best=None if best is None else (int(best[0]), float(best[1])))
        live.told(), live.share, live.worked, live.left_s  # all that is asked of it later
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return None
    return live


def under_way(root: Path, keys: Iterable[str] | None = None) -> dict[str, Live]:
    """What the items of the stage in `root` tell that a living process is making now, by key. keys: only of these.

    An item that was killed left its file, too: whether it is under way is known by its claim."""
    folder = root / CHECKPOINTS
    if not folder.is_dir():
        return {}
    found: dict[str, Live] = {}
    running = running_keys(root / ".claims")
    for key in sorted(running if keys is None else running & set(keys)):
        told = []
        with suppress(OSError):  # committed at this moment
            for path in (folder / key).glob(f"*/{NAME}"):
                told.append((path.stat().st_mtime, path))
        live = read(max(told)[1]) if told else None
        if live is not None:
            found[key] = live
    return found


class Remaining:
    """How long a stage still takes: the work that is left, at the rate since it began. total: items to make."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = time.monotonic()
        self._worked = 0.0  # of finished items, in items
        self._begun: dict[str, float] = {}

    def finished(self, key: str, worked: bool) -> None:
        """One item ended. worked: False where nothing had to be made for it, which says nothing of the rate."""
        self._total -= 1
        self._worked += 1.0 - self._begun.pop(key, 0.0) if worked else 0.0

    def seconds(self, live: dict[str, Live]) -> float | None:
        """Seconds to the end, or None while nothing is known."""
        self._begun |= {key: one.begun / max(one.of, 1) for key, one in live.items()}
        worked = self._worked + sum(one.worked for one in live.values())
        if worked <= 0 or self._total <= 0:
            return None
        left = self._total - sum(one.share for one in live.values())
        return max(0.0, left) * (time.monotonic() - self._began) / worked


def duration(seconds: float) -> str:
    """`0.8 s`, `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"
