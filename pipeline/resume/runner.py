"""Carries out a stage's plan: claim each item, make it aside, commit it by a rename, wait for others, tell the truth.

In: a `Stage` and a back end (where items are made). Out: outcomes, and a `Report`. Knows nothing of slides, models or
machines; the rules stand in `stage.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mhim.configs.errors import UserError
from mhim.pipeline.resume import leftovers
from mhim.pipeline.resume.claims import Claims
from mhim.pipeline.resume.stage import (
    CHECKPOINTS,
    Item,
    Outcome,
    Plan,
    Refused,
    Report,
    Stage,
    State,
    Stopped,
    as_recorded,
    fields_beside,
    fits,
    told,
)
from mhim.pipeline.resume.stage import plan as look_again
from mhim.pipeline.store import disk, layout, names, seals, writing

_SETTINGS = ".settings"  # key of the claim that says with which settings a folder is being worked in
_STAGE = "stage"  # in that claim, which stage works there
_OTHERS_END_S = 20.0  # so long one waits for another stage: of two equal `run`, one trains a moment longer


class Overtaken(Exception):
    """Another command committed another output under this item's name while this one was at work."""


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
    private = stage.root / ".tmp" / f"{layout.owner()}-{uuid.uuid4().hex[:8]}"
    out = private / "out"
    try:
        if item.wrong:
            raise layout.StoreError(item.wrong)
        there = seals.look(item.output, item.seal)
        if there is not None and fits(stage, item, there):
            if stage.lacks(item):
                _make_private(private)
                stage.make_beside(item, private)
                return Outcome(item.key, State.DONE, time.perf_counter() - start)
            return Outcome(item.key, State.SKIPPED)  # another process finished it since the plan was made
        fields = stage.fields(item)
        if there is not None and not there.wrong and not replace:
            if remake:  # what was not known of the old output is not known of the new one
                fields = as_recorded(stage, item, fields, there.attrs)
            differences = there.differences(fields_beside(stage, item, there))
            if differences.keys() - (stage.remake_fields() if remake else ()):
                raise Overtaken(_overtaken(item, differences))
        same = there is not None and not there.wrong and there.fingerprint == layout.fingerprint(fields)
        _make_private(private)
        partial = stage.root / CHECKPOINTS / item.key / layout.fingerprint(fields)
        made = stage.remake(item, item.output, out) if remake else stage.make(item, out, partial)
        writing.seal(out, fields, item.seal, **({"empty": made.empty} if made.empty else {}))
        first = _commit(item, out, private, fields, replace or remake)
        for name, path in stage.beside(item).items():
            _move_beside(private / name, path)
        shutil.rmtree(stage.root / CHECKPOINTS / item.key, ignore_errors=True)
        state = State.SKIPPED if not first and not same else State.EMPTY if made.empty else State.DONE
        return Outcome(item.key, state, time.perf_counter() - start, made.empty or "", made.notes, made.numbers)
    except Stopped:
        raise  # what is wrong concerns every item
    except Exception as error:
        full = disk.trouble(error, stage.root)
        if full is not None:
            raise Stopped(_disk_message(stage, full)) from error
        if isinstance(error, Overtaken):  # nobody goes on with these checkpoints
            shutil.rmtree(stage.root / CHECKPOINTS / item.key, ignore_errors=True)
        return _failed(item, start, error)
    finally:
        shutil.rmtree(private, ignore_errors=True)
        with suppress(OSError):  # a read-only folder cannot give the claim back; it expires
            claims.release(item.key)


def _commit(item: Item, out: Path, private: Path, fields: dict[str, Any], replace: bool) -> bool:
    """Give `out` the item's name. False if the same output is there by now; raises Overtaken if another one is.

    What has that name and is no whole output (a copy cut short, say) goes to `private`, which is removed."""
    if item.seal is not None:
        writing.commit_spread(out, item.output, item.seal)
        return True
    there = seals.look(item.output)
    same = there is not None and there.fingerprint == layout.fingerprint(fields)
    if there is not None and (replace or there.wrong or not (same or there.differences(fields))):
        writing.remove_store(item.output, private)
    if writing.commit(out, item.output):
        return True
    there = seals.look(item.output)
    if there is None or there.wrong or there.fingerprint != layout.fingerprint(fields):
        raise Overtaken(_overtaken(item, there.differences(fields) if there and not there.wrong else {}))
    return False


def _overtaken(item: Item, differences: dict[str, tuple[Any, Any]]) -> str:
    what = told(differences) or "it is damaged"
    return (
        f"{item.output} was made by another command meanwhile, with other parameters ({what}); it was left as it "
        "is. Choose another --work or --name, or make it anew with --replace"
    )


