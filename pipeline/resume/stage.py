"""The one resumable stage: what its items are, what became of them, and the plan of what is missing.

In: a `Stage` (what the items are and how one is made). Out: a `Plan`. `runner.py` carries it out. Knows nothing of
slides, models or machines. Rules:

- An output is done when its seal carries this item's fingerprint, every file that the seal lists is there with its size
  (`pipeline verify` compares the bytes), and so is what lies beside it, such as a picture. What has no seal, or lost a
  file, is made anew. Another fingerprint is refused before any work, naming the setting, its old and its new value.
- One bad item never stops the others: it is recorded, listed at the end, and the exit code says so. A full disk or a
  read-only folder does stop the stage, since nothing else could succeed.
- Nothing here is guarded by locks: claims only keep two workers from making the same item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

from mhim.configs.errors import UserError
from mhim.pipeline.resume import fingerprints
from mhim.pipeline.store import layout, seals
from mhim.pipeline.store.seals import Found


class Refused(UserError):
    """Outputs made with other parameters exist (exit code 3)."""

    exit_code = 3
    heading = "refused"
    whole = True


class Stopped(UserError):
    """Nothing more can be made: full disk, read-only folder, no GPU any more. What was committed stays."""

    exit_code = 1
    whole = True


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
    wrong: why it cannot be made, where that was seen at listing (what it is made from is damaged): it fails alone.
    """

    key: str
    output: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    seal: str | None = None
    wrong: str = ""


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
    machine (all cores or the GPU), so that the local back end runs items one after the other. untrusted: True if its
    items parse files from anywhere, which may end the process that does it: never the command's own.
    """

    name: str
    root: Path
    heavy: bool = False
    untrusted: bool = False

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

    def beside(self, item: Item) -> dict[str, Path]:
        """What belongs to an item besides its output: name -> final path. `make` leaves each as `name` in the folder of
        `out`, and it is moved when the output is committed, so that it is never that of another command."""
        return {}

    def together(self) -> dict[str, Any]:
        """What commands must have in common to be at work in one folder at the same time; flat, plain JSON values."""
        return self.settings()

    def begin(self) -> None:
        """Called once in a command that has something to make, before the first item, when no other command with other
        settings is at work: what describes all outputs is written here."""

    def recorded(self) -> list[str]:
        """Called instead of `begin` in a command that has nothing to make: what `begin` wrote and is damaged is written
        anew. Returns lines that say so."""
        return []

    def prefetch(self, item: Item) -> None:
        """A hint that `item` will be made next; starting to read it is allowed. Does nothing by default."""

    def parts(self) -> list[Stage]:
        """Copies of this stage for devices that may work side by side, each in a process of its own; usually none."""
        return []

    def remake_fields(self) -> frozenset[str]:
        """Settings whose change can be applied to an existing output by `remake`, without its inputs."""
        return frozenset()

    def unrecorded(self) -> frozenset[str]:
        """Fields that outputs of earlier versions do not record. Where one is missing, the others decide."""
        return frozenset()

    def implied(self, item: Item, field: str, value: Any, seal: dict[str, Any]) -> bool:
        """Whether the finished output of `item`, whose record `seal` lacks `field`, was made with `value` of it."""
        return field in self.unrecorded() or fingerprints.implied(field, value, seal, item.output)

    def expect(self, items: list[Item]) -> None:
        """Called before the `fields` of finished `items` are asked for: what they cost may be paid for all at once."""

    def meaning(self, field: str) -> str:
        """What it means, in words, that outputs differ in `field`; empty where the values say it."""
        return ""

    def lacks(self, item: Item) -> bool:
        """Whether something beside the finished output of `item`, such as a picture of it, is wanted and missing."""
        return False

    def make_beside(self, item: Item, private: Path) -> None:
        """Make what `lacks` misses, without touching the output. private: an existing folder for what is half-made."""
        raise NotImplementedError

    def remake(self, item: Item, old: Path, out: Path) -> Made:
        """Fill `out` from the finished output `old` that differs in `remake_fields()` only."""
        raise NotImplementedError

    def close(self) -> None:
        """Called once in each process when its items are done."""

    def fields(self, item: Item) -> dict[str, Any]:
        """Everything that decides the bytes of the output, field by field."""
        inputs = {f"input.{k}": v for k, v in item.inputs.items()}
        return {"stage": self.name, "format": layout.FORMAT, **self.settings(), **inputs}


@dataclass
class Plan:
    """What a command does with a stage: made once, before anything else, and read by the dry run, the submission, the
    runner, the progress on the terminal and the log.

    todo: missing. remake: to be derived from the existing output. done: committed before. differ: (item, {field: (old,
    new)}) that exist with other parameters. damaged: key -> what is wrong with what is there, of those among `todo`
    that are made anew for it. spent: checkpoints of what is done: a command was killed between its last two steps."""

    stage: Stage
    todo: list[Item] = field(default_factory=list)
    remake: list[Item] = field(default_factory=list)
    done: list[Outcome] = field(default_factory=list)
    differ: list[tuple[Item, dict[str, tuple[Any, Any]]]] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    spent: list[Path] = field(default_factory=list)

    @property
    def anew(self) -> list[Item]:
        """What is made anew, where that is permitted, since it exists with other parameters."""
        return [item for item, _ in self.differ]

    @property
    def keys(self) -> list[str]:
        """Keys of all that is not done, in the order in which it is made."""
        return [item.key for item in (*self.todo, *self.anew, *self.remake)]

    def permit(self, replace: bool) -> None:
        """Raises Refused where outputs of other parameters exist that must not be replaced."""
        if self.differ and not replace:
            raise Refused(refusal(self.stage, self.differ))


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


_AT_ONCE = 1024  # seals held in memory while planning: 3 MB


CHECKPOINTS = ".partial"  # folder of a stage's checkpoints: <key>/<fingerprint of what is being made>/


def plan(stage: Stage, items: Iterable[Item]) -> Plan:
    """Compare each item with what is there. Reads one small file per item, looks at the sizes of its others and writes
    nothing: 0.25 ms of the processor for a slide's features, which are 4 files, and 0.04 for what is not there."""
    result = Plan(stage)
    stage.settings()  # a plug-in that does not exist is told once, and not by every item
    every = iter(items)
    checkpoints = (stage.root / CHECKPOINTS).is_dir()
    while some := list(islice(every, _AT_ONCE)):
        there = [(item, None if item.wrong else seals.look(item.output, item.seal)) for item in some]
        stage.expect([item for item, found in there if found is not None])
        for item, found in there:
            if found is None:
                result.todo.append(item)
            else:
                _compare(item, found, result)
                if checkpoints and (spent := stage.root / CHECKPOINTS / item.key / found.fingerprint).is_dir():
                    result.spent.append(spent)
    return result


