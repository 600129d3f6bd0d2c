"""What failed, made again: the same verbs with the same settings, for the failed items only.

In: a work folder's run logs, which may be a stranger's. Out: exit codes. A log's record of its settings is data: it is
validated like any settings, names no code but what this command allows, and reaches nothing outside the work folder but
the slides of `cohort.csv`. Logs of version 0.1 hold a command line: the program's own parser reads it, and only its
settings are taken. What is refused comes with what a person can type instead. Nothing out of a log is ever executed.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mhim.configs import load, trust
from mhim.configs.load import ConfigError
from mhim.configs.schema import Config
from mhim.pipeline.resume import runlog
from mhim.pipeline.resume.stage import Refused
from mhim.pipeline.store import layout, writing

VERBS = {
    "tile": "tile",
    "extract": "extract",
    "train": "train",
    "score": "score",
    "draw": "score",
    "evidence": "score",
    "map": "map",
    "gallery": "map",
}  # of stage labels
_COMMANDS = ("tile", "extract", "train", "score", "run")  # whose command lines are read
_PLACES = ("weights", "cache_dir")  # settings that are paths


class CommandLine(Protocol):
    """A command line that was read and not carried out. config, sets, flags: as `configs.load.merged` takes them.
    params: every option by its name."""

    config: list[str]
    sets: list[str]
    flags: dict[str, Any]
    params: dict[str, Any]


@dataclass(frozen=True)
class Again:
    """A verb to give again. settings: plain, not validated yet. name: the run, or the map. labels: of a training or a
    map. run: folder of the one whose answers colour a map. line: the command that failed, for a person. keys: what
    failed. folder: where relative paths begin."""

    verb: str
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    labels: str = ""
    line: str = ""
    keys: tuple[str, ...] = ()
    folder: Path = Path()
    run: str = ""


def commands(work: layout.Work, read_line: Callable[[list[str]], CommandLine]) -> list[Again]:
    """What to give again so that all that failed is tried again, in the order of the verbs.

    read_line: the program's own parser, for logs of version 0.1, which hold nothing but a command line."""
    groups: dict[str, tuple[str, dict[str, Any], list[str]]] = {}
    for (label, key), start in sorted(runlog.last_failures(work.runs).items()):
        one = key if label == "map" else ""  # each is a command of its own
        same = json.dumps([label, start.get("asked"), start.get("command"), start.get("folder"), one], default=str)
        groups.setdefault(same, (label, start, []))[2].append(str(key))
    made = [_again(label, start, keys, read_line) for label, start, keys in groups.values()]
    order = {verb: n for n, verb in enumerate(VERBS)}
    return sorted(made, key=lambda a: order.get(a.verb, len(order)))


def _again(label: str, start: dict[str, Any], keys: list[str], read_line: Callable[[list[str]], CommandLine]) -> Again:
    stage, _, called = label.partition(" ")
    if stage in ("draw", "evidence", "gallery"):  # the run or map, then the folder in it
        called = called.rpartition(" ")[0]
    elif stage == "map":
        called = keys[0]
    said = start.get("command")
    line = " ".join(shlex.quote(str(a)) for a in said[1:]) if isinstance(said, list) else ""
    line = _shown(line)
    asked = start.get("asked")
    labels = str(start.get("labels", ""))
    if not isinstance(asked, dict):  # version 0.1
        try:
            asked, labels = _of_a_line([str(a) for a in said[1:]] if isinstance(said, list) else [], read_line)
        except ConfigError as error:
            return Again("", {}, _shown(str(error)), "", line, tuple(keys))
    by = start.get("submitted_by", "slurm" if "SLURM_ARRAY_JOB_ID" in start else "")  # version 0.1 knew SLURM only
    if by:  # a task's own settings say local, as it is on its node
        asked = {**asked, "cluster": {**_section(asked, "cluster"), "backend": str(by)}}
    verb = "" if start.get("new") else VERBS.get(stage, "")
    name = called if verb in ("train", "score", "map") else ""
    folder = Path(str(start.get("folder", ".")))
    return Again(verb, asked, name, labels, line, tuple(keys), folder, str(start.get("run", "")))


def _shown(text: str) -> str:
    """`text` without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _of_a_line(args: list[str], read_line: Callable[[list[str]], CommandLine]) -> tuple[dict[str, Any], str]:
    """The settings of a command line of version 0.1, and the labels it names.

    Raises ConfigError for all that is no verb with its own options."""
    args = args[1:] if args[:1] == ["--log-json"] else args
    if not args or args[0] not in _COMMANDS:
        raise ConfigError(f"{' '.join(args[:1]) or 'no verb'} is not repeated")
    given = read_line(args)
    for source in given.config:
        if source not in load.presets():
            raise ConfigError(f"its settings stand in the file {source!r}: give --config to this command")
    if (given.params.get("slides") is not None and args[0] == "score") or given.params.get("features") is not None:
        raise ConfigError("it scored new slides, which lie elsewhere")
    return load.merged(given.config, given.sets, given.flags), str(given.params.get("labels") or "")


def refused(again: Again, work: layout.Work, typed: Mapping[str, Any], labels: Path | None) -> str:
    """Why `again` is not made by this command, and what to type; "" if it is.

    typed: settings given to this command, which count instead of the log's."""
    return _shown(_why_not(again, work, typed, labels))


