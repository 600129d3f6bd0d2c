"""Carries out a stage's plan: claim each item, make it aside, commit it by a rename, wait for others, tell the truth.

In: a `Stage` and a back end (where items are made). Out: outcomes, and a `Report`. Knows nothing of slides, models or
machines; the rules stand in `stage.py`.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import disk, leftovers, names, store
from pipeline.claims import Claims
from pipeline.stage import (
    Item,
    Outcome,
    Plan,
    Refused,
    Report,
    Stage,
    State,
    Stopped,
    as_recorded,
    is_made,
    plan,
    refusal,
    seal_of,
)


def make_one(stage: Stage, item: Item, claims: Claims, replace: bool = False, remake: bool = False) -> Outcome:
    """The whole life of one item: claim, make aside, seal, commit, release. Raises Stopped, nothing else but
    KeyboardInterrupt and SystemExit."""
    start = time.perf_counter()
    try:
        holder = claims.take(item.key)
        if holder is not None:
            return Outcome(item.key, State.CLAIMED, message=holder)
    except OSError as error:
        raise Stopped(_disk_message(stage, error)) from error
    private = stage.root / ".tmp" / f"{store.owner()}-{uuid.uuid4().hex[:8]}"
    out = private / "out"
    try:
        if is_made(stage, item):
            if not stage.lacks(item):
                return Outcome(item.key, State.SKIPPED)  # another process finished it since the plan was made
            _make_private(private)
            stage.make_beside(item, private)
            return Outcome(item.key, State.DONE, time.perf_counter() - start)
        fields = stage.fields(item)
        if remake:  # what was not known of the old output is not known of the new one
            fields = as_recorded(stage, item, fields, seal_of(store.seal_bytes(item.output, item.seal) or b"{}"))
        _make_private(private)
        partial = stage.root / ".partial" / item.key / store.fingerprint(fields)
        made = stage.remake(item, item.output, out) if remake else stage.make(item, out, partial)
        store.seal(out, fields, item.seal, **({"empty": made.empty} if made.empty else {}))
        if item.seal is not None:
            store.commit_spread(out, item.output, item.seal)
            first = True
        else:
            if replace or remake:
                store.remove_store(item.output, private)
            first = store.commit(out, item.output)
        shutil.rmtree(stage.root / ".partial" / item.key, ignore_errors=True)
        state = State.SKIPPED if not first else State.EMPTY if made.empty else State.DONE
        return Outcome(item.key, state, time.perf_counter() - start, made.empty or "", made.notes, made.numbers)
    except Stopped:
        raise  # what is wrong concerns every item
    except Exception as error:
        full = disk.trouble(error, stage.root)
        if full is not None:
            raise Stopped(_disk_message(stage, full)) from error
        return _failed(item, start, error)
    finally:
        shutil.rmtree(private, ignore_errors=True)
        with suppress(OSError):  # a read-only folder cannot give the claim back; it expires
            claims.release(item.key)


def _make_private(private: Path) -> None:
    """Make an item's private folder; a command that ends at this moment may tidy its empty parent away."""
    for attempt in range(5):
        try:
            private.mkdir(parents=True)
            return
        except FileNotFoundError:
            if attempt == 4:
                raise


def _failed(item: Item, start: float, error: Exception) -> Outcome:
    text = names.readable(" ".join(str(error).split())) or type(error).__name__
    known = type(error).__module__.split(".")[0] in {"extract", "mil", "pipeline", "configs"}
    message = text if known else f"{type(error).__name__}: {text}"
    trace = names.readable(traceback.format_exc())
    return Outcome(item.key, State.FAILED, time.perf_counter() - start, message, trace=trace)


def _disk_message(stage: Stage, error: OSError) -> str:
    return disk.told(f"{stage.name}: ", error, stage.root)


def run_items(
    stage: Stage, items: Iterable[Item], lease_s: float, replace: bool = False, remake: bool = False
) -> Iterator[Outcome]:
    """Make `items` one after the other in this process, telling the stage which comes next. A back end calls this."""
    queue = iter(items)
    with open_claims(stage, lease_s) as claims:
        try:
            ahead = next(queue, None)
            while ahead is not None:
                item, ahead = ahead, next(queue, None)
                if ahead is not None:
                    stage.prefetch(ahead)
                yield make_one(stage, item, claims, replace, remake)
        finally:
            stage.close()


