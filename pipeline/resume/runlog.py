"""What each command did: `runs/<id>.jsonl`, one line per event, append-only, and `runs/<id>.summary.md` for a person.

In: a stage, its settings and the outcomes as they come. Out: two files per command that had something to do; one file
has one writer, so that many tasks of a cluster never mix their lines. Times, hosts and versions live here and never in
an output. Knows nothing of slides or models; only the reasons of failures, the commands to try them again, and what
a command set out to make are ever read back.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from mhim.configs.schema import Config
from mhim.pipeline.resume import rates
from mhim.pipeline.resume.live import Live
from mhim.pipeline.resume.stage import Outcome, Plan, Report, Stage, State
from mhim.pipeline.store import layout, writing

# named by the summary; read from the installed packages' metadata, which imports none of them
PACKAGES = ("mhim-pipeline", "numpy", "torch", "timm", "openslide-python", "zarr", "scikit-image", "scikit-learn")

_NAMED = 500  # a plan of so many items at most names them in the log: a training's folds, not an archive's slides

SUBMITTED_BY = "PIPELINE_SUBMITTED_BY"  # set in the tasks of a scheduler: the name of the back end that submitted them
MIRROR = "PIPELINE_LOG_JSON"  # set by `pipeline --log-json`, so that jobs and workers inherit it


def label(stage: Stage) -> str:
    """A stage's name in logs and in `pipeline status`: `tile`, `extract texture`, `train mhim` ..."""
    return stage.name if stage.root.name in ("tiles", "maps") else f"{stage.name} {stage.root.name}"


