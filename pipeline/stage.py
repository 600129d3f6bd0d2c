"""The one resumable stage: plan what is missing, make each item aside, commit it by a rename, tell the truth at the end.

In: a `Stage` (what the items are and how one is made) and a back end (where they are made). Out: a `Report`. Knows
nothing of slides, models or machines. Rules:

- An output with its final name is complete. It carries a fingerprint; the same fingerprint is skipped, another one is
  refused before any work, naming the setting, its old and its new value.
- One bad item never stops the others: it is recorded, listed at the end, and the exit code says so. A full disk or a
  read-only folder does stop the stage, since nothing else could succeed.
- Nothing here is guarded by locks: claims only keep two workers from making the same item.
"""

from __future__ import annotations

import errno
import shutil
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.claims import Claims, owner_alive

_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class Refused(Exception):
    """Outputs made with other parameters exist (exit code 3)."""


class Stopped(Exception):
    """Nothing more can be made: full disk, read-only folder. What was committed stays."""


class State(StrEnum):
    """How one item ended."""

    DONE = "done"  # made now
    SKIPPED = "skipped"  # was there already, same fingerprint
    EMPTY = "empty"  # a committed result: there was nothing to make (no tissue)
    FAILED = "failed"
    CLAIMED = "claimed"  # another process is making it


@dataclass(frozen=True)
class Item:
    """One unit of work: a slide, a fold, a cohort.

    key: unique in the stage, readable. output: its final path. inputs: fingerprints and properties of what it is made
    from (plain JSON; part of its own fingerprint). data: whatever `make` needs, picklable.
    seal: file that carries the fingerprint; set only for items that spread several files into an existing folder.
    """

    key: str
    output: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    seal: str | None = None


@dataclass(frozen=True)
class Made:
    """What `make` says of its work. empty: why there is nothing in it. notes: warnings for the person.
    numbers: measurements for the run log."""

    empty: str | None = None
    notes: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The end of one item. message: reason of EMPTY or FAILED, or who holds a CLAIMED one."""

    key: str
    state: State
    seconds: float = 0.0
    message: str = ""
    notes: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    trace: str = ""


class Stage(ABC):
    """One verb's work. Instances are picklable and hold settings and paths only.

    root: folder whose `.tmp`, `.claims` and `.partial` hold everything private. heavy: True if one item uses the whole
    machine (all cores or the GPU), so that the local back end runs items one after the other.
    """

    name: str
    root: Path
    heavy: bool = False

    @abstractmethod
    def items(self) -> list[Item]:
        """All items, in the order in which they should be made."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The result-affecting settings as a flat mapping of plain JSON values."""

    @abstractmethod
    def make(self, item: Item, out: Path, partial: Path) -> Made:
        """Fill `out`, a private path that does not exist yet. `partial` is a folder (it may not exist either) that
        survives a kill and is valid for exactly this item and fingerprint: checkpoints go there, each written
        atomically. It is removed when the item is committed."""

    def prefetch(self, item: Item) -> None:
        """A hint that `item` will be made next; starting to read it is allowed. Does nothing by default."""

    def remake_fields(self) -> frozenset[str]:
        """Settings whose change can be applied to an existing output by `remake`, without its inputs."""
        return frozenset()

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        """Fill `out` from the finished output `old` that differs in `remake_fields()` only."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once in each process when its items are done."""

    def fields(self, item: Item) -> dict[str, Any]:
        """Everything that decides the bytes of the output, field by field."""
        inputs = {f"input.{k}": v for k, v in item.inputs.items()}
        return {"stage": self.name, "format": store.FORMAT, **self.settings(), **inputs}


@dataclass
class Plan:
    """What a run will do. todo: missing. remake: to be derived from the existing output. done: committed before.
    differ: (item, {field: (old, new)}) that exist with other parameters."""

    todo: list[Item] = field(default_factory=list)
    remake: list[Item] = field(default_factory=list)
    done: list[Outcome] = field(default_factory=list)
    differ: list[tuple[Item, dict[str, tuple[Any, Any]]]] = field(default_factory=list)