def _why_not(again: Again, work: layout.Work, typed: Mapping[str, Any], labels: Path | None) -> str:
    if not again.verb:
        return again.name or "it is not one of tile, extract, train, score, map of this work folder"
    lost = _section(again.settings, "cluster").get("backend", "local")
    if lost != "local" and "backend" not in _section(typed, "cluster"):
        return f"it ran on {lost!r}: say where it is to run, with --config or --set cluster.backend=..."
    for key, value in _strings({k: v for k, v in again.settings.items() if k != "cluster"}):
        if _typed(typed, key):
            continue
        if key[-1] == trust.REMOTE_CODE or (_is_place(key, value) and not _inside(again.folder / str(value), work)):
            setting = shlex.quote(f"{'.'.join(key)}={value}")
            return f"the log's {'.'.join(key)} = {value!r} is not taken: to take it, type --set {setting}"
    if again.run and (again.folder / again.run).resolve().parent != work.runs.resolve():
        return f"its run {again.run!r} is none of {work.runs}"
    if again.verb in ("train", "map") and labels is None and not _known_labels(again, work):
        return f"its labels {again.labels!r} lie outside of the work folder: type --labels {shlex.quote(again.labels)}"
    return ""


def make(again: Again, work: layout.Work, typed: Mapping[str, Any], labels: Path | None) -> int:
    """Give the verb again for the keys that failed. Returns its exit code. Raises as the verb does."""
    from mhim.pipeline.cohort import slides as cohort
    from mhim.pipeline.stages import map_verb, verbs
    from mhim.pipeline.stages import session as session_
    from mhim.pipeline.stages.tile import Tile

    merged: dict[str, Any] = {k: v for k, v in again.settings.items() if k != "cluster"}
    workers = _section(again.settings, "cluster").get("workers")
    merged["cluster"] = {"workers": workers} if isinstance(workers, int) else {}
    load.merge(merged, typed)
    config: Config = load.validate(merged)
    found = labels or (again.folder / again.labels if again.labels else None)
    if again.verb == "map":  # whole, with the gallery that hangs on it; what is there already stays
        run = (again.folder / again.run).resolve().name if again.run else None
        if run and not (work.runs / run).is_dir():
            raise Refused(f"{run!r} is no run of {work.root}")
        return map_verb.make(session_.Session(work, config), found if again.labels else None, again.name, run)
    listed = work.root.resolve() / "jobs" / f"retry-{time.time_ns():x}.items"
    writing.write_atomic(listed, "".join(f"{key}\n" for key in again.keys))
    session = session_.Session(work, config, only=listed)
    if again.verb == "tile":
        slides = cohort.read_cohort(work)
        return session_.run_stage(session, Tile(work, config, slides), [str(work.cohort.resolve())])
    if again.verb == "extract":
        return verbs.extract(session)
    if again.verb == "train":
        return verbs.train(session, found, again.name)
    if not (work.runs / again.name).is_dir():
        raise Refused(f"{again.name!r} is no run of {work.root}")
    return verbs.score(session, again.name)


def _known_labels(again: Again, work: layout.Work) -> bool:
    """Whether the labels lie in the work folder, or where they are looked for anyway."""
    from mhim.pipeline.cohort.labels.match import find_labels
    from mhim.pipeline.cohort.labels.rows import CohortError

    if not again.labels:
        return True
    path = again.folder / again.labels
    if _inside(path, work):
        return True
    try:
        return path.resolve() == find_labels(None, work).resolve()
    except CohortError:
        return False


def _section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _strings(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(key by key, value) of every value that is no mapping; of those of a list of texts each."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _strings(value, (*path, str(key)))
    elif path[:2] == ("tables", "groups") and isinstance(settings, (list, tuple)):
        for value in settings:
            if str(value).casefold().endswith((".gmt", ".gmt.gz")):
                yield path, value
    else:
        yield path, settings


def _typed(typed: Mapping[str, Any], key: tuple[str, ...]) -> bool:
    level: Any = typed
    for part in key:
        if not isinstance(level, Mapping) or part not in level:
            return False
        level = level[part]
    return True


def _is_place(key: tuple[str, ...], value: Any) -> bool:
    """Whether a setting may be a path: one of those that are, or a text of a plug-in that looks like one."""
    if value is None or not isinstance(value, str):
        return False
    if key[:2] in (("train", "tables"), ("tables", "groups")):
        return True
    inner = any(part.endswith("_params") for part in key[:-1])
    return key[-1] in _PLACES or (inner and (value[:1] in "/\\~" or ".." in value or ":" in value))


def _inside(path: Path, work: layout.Work) -> bool:
    try:
        return path.resolve().is_relative_to(work.root.resolve())
    except (OSError, ValueError):
        return False