class RunLog:
    """The log of one stage in one command. Use as a context manager; hand `planned` and `watch` to `stage.run`.

    about: what a repetition needs besides the settings (`labels`; `run`, whose answers colour a map; `new`, if the
    slides are none of the work folder's). mirror: also print every event as a JSON line to standard error
    (`--log-json`); None asks the environment. A log that cannot be written (full disk) never stops the work: `broken`
    says why, and the summary is left out.
    """

    def __init__(
        self,
        runs: Path,
        verb: str,
        config: Config | None = None,
        mirror: bool | None = None,
        about: dict[str, str] | None = None,
    ) -> None:
        self.runs = runs
        self.verb = verb
        self.mirror = MIRROR in os.environ if mirror is None else mirror
        self.broken = ""
        self.started = time.time()
        self.id = f"{_utc(self.started):%Y%m%dT%H%M%S}-{verb.replace(' ', '-')}-{uuid.uuid4().hex[:6]}"
        self._outcomes: list[Outcome] = []
        self._report: Report | None = None
        self._head: dict[str, Any] = {
            "event": "start",
            "verb": verb,
            "host": platform.node(),
            "pid": os.getpid(),
            "command": sys.argv,
            "folder": os.getcwd(),
            "settings": layout.fingerprint(config.model_dump(mode="json")) if config else "",
            **({"asked": config.model_dump(mode="json", exclude_defaults=True)} if config else {}),
            **(about or {}),
        }
        slurm = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
        self._place = {name: os.environ[name] for name in slurm if name in os.environ}
        self._head |= self._place
        if SUBMITTED_BY in os.environ:
            self._head["submitted_by"] = os.environ[SUBMITTED_BY]
        self._begun = False

    @property
    def path(self) -> Path:
        return self.runs / f"{self.id}.jsonl"

    @property
    def summary(self) -> Path:
        """Written at the end."""
        return self.path.with_suffix(".summary.md")

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._begun:
            return
        stopped = f"{kind.__name__}: {error}" if kind else self._report.stopped if self._report else ""
        self.event({"event": "end", "seconds": round(time.time() - self.started, 3), "stopped": stopped})
        if not self.broken:
            try:
                writing.write_atomic(self.summary, self._summary(stopped))
            except OSError as problem:
                self.broken = str(problem)

    def planned(self, plan: Plan) -> None:
        """Note the plan. A command with nothing to do leaves no log."""
        if keys := plan.keys:
            named = {"keys": keys} if len(keys) <= _NAMED else {}
            self.event({"event": "plan", "stage": self.verb, "todo": len(keys), "done_before": len(plan.done), **named})

    def watch(self, outcome: Outcome) -> None:
        """Note one outcome."""
        self._outcomes.append(outcome)
        fields = {k: v for k, v in asdict(outcome).items() if v not in ("", (), {})}
        if told := rates.told(outcome.numbers):
            fields["rates"] = told
        self.event({"event": "item", "stage": self.verb, **fields, "seconds": round(outcome.seconds, 3)})

    def under_way(self, found: dict[str, Live]) -> None:
        """Note how far the items under way have come."""
        items = {key: {k: v for k, v in asdict(one).items() if v not in (None, "", {})} for key, one in found.items()}
        self.event({"event": "under_way", "stage": self.verb, "items": items})

    def finished(self, report: Report) -> None:
        """The report, for the summary."""
        self._report = report

    def event(self, fields: dict[str, Any]) -> None:
        """Append one line (`t`, UTC, is added)."""
        if not self._begun:
            self._begun = True
            self.event({**self._head, "versions": versions()})
        line = json.dumps({"t": f"{_utc(time.time()):%Y-%m-%dT%H:%M:%S.%fZ}", **fields}, ensure_ascii=False) + "\n"
        if self.mirror:
            sys.stderr.write(line)
            sys.stderr.flush()
        if self.broken:
            return
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as f:  # one write per line: a kill tears the last line at most
                f.write(line.encode(errors="backslashreplace"))  # as JSON itself writes what is no text
        except OSError as error:
            self.broken = f"{self.path}: {error.strerror or error}"

    def _summary(self, stopped: str) -> str:
        worked = [o for o in self._outcomes if o.state in (State.DONE, State.EMPTY, State.FAILED)]
        seconds = sorted(o.seconds for o in worked)
        counts = {s.value: sum(o.state is s for o in self._outcomes) for s in State}
        before = len(self._report.outcomes) - len(self._outcomes) if self._report else 0
        rows = [
            ("what", self.verb),
            ("command", f"`{' '.join(map(str, self._head['command']))}`"),
            ("where", f"{self._head['host']}, process {self._head['pid']}"
                + "".join(f", {k} {v}" for k, v in self._place.items())),
            ("started", f"{_utc(self.started):%Y-%m-%d %H:%M:%S} UTC"),
            ("took", f"{time.time() - self.started:.1f} s"),
            ("items", ", ".join(f"{n} {s}" for s, n in counts.items() if n) + f"; {before} done before"),
            ("settings", self._head["settings"]),
            ("versions", ", ".join(f"{k} {v}" for k, v in versions().items())),
        ]  # fmt: skip
        if seconds:
            mid = seconds[len(seconds) // 2]
            rows.append(("seconds per item", f"median {mid:.2f}, longest {seconds[-1]:.2f}, sum {sum(seconds):.1f}"))
        totals: dict[str, float] = {}
        for outcome in worked:
            for name, value in outcome.numbers.items():
                totals[name] = totals.get(name, 0.0) + value
        rows += [(f"sum of {name}", f"{value:g}") for name, value in sorted(totals.items())]
        if told := rates.told(totals):
            rows.append(("rates", told))
        if stopped:
            rows.append(("stopped early", stopped))
        lines = [f"# {self.id}", "", "| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows), ""]
        for title, state in (("Failed", State.FAILED), ("Empty", State.EMPTY)):
            of = [o for o in self._outcomes if o.state is state]
            if of:
                lines += [f"## {title}", "", "| item | reason |", "|---|---|"]
                lines += [f"| {_cell(o.key)} | {_cell(o.message)} |" for o in sorted(of, key=lambda o: o.key)] + [""]
        slow = sorted(worked, key=lambda o: -o.seconds)[:5]
        if len(worked) > 5:
            lines += ["## Slowest", "", "| item | s |", "|---|---|"]
            lines += [f"| {_cell(o.key)} | {o.seconds:.1f} |" for o in slow] + [""]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result or a time."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of one log. A torn last line, of a process that was killed while writing, is ignored."""
    with open(path, "rb") as f:
        for line in f:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def last_outcomes(runs: Path) -> dict[tuple[str, str], Outcome]:
    """The newest logged outcome of each (stage label, key), over all logs in `runs`."""
    return {
        at: Outcome(
            event["key"],
            State(event["state"]),
            event.get("seconds", 0.0),
            event.get("message", ""),
            tuple(event.get("notes", ())),
            event.get("numbers", {}),
            event.get("trace", ""),
        )
        for at, (event, _) in _newest(runs).items()
    }


def last_failures(runs: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """For each (stage label, key) whose newest outcome is a failure: the start event of the log that tells of it."""
    failed = {at: path for at, (event, path) in _newest(runs).items() if event["state"] == State.FAILED}
    starts = {path: next(events(path)) for path in set(failed.values())}
    return {at: starts[path] for at, path in failed.items()}


def planned_keys(runs: Path) -> dict[str, set[str]]:
    """Stage label -> keys that its newest command wanted to make, with those of other commands of equal settings (its
    shards). Large plans do not name their keys."""
    plans = []
    for path in runs.glob("*.jsonl") if runs.is_dir() else []:
        first = list(itertools.islice(events(path), 2))
        if [event.get("event") for event in first] == ["start", "plan"] and "keys" in first[1]:
            plans.append((first[0]["t"], first[1]["stage"], first[0]["settings"], first[1]["keys"]))
    newest: dict[str, tuple[str, set[str]]] = {}
    for _, stage, settings, keys in sorted(plans, reverse=True):
        wanted, found = newest.setdefault(stage, (settings, set()))
        if settings == wanted:
            found.update(keys)
    return {stage: found for stage, (_, found) in newest.items()}


def _newest(runs: Path) -> dict[tuple[str, str], tuple[dict[str, Any], Path]]:
    newest: dict[tuple[str, str], tuple[dict[str, Any], Path]] = {}
    for path in sorted(runs.glob("*.jsonl")) if runs.is_dir() else []:
        for event in events(path):
            if event.get("event") != "item":
                continue
            at = (event["stage"], event["key"])
            if at not in newest or newest[at][0]["t"] <= event["t"]:
                newest[at] = (event, path)
    return newest


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
