"""What a person sees of a run: progress bars on a terminal, plain lines elsewhere, and the list of failures at the end.

In: plans, outcomes, reports of stages. Out: text on standard error (progress) and standard output (results).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mhim.pipeline.resume import rates
from mhim.pipeline.resume.stage import Outcome, Plan, Report, State

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Progressing:
    """Progress of one stage: a rich bar on a terminal; elsewhere a line at most every 10 s, and one per failure."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Progress | None = None
        self._done = self._total = self._failed = 0
        self._said = time.monotonic()
        self._sums: dict[str, float] = {}
        self._notes: Counter[str] = Counter()

    def __enter__(self) -> Progressing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        if self._total and err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[last]}"),
            )
            self._bar = Progress(*columns, console=err, transient=True)
            self._bar.add_task(self.stage, total=self._total, last="")
            self._bar.start()

    def watch(self, outcome: Outcome) -> None:
        """See one outcome."""
        self._done += 1
        self._failed += outcome.state is State.FAILED
        for note in outcome.notes:
            self._notes[note] += 1
            if self._notes[note] == 1:  # what is the same for a thousand slides is told once, and counted at the end
                err.print(f"  [yellow]note[/] {escape(outcome.key)}: {escape(note)}")
        if outcome.state is State.FAILED:
            err.print(f"  [red]failed[/] {escape(outcome.key)}: {escape(outcome.message)}")
        elif outcome.state is State.EMPTY:
            err.print(f"  [yellow]empty[/] {escape(outcome.key)}: {escape(outcome.message)}")
        for name, value in outcome.numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        rate = rates.told(self._sums)
        if self._bar is not None:
            last = rate or outcome.key[-40:]
            self._bar.update(self._bar.task_ids[0], completed=self._done, last=escape(last))
        elif time.monotonic() - self._said > 10 or self._done == self._total:
            self._said = time.monotonic()
            err.print(f"  {self.stage} {self._done}/{self._total}, {self._failed} failed{'; ' if rate else ''}{rate}")


def escape(text: str) -> str:
    """`text` with rich's markup made harmless (file names may hold brackets)."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def finish(report: Report) -> None:
    """The last words of a stage: counts, and every failure with its reason. Why it stopped ends the command, which
    says it."""
    counts = [f"{report.count(s)} {s.value}" for s in State if report.count(s)]
    err.print(f"[bold]{report.stage}[/]: {', '.join(counts) or 'nothing to do'}")
    if report.failures:
        rest = "" if report.stopped else ", the rest is complete"
        table = Table(title=f"{report.stage}: {len(report.failures)} failed{rest}", title_style="red")
        table.add_column("item", overflow="fold")
        table.add_column("what is wrong, and what to do", overflow="fold")
        for failure in sorted(report.failures, key=lambda o: o.key):
            table.add_row(escape(failure.key), escape(failure.message))
        err.print(table)


def fail(message: str) -> None:
    """One error for the user."""
    print(f"error: {message}", file=sys.stderr)