@dataclass
class Report:
    """The end of a run: every outcome, and why it stopped early, if it did."""

    stage: str
    outcomes: list[Outcome]
    stopped: str = ""

    def count(self, state: State) -> int:
        return Counter(o.state for o in self.outcomes)[state]

    @property
    def failures(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.state is State.FAILED]

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some items failed or the run stopped early."""
        return 1 if self.failures or self.stopped else 0


def plan(stage: Stage, items: Iterable[Item]) -> Plan:
    """Compare each item with what is there. Reads one small file per item (about 50 µs) and writes nothing."""
    import json

    result = Plan()
    remakeable = stage.remake_fields()
    for item in items:
        raw = store.seal_bytes(item.output, item.seal)
        if raw is None:
            result.todo.append(item)
            continue
        fields = stage.fields(item)
        if f'"fingerprint": "{store.fingerprint(fields)}"'.encode() in raw:
            state, message = State.SKIPPED, ""
            if b'"empty": ' in raw:
                parsed = json.loads(raw)
                reason = parsed.get("attributes", parsed).get("empty")
                if reason:
                    state, message = State.EMPTY, str(reason)
            result.done.append(Outcome(item.key, state, message=message))
            continue
        try:
            parsed = json.loads(raw)
        except json.JSONDecodeError:
            parsed = {}
        old = (parsed.get("attributes") or parsed).get("settings", {})
        differences = {
            k: (old.get(k, "not recorded"), fields.get(k, "no longer a setting"))
            for k in sorted(fields.keys() | old.keys())
            if old.get(k, "not recorded") != fields.get(k, "no longer a setting")
        } or {"fingerprint": ("damaged", store.fingerprint(fields))}
        if differences.keys() <= remakeable:
            result.remake.append(item)
        else:
            result.differ.append((item, differences))
    return result


def refusal(stage: Stage, differ: list[tuple[Item, dict[str, tuple[Any, Any]]]]) -> str:
    """The message for outputs of other parameters: which fields, old and new values, and the two ways out."""
    groups: dict[str, list[str]] = {}
    for item, differences in differ:
        text = "; ".join(f"{k}: {old!r} there, {new!r} now" for k, (old, new) in differences.items())
        groups.setdefault(text, []).append(item.key)
    lines = [f"{stage.name}: outputs made with other parameters exist in {stage.root}; nothing was changed."]
    for text, keys in list(groups.items())[:10]:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        lines.append(f"  {', '.join(keys[:3])}{more}: {text}")
    if len(groups) > 10:
        lines.append(f"  ... and {len(groups) - 10} other differences")
    lines.append(
        "Either keep both by choosing another folder or name (--work, --name), or make them anew with --replace."
    )
    return "\n".join(lines)


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
    out = stage.root / ".tmp" / f"{store.owner()}-{uuid.uuid4().hex[:8]}"
    try:
        fields = stage.fields(item)
        mark = f'"fingerprint": "{store.fingerprint(fields)}"'.encode()
        there = store.seal_bytes(item.output, item.seal)
        if there is not None and mark in there:
            return Outcome(item.key, State.SKIPPED)  # another process finished it since the plan was made
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = stage.root / ".partial" / item.key / store.fingerprint(fields)
        made = stage.remake(item, item.output, out) if remake else stage.make(item, out, partial)
        store.seal(out, fields, item.seal, **({"empty": made.empty} if made.empty else {}))
        if item.seal is not None:
            store.commit_spread(out, item.output, item.seal)
            first = True
        else:
            if replace or remake:
                store.remove_store(item.output)
            first = store.commit(out, item.output)
        shutil.rmtree(stage.root / ".partial" / item.key, ignore_errors=True)
        state = State.SKIPPED if not first else State.EMPTY if made.empty else State.DONE
        return Outcome(item.key, state, time.perf_counter() - start, made.empty or "", made.notes, made.numbers)
    except OSError as error:
        if error.errno in _FATAL:
            raise Stopped(_disk_message(stage, error)) from error
        return _failed(item, start, error)
    except Exception as error:
        return _failed(item, start, error)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # a read-only folder cannot give the claim back; it expires
            claims.release(item.key)


def _failed(item: Item, start: float, error: Exception) -> Outcome:
    text = " ".join(str(error).split()) or type(error).__name__
    known = type(error).__module__.split(".")[0] in {"extract", "mil", "pipeline", "configs"}
    message = text if known else f"{type(error).__name__}: {text}"
    return Outcome(item.key, State.FAILED, time.perf_counter() - start, message, trace=traceback.format_exc())


def _disk_message(stage: Stage, error: OSError) -> str:
    what = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
    }
    reason = what.get(error.errno or 0, error.strerror or str(error))
    return (
        f"{stage.name}: cannot write to {error.filename or stage.root}: {reason}. What was finished is kept; "
        "make room or choose another --work folder, then run the same command again."
    )


def run_items(
    stage: Stage, items: Iterable[Item], lease_s: float, replace: bool = False, remake: bool = False
) -> Iterator[Outcome]:
    """Make `items` one after the other in this process, telling the stage which comes next. A back end calls this."""
    queue = iter(items)
    with Claims(stage.root / ".claims", lease_s) as claims:
        try:
            ahead = next(queue, None)
            while ahead is not None:
                item, ahead = ahead, next(queue, None)
                if ahead is not None:
                    stage.prefetch(ahead)
                yield make_one(stage, item, claims, replace, remake)
        finally:
            stage.close()


def sweep(stage: Stage, lease_s: float) -> None:
    """Remove private folders whose owner is dead, and the empty folders of a finished stage."""
    tmp = stage.root / ".tmp"
    if tmp.is_dir():
        for folder in tmp.iterdir():
            alive = owner_alive(folder.name.rsplit("-", 1)[0])
            # of another machine nothing is known but the age: a living owner writes within its lease
            old = time.time() - folder.stat().st_mtime > max(86400.0, 10 * lease_s)
            if alive is False or (alive is None and old):
                shutil.rmtree(folder, ignore_errors=True)
    claims = stage.root / ".claims"
    if claims.is_dir():
        for file in claims.glob(".clock-*"):
            if owner_alive(file.name.removeprefix(".clock-").rsplit("-", 1)[0]) is False:
                file.unlink(missing_ok=True)
    for folder in (tmp, claims):
        with suppress(OSError):  # not empty: others are at work
            folder.rmdir()
    partial = stage.root / ".partial"
    if partial.is_dir():
        for folder in sorted((p for p in partial.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError):
            partial.rmdir()


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
                if busy and len(busy) == len(waiting):
                    time.sleep(min(2.0, lease_s / 4))  # another process is at it; look again
                waiting = busy
        if todo.todo or anew or todo.remake:
            sweep(stage, lease_s)
    except Stopped as error:
        report.stopped = str(error)
    return report