def _compare(item: Item, found: Found, result: Plan) -> None:
    """Put one item that is there where it belongs in `result`."""
    stage = result.stage
    fields = fields_beside(stage, item, found)
    if not found.wrong and found.fingerprint == layout.fingerprint(fields) and stage.lacks(item):
        result.remake.append(item)
        return
    if not found.wrong and found.fingerprint == layout.fingerprint(fields):
        empty = found.attrs.get("empty")
        result.done.append(Outcome(item.key, State.EMPTY if empty else State.SKIPPED, message=str(empty or "")))
        return
    differences = found.differences(fields)
    if found.wrong or not differences:
        result.todo.append(item)
        result.damaged[item.key] = found.wrong or "its seal is damaged"
    elif differences.keys() <= stage.remake_fields():
        result.remake.append(item)
    else:
        result.differ.append((item, differences))


def is_made(stage: Stage, item: Item) -> bool:
    """Whether the output of `item` is there, whole, and was made with the same fields."""
    found = seals.look(item.output, item.seal)
    return found is not None and fits(stage, item, found)


def fits(stage: Stage, item: Item, found: Found) -> bool:
    """Whether what was found of `item` is whole and was made with the same fields."""
    return not found.wrong and found.fingerprint == layout.fingerprint(fields_beside(stage, item, found))


def fields_beside(stage: Stage, item: Item, found: Found) -> dict[str, Any]:
    """The item's fields, to be compared with those of what was found: without those that were not recorded yet when it
    was made."""
    fields = stage.fields(item)
    if found.fingerprint == layout.fingerprint(fields):
        return fields
    return as_recorded(stage, item, fields, found.attrs)


def as_recorded(stage: Stage, item: Item, fields: dict[str, Any], seal: dict[str, Any]) -> dict[str, Any]:
    """`fields` without those that an output of an earlier version does not record, and was made with all the same."""
    old = seal.get("settings", {})
    known = {k: v for k, v in fields.items() if k in old or not stage.implied(item, k, v, seal)}
    return {k: fingerprints.as_once_called(k, v, old.get(k), fields) for k, v in known.items()}


def told(differences: dict[str, tuple[Any, Any]]) -> str:
    """Which fields differ, with the old and the new value of each."""
    return "; ".join(f"{k}: {old!r} there, {new!r} now" for k, (old, new) in differences.items())


def refusal(stage: Stage, differ: list[tuple[Item, dict[str, tuple[Any, Any]]]]) -> str:
    """The message for outputs of other parameters: which fields, old and new values, and the two ways out."""
    groups: dict[str, list[str]] = {}
    for item, differences in differ:
        text = "; ".join(_difference(stage, k, old, new) for k, (old, new) in differences.items())
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


def _difference(stage: Stage, field: str, old: Any, new: Any) -> str:
    meaning = stage.meaning(field)
    return f"{field}: {old!r} there, {new!r} now" + (f" ({meaning})" if meaning else "")
