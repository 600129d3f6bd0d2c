"""What a person sees of a run: progress bars on a terminal, plain lines elsewhere, causes of failures at the end.

In: plans, outcomes, reports of stages. Out: text on standard error (progress) and standard output (results).
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mhim.pipeline.resume import causes, live, rates
from mhim.pipeline.resume.live import Live
from mhim.pipeline.resume.stage import Outcome, Plan, Report, State

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

LINE_S = 60.0  # without a terminal, a line at least so often
_LOOK_S = 0.5  # on a terminal, how often items under way are looked at
SIDE_BY_SIDE = 8  # so many of them are shown


class Progressing:
    """Progress of one stage: rich bars on a terminal, one for the stage and one for each item that tells how far it has
    come. Elsewhere a line at most every 10 s and at least every minute. A cause of failure is told once.

    tell: given what the items under way tell, once a minute (the run log)."""

    def __init__(self, stage: str, tell: Callable[[dict[str, Live]], None] | None = None) -> None:
        self.stage = stage
        self._tell = tell
        self._bar: Progress | None = None
        self._whole = TaskID(0)
        self._each: dict[str, TaskID] = {}
        self._done = self._total = self._failed = 0
        self._said = time.monotonic()
        self._sums: dict[str, float] = {}
        self._notes: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._root: Path | None = None
        self._keys: list[str] = []
        self._left = live.Remaining(0)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="progress", daemon=True)

    def __enter__(self) -> Progressing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()
        for note, n in self._notes.items():
            if n > 1:
                err.print(f"  [yellow]note[/] and {n - 1} more: {escape(note)}")

    def planned(self, plan: Plan) -> None:
        """Say what will be done and why."""
        missing, anew, remake = len(plan.todo), len(plan.differ), len(plan.remake)
        parts = [f"{missing} to do", f"{len(plan.done)} done before"]
        parts += [f"{anew} of other parameters to replace"] if anew else []
        parts += [f"{remake} to derive from what is there"] if remake else []
        err.print(f"[bold]{self.stage}[/]: {', '.join(parts)}")
        self._total = missing + anew + remake
        self._root, self._keys, self._left = plan.stage.root, plan.keys, live.Remaining(self._total)
        if not self._total:
            return
        if err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[last]}"),
            )
            self._bar = Progress(*columns, console=err, transient=True)
            self._whole = self._bar.add_task(self.stage, total=self._total, last="")
            self._bar.start()
        self._thread.start()

    def watch(self, outcome: Outcome) -> None:
        """See one outcome."""
        with self._lock:
            self._done += 1
            self._failed += outcome.state is State.FAILED
            self._left.finished(outcome.key, outcome.state is not State.SKIPPED)
        for note in outcome.notes:
            self._notes[note] += 1
            if self._notes[note] == 1:  # what is the same for a thousand slides is told once, and counted at the end
                err.print(f"  [yellow]note[/] {escape(outcome.key)}: {escape(note)}")
        if outcome.state in (State.FAILED, State.EMPTY):
            cause = f"{outcome.state.value} {causes.signature(outcome.key, outcome.message)}"
            self._causes[cause] += 1
            colour = "red" if outcome.state is State.FAILED else "yellow"
            if self._causes[cause] == 1:
                err.print(f"  [{colour}]{outcome.state.value}[/] {escape(outcome.key)}: {escape(outcome.message)}")
        for name, value in outcome.numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        if self._bar is not None:
            last = rates.told(self._sums) or outcome.key[-40:]
            self._bar.update(self._whole, completed=self._done, last=escape(last))
        elif time.monotonic() - self._said > 10 or self._done == self._total:
            self._say({})

    def _look(self) -> None:
        """Look at the items under way until the stage ends."""
        noted = time.monotonic()
        while not self._over.wait(_LOOK_S if self._bar is not None else min(1.0, LINE_S)):
            minute = time.monotonic() - noted >= LINE_S
            if self._bar is None and not minute:
                continue
            assert self._root is not None
            found = live.under_way(self._root, self._keys)
            if self._bar is not None:
                self._draw(self._bar, found)
            elif time.monotonic() - self._said >= LINE_S / 2:
                self._say(found)
            if minute:
                noted = time.monotonic()
                if self._tell is not None and found:
                    self._tell(found)

    def _draw(self, bar: Progress, found: dict[str, Live]) -> None:
        """One bar for each item under way, and what is left of the stage."""
        shown = dict(list(found.items())[:SIDE_BY_SIDE])
        for key in self._each.keys() - shown.keys():
            bar.remove_task(self._each.pop(key))
        for key, one in shown.items():
            if key not in self._each:
                self._each[key] = bar.add_task(f"  {escape(key[-30:])}", total=one.of, last="")
            bar.update(self._each[key], completed=one.done + one.part, last=escape(one.told(counted=False)))
        left = self._remaining(found)
        more = f"and {len(found) - len(shown)} more under way" if len(found) > len(shown) else ""
        told = "; ".join(part for part in (left, rates.told(self._sums), more) if part)
        if told:
            bar.update(self._whole, last=escape(told))

    def _say(self, found: dict[str, Live]) -> None:
        """The stage in one line."""
        self._said = time.monotonic()
        parts = [f"{self.stage} {self._done}/{self._total}, {self._failed} failed", rates.told(self._sums)]
        parts += [f"{key}: {one.told()}" for key, one in list(found.items())[:SIDE_BY_SIDE]]
        parts += [f"and {len(found) - SIDE_BY_SIDE} more under way"] if len(found) > SIDE_BY_SIDE else []
        parts.append(self._remaining(found))
        err.print(escape("  " + "; ".join(part for part in parts if part)))

    def _remaining(self, found: dict[str, Live]) -> str:
        with self._lock:
            seconds = self._left.seconds(found)
        return "" if seconds is None else f"about {live.duration(seconds)} left"


def escape(text: str) -> str:
    """`text` with rich's markup made harmless (file names may hold brackets)."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def finish(report: Report, file: Path | None = None) -> None:
    """The last words of a stage: counts, and the failures by their causes. file: which names every one of them. Why it
    stopped ends the command, which says it."""
    counts = [f"{report.count(s)} {s.value}" for s in State if report.count(s)]
    err.print(f"[bold]{report.stage}[/]: {', '.join(counts) or 'nothing to do'}")
    if report.failures:
        rest = "" if report.stopped else ", the rest is complete"
        table = Table(title=f"{report.stage}: {len(report.failures)} failed{rest}", title_style="red")
        table.add_column("item", overflow="fold")
        table.add_column("what is wrong, and what to do", overflow="fold")
        groups = causes.grouped((o.key, o.message) for o in report.failures)
        for cause in groups:
            how_many = f"{len(cause.keys)} items: " if len(cause.keys) > 1 else ""
            table.add_row(escape(f"{how_many}{cause.names()}"), escape(cause.message))
        err.print(table)
        if file is not None and any(len(cause.keys) > causes.NAMED for cause in groups):
            err.print(f"all of them by name: {escape(str(file))}, and `pipeline status`")


def fail(message: str) -> None:
    """One error for the user."""
    print(f"error: {message}", file=sys.stderr)