def _move_beside(made: Path, final: Path) -> None:
    """Move what lies beside an output to its place, if it was made, instead of what is there."""
    if not made.exists():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    writing.fsync(made)
    if made.is_dir() and final.is_dir():
        os.rename(final, made.with_name(f"old-{made.name}"))  # goes with the private folder
    os.replace(made, final)


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
    known = isinstance(error, UserError)
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
    others = sys.unraisablehook

    def swallowed(what: sys.UnraisableHookArgs) -> None:
        """A signal that came while a destructor ran was raised there, and Python drops it: it is sent once more."""
        if not isinstance(what.exc_value, (SystemExit, KeyboardInterrupt)):
            others(what)
            return
        number = signal.SIGINT if isinstance(what.exc_value, KeyboardInterrupt) else signal.SIGTERM
        # not from in here, where it would be dropped, too
        again = threading.Timer(0.01, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    before = {number: signal.signal(number, leave) for number in numbers}
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = others
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep(stage: Stage, lease_s: float) -> None:
    """Remove what dead owners left, and the empty folders of a finished stage. Others may be at work meanwhile."""
    leftovers.sweep(stage.root, lease_s)
    # os.walk passes over what another command sweeps away meanwhile
    for name, _, _ in os.walk(stage.root / CHECKPOINTS, topdown=False):
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
                finished = look_again(stage, [item]).done
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
    plan: Plan,
    backend: Backend,
    lease_s: float = 300.0,
    replace: bool = False,
    watch: Callable[[Outcome], None] | None = None,
    planned: Callable[[Plan], None] | None = None,
) -> Report:
    """Make what a plan says is missing, wait for what others are making, report.

    watch: sees each outcome as it comes. planned: sees the plan when it is about to be carried out.
    Raises Refused when outputs of other parameters exist and `replace` is False.
    """
    plan.permit(replace)
    stage = plan.stage
    report = Report(stage.name, list(plan.done))
    begin = planned or (lambda plan: None)
    for spent in plan.spent:
        shutil.rmtree(spent, ignore_errors=True)
    if not plan.keys:
        begin(plan)
        if plan.spent:
            sweep(stage, lease_s)
        return report
    try:
        with _agreed(stage, lease_s):
            begin(plan)
            sweep(stage, lease_s)
            for items, again, redo in (
                (plan.todo, False, False),
                (plan.anew, True, False),
                (plan.remake, False, True),
            ):
                for outcome in _every(stage, items, backend, again, redo, lease_s):
                    report.outcomes.append(outcome)
                    if watch:
                        watch(outcome)
        sweep(stage, lease_s)
    except Stopped as error:
        report.stopped = str(error)
        with suppress(OSError):  # a stage that never began leaves no folder that looks like one with items missing
            sweep(stage, lease_s)
            stage.root.rmdir()
    return report


def _every(
    stage: Stage, items: list[Item], backend: Backend, replace: bool, remake: bool, lease_s: float
) -> Iterator[Outcome]:
    """The outcome of every item: of those made by `backend`, and of those that another command is making."""
    waiting = list(items)
    while waiting:
        busy: list[Item] = []
        by_key = {item.key: item for item in waiting}
        for outcome in backend(stage, waiting, replace, remake):
            if outcome.state is State.CLAIMED:
                busy.append(by_key[outcome.key])
            else:
                yield outcome
        waiting, theirs = _wait(stage, busy, lease_s) if busy else ([], [])
        yield from theirs


def _inherit(claims: Claims, mine: dict[str, Any], every_s: float, over: threading.Event) -> None:
    """Take the claim on the settings as soon as the command that began first has ended: this one goes on with them."""
    while True:
        with suppress(OSError):
            if claims.take(_SETTINGS, mine) is None:
                return
        if over.wait(every_s):
            return


@contextmanager
def _agreed(stage: Stage, lease_s: float) -> Iterator[None]:
    """Within it no command with other settings works in the stage's folder. Raises Refused if one does so now.

    Items alone would not do: two commands that begin at once find nothing there, and would each make half of them."""
    mine = json.loads(json.dumps({_STAGE: stage.name, **stage.together()}))  # as the claim gives it back
    begun, looks = time.monotonic(), 0
    with open_claims(stage, lease_s) as claims:
        try:
            while looks < 100:
                holder = claims.take(_SETTINGS, mine)
                theirs = claims.note(_SETTINGS) if holder else None
                if theirs is not None:
                    theirs = {_STAGE: stage.name, **theirs}  # version 0.2.0 did not say
                if holder is None or theirs == mine:
                    break
                if theirs is not None and theirs[_STAGE] != stage.name:
                    if time.monotonic() - begun > _OTHERS_END_S:
                        raise Refused(
                            f"{stage.name}: another command ({holder}) is at work in {stage.root}: {theirs[_STAGE]}. "
                            "Nothing was changed. Wait for it, or choose another --work or --name"
                        )
                    time.sleep(0.1)
                    continue
                if theirs is not None:
                    both = sorted(theirs.keys() | mine.keys())
                    differ = {k: (theirs.get(k), mine.get(k)) for k in both if theirs.get(k) != mine.get(k)}
                    raise Refused(
                        f"{stage.name}: another command ({holder}) is at work in {stage.root} with other parameters: "
                        f"{told(differ)}. Nothing was changed. Wait for it, or choose another --work or --name"
                    )
                looks += 1
                time.sleep(0.05)  # it is being written, or was given back at this moment
            stage.begin()
        except OSError as error:
            raise Stopped(_disk_message(stage, error)) from error
        over = threading.Event()
        heir = threading.Thread(target=_inherit, args=(claims, mine, min(1.0, lease_s / 5), over), daemon=True)
        if holder is not None:
            heir.start()
        try:
            yield
        finally:
            over.set()
            if heir.is_alive():
                heir.join()
    with suppress(OSError):  # others are at work
        (stage.root / ".claims").rmdir()
