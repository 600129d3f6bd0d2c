"""The state of a work folder, seen again and again: in place on a terminal; elsewhere whole, then a line a minute.

In: a work folder. Out: what `status` shows, and of every stage under way how long it still takes, at the rate since one
began to look. Changes nothing. What is under way may be made by this machine, by Dask workers or by a cluster's tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mhim.pipeline.resume import causes, console
from mhim.pipeline.resume.live import Remaining, duration
from mhim.pipeline.store import layout
from mhim.pipeline.upkeep import status

_IDLE = 9  # looking takes a tenth of the time at most: of 100,000 slides it reads as many seals


class Rates:
    """How long stages still take. A stage is known from the first time that something of it is under way."""

    def __init__(self) -> None:
        self._left: dict[str, Remaining] = {}
        self._ended: dict[str, set[str]] = {}
        self._first: dict[str, dict[str, float]] = {}  # per stage, what an item had finished when it was first seen

    def seconds(self, stage: status.StageStatus) -> float | None:
        """Seconds to the end of `stage`, None where nothing of it is under way or nothing is known yet."""
        ended = {key for state in ("done", "empty", "failed") for key in stage.keys[state]}
        open_ = len(stage.keys["running"]) + len(stage.keys["missing"])
        if stage.name not in self._left:
            if not stage.keys["running"]:
                return None
            self._left[stage.name], self._ended[stage.name] = Remaining(open_), ended
            self._first[stage.name] = {key: one.done + one.part for key, one in stage.live.items()}
        left, first = self._left[stage.name], self._first[stage.name]
        for key in sorted(ended - self._ended[stage.name]):
            left.finished(key, worked=True)
        self._ended[stage.name] |= ended
        found = {k: replace(one, begun=max(one.begun, first.get(k, 0.0))) for k, one in stage.live.items()}
        seconds = left.seconds(found)
        return seconds if stage.keys["running"] else None


class Watch:
    """What is told of `work`. say: given lines."""

    def __init__(self, work: layout.Work, say: Callable[[str], object]) -> None:
        self._work = work
        self._say = say
        self._rates = Rates()
        self._said = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last lines are a minute old."""
        return time.monotonic() - self._said >= console.LINE_S

    def look(self) -> tuple[list[status.StageStatus], dict[str, str]]:
        """The stages as they are now, and the time left of those under way."""
        stages = status.read(self._work)
        known = {stage.name: self._rates.seconds(stage) for stage in stages}
        return stages, {name: f"about {duration(s)} left" for name, s in known.items() if s is not None}

    def minute(self) -> None:
        """One line for every stage under way, if it is time."""
        if self.due:
            self.tell(*self.look())

    def tell(self, stages: list[status.StageStatus], left: dict[str, str]) -> None:
        """One line for every stage under way."""
        self._said = time.monotonic()
        for stage in stages:
            if stage.keys["running"]:
                self._say(_line(stage, left.get(stage.name, "")))


def _line(stage: status.StageStatus, left: str) -> str:
    counts = {state: len(keys) for state, keys in stage.keys.items()}
    done = counts["done"] + counts["empty"]
    parts = [f"{stage.name} {done}/{sum(counts.values())}, {counts['failed']} failed, {counts['running']} running"]
    parts += [f"{key}: {one.told()}" for key, one in list(stage.live.items())[: console.SIDE_BY_SIDE]]
    more = len(stage.live) - console.SIDE_BY_SIDE
    parts += [f"and {more} more under way"] * (more > 0) + [left] * bool(left)
    return "; ".join(parts)


def watch(root: Path, every_s: float = 2.0) -> int:
    """Show the state of the work folder `root` until interrupted. Returns 1 if something failed."""
    told = Watch(layout.Work(root), lambda line: console.out.print(console.escape(line)))
    last, code, terminal = "", 0, console.out.is_terminal
    try:
        while True:
            began = time.monotonic()
            stages, left = told.look()
            with console.out.capture() as captured:
                code = status.show_stages(root, stages, causes.NAMED, left if terminal else None)
            text, first = captured.get(), not last
            busy = any(stage.keys["running"] for stage in stages)
            if text != last and (terminal or first or told.due or not busy):
                if terminal:
                    console.out.clear()
                console.out.out(text, end="", highlight=False)
                last = text
            if not terminal and (first or told.due):
                told.tell(stages, left)
            console.out.file.flush()  # where it is a pipe, too
            time.sleep(max(every_s, _IDLE * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return code