def open_claims(stage: Stage, lease_s: float) -> Claims:
    """The stage's claims, to be used as a context manager. Raises Stopped when its folder cannot be written."""
    try:
        (stage.root / ".claims").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stopped(_disk_message(stage, error)) from error
    return Claims(stage.root / ".claims", lease_s)


@contextmanager
def leaving() -> Iterator[None]:
    """Within it, SIGTERM and SIGUSR1 (walltime, preemption) end this process as Ctrl-C does: items under way are given
    back, what is committed stays, and the exit code is 143."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(143)

    numbers = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; the program around it decides then
        return
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep(stage: Stage, lease_s: float) -> None:
    """Remove what dead owners left, and the empty folders of a finished stage. Others may be at work meanwhile."""
    leftovers.sweep(stage.root, lease_s)
    # os.walk passes over what another command sweeps away meanwhile
    for name, _, _ in os.walk(stage.root / ".partial", topdown=False):
        with suppress(OSError):
            os.rmdir(name)


def _wait(stage: Stage, busy: list[Item], lease_s: float) -> tuple[list[Item], list[Outcome]]:
    """Wait for items that others are making. Returns those that became free to be made, and those that are made.

    Waiting here, and not by asking the back end again and again, starts no process only to find an item taken."""
    claims = open_claims(stage, lease_s)
    made: list[Outcome] = []
    pause = 0.05
    try:
        while busy:
            free: list[Item] = []
            held: list[Item] = []
            for item in busy:
                finished = plan(stage, [item]).done
                if finished:
                    made += finished
                elif claims.holder(item.key) is None:
                    # it may have been committed between the two looks; `make_one` will see
                    free.append(item)
                else:
                    held.append(item)
            if free:
                return free + held, made
            busy = held
            if busy:
                time.sleep(pause)
                pause = min(2.0, 2 * pause, max(0.05, lease_s / 4))
        return [], made
    except OSError as error:
        raise Stopped(_disk_message(stage, error)) from error
    finally:
        with suppress(OSError):
            claims.sweep()


Backend = Callable[[Stage, list[Item], bool, bool], Iterator[Outcome]]
"""Where items are made: (stage, items, replace, remake) -> outcomes as they come."""


def run(
    stage: Stage,
    backend: Backend,
    lease_s: float = 300.0,
    replace: bool = False,
    only: Callable[[list[Item]], list[Item]] | None = None,
    watch: Callable[[Outcome], None] | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Report:
    """Plan, make what is missing, wait for what others are making, report.

    only: picks a share of the items (`--shard`). watch: sees each outcome as it comes. planned: sees the plan first.
    Raises Refused when outputs of other parameters exist and `replace` is False.
    """
    items = stage.items()
    items = only(items) if only else items
    tell = watch or (lambda outcome: None)
    todo = plan(stage, items)
    if todo.differ and not replace:
        raise Refused(refusal(stage, todo.differ))
    if planned:
        planned(todo)
    outcomes = list(todo.done)
    anew = [item for item, _ in todo.differ]
    report = Report(stage.name, outcomes)
    try:
        if todo.todo or anew or todo.remake:
            sweep(stage, lease_s)
        for batch, again, redo in ((todo.todo, False, False), (anew, True, False), (todo.remake, False, True)):
            waiting = list(batch)
            while waiting:
                busy: list[Item] = []
                by_key = {i.key: i for i in waiting}
                for outcome in backend(stage, waiting, again, redo):
                    if outcome.state is State.CLAIMED:
                        busy.append(by_key[outcome.key])
                    else:
                        outcomes.append(outcome)
                        tell(outcome)
                waiting, theirs = _wait(stage, busy, lease_s) if busy else ([], [])
                for outcome in theirs:
                    outcomes.append(outcome)
                    tell(outcome)
        if todo.todo or anew or todo.remake:
            sweep(stage, lease_s)
    except Stopped as error:
        report.stopped = str(error)
    return report
