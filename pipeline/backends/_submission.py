"""What every scheduler has in common: the folder of a submission, what its tasks say of themselves, and following them.

In: the verbs to submit. Out: frozen settings and items in `work/jobs/<id>/`, the arguments of the tasks, the state of
every array. Knows no scheduler: `job.json` says which back end submitted, and that one is asked. Nothing about a job
decides what is finished: outputs do.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from mhim.configs import load, lookup, plugins_named, trust
from mhim.configs.schema import ClusterConfig, Config, Settings
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.store import layout, reading, writing

PACKAGE = "mhim.pipeline.backends"
MISSES = 30  # so often in a row a scheduler may leave a question of `follow` unanswered
FIRST = "slurm"  # whose submissions of version 0.1 do not say which back end made them


class SchedulerParams(Settings):
    """What `cluster.backend_params` may hold for every scheduler; its own `Params` adds to it."""

    wait: bool = Field(False, description="follow the jobs until they end")
    poll_s: float = Field(10.0, gt=0, description="how often --wait looks, s")


@dataclass(frozen=True)
class Step:
    """One verb to submit. args: its own arguments. items: keys to make, or None for whatever is there by then.
    most: the number of items, as far as it can be known now."""

    verb: str
    args: list[str]
    most: int
    items: list[str] | None = None


@dataclass(frozen=True)
class Submitted:
    """One array as `job.json` remembers it."""

    verb: str
    job: str
    tasks: int
    items: int
    script: str


@dataclass
class ArrayState:
    """What the tasks (1 to `array.tasks`) of one array are doing. ended: task -> exit code, as its script noted it.
    unasked: why the scheduler could not be asked; nothing is known then of tasks that did not end. silent: it may
    answer the next time. damaged: why the folder's own record tells nothing."""

    array: Submitted
    folder: Path
    running: dict[int, str] = field(default_factory=dict)  # task -> node
    waiting: dict[int, str] = field(default_factory=dict)  # task -> the scheduler's reason
    ended: dict[int, int] = field(default_factory=dict)
    requeued: int = 0
    unasked: str = ""
    silent: bool = False
    damaged: str = ""

    @property
    def lost(self) -> list[int]:
        """Tasks that the scheduler does not know any more and that never said how they ended: cancelled, or a dead
        node."""
        known = self.running.keys() | self.waiting.keys() | self.ended.keys()
        return [] if self.unasked else [t for t in range(1, self.array.tasks + 1) if t not in known]

    @property
    def over(self) -> bool:
        if self.damaged:
            return False
        if self.unasked:
            return len(self.ended) >= self.array.tasks
        return not self.running and not self.waiting

    def line(self) -> str:
        """One line for a person."""
        if self.damaged:
            return f"jobs/{self.folder.name}: {self.damaged}"
        nodes = ", ".join(sorted(set(self.running.values())))
        reasons = ", ".join(sorted(set(self.waiting.values()) - {"None"}))
        bad = sum(code != 0 for code in self.ended.values())
        parts = [f"{len(self.running)} running" + (f" on {nodes}" if nodes else "")]
        parts += [f"{len(self.waiting)} waiting" + (f" ({reasons})" if reasons else "")]
        if self.unasked:
            parts = [f"{self.array.tasks - len(self.ended)} not ended; its scheduler cannot be asked: {self.unasked}"]
        parts += [f"{len(self.ended)} ended" + (f", {bad} of them not well" if bad else "")]
        parts += [f"{len(self.lost)} lost (cancelled, or their node died)"] if self.lost else []
        parts += [f"requeued {self.requeued} times"] if self.requeued else []
        return f"job {self.array.job} {self.array.verb}: {'; '.join(parts)}"


class JobFolder:
    """The folder of one submission: `<verb>.yaml` and `<verb>.items` are frozen for the tasks, `job.json` remembers the
    arrays, `ends` is where each task notes how it ended, and `refused` stops the steps that are still to come.

    A line of `ends` has six words: verb, task, how often it was started before, exit code (or `requeued:<code>`), host,
    time. A task sets PIPELINE_SUBMITTED_BY to the back end's name, so that its log says who submitted it."""

    def __init__(self, path: Path, work: layout.Work) -> None:
        self.path = path
        self.work = work.root.resolve()

    @classmethod
    def new(cls, work: layout.Work) -> JobFolder:
        """An empty one, with `logs/` in it."""
        path = work.root.resolve() / "jobs" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"
        (path / "logs").mkdir(parents=True)
        return cls(path, work)

    def freeze(self, step: Step, config: Config, workers: int) -> None:
        """Write what the tasks of `step` read. workers: parallel processes of one task, on its own machine."""
        cluster = ClusterConfig(workers=workers, lease_s=config.cluster.lease_s)
        writing.write_atomic(self.path / f"{step.verb}.yaml", load.template(_for_a_file(config, cluster)))
        if step.items is not None:
            writing.write_atomic(self.path / f"{step.verb}.items", "".join(f"{key}\n" for key in step.items))

    def arguments(self, step: Step, replace: bool = False) -> list[str]:
        """The program's arguments for `step`; a task adds its share, `--shard i/n`."""
        given = ["--work", str(self.work), "--config", str(self.path / f"{step.verb}.yaml")]
        given += ["--items", str(self.path / f"{step.verb}.items")] if step.items is not None else []
        given += ["--replace"] if replace else []
        return [step.verb, *step.args, *given, *plugins_named.flags()]

    def remember(self, backend: str, arrays: list[Submitted]) -> None:
        """Write `job.json`, as far as the submission has come."""
        card = {
            "submitted": time.time(),
            "command": sys.argv,
            "backend": backend,
            "arrays": [asdict(array) for array in arrays],
        }
        writing.write_atomic(self.path / "job.json", json.dumps(card, indent=2) + "\n")

    def drop(self) -> None:
        """Remove the folder of a submission that came to nothing."""
        shutil.rmtree(self.path)


def _for_a_file(config: Config, cluster: ClusterConfig) -> Config:
    """The settings of the tasks; what no file may say stands in the command line (`plugins_named.flags`)."""
    params = {k: v for k, v in config.extract.encoder_params.items() if k != trust.REMOTE_CODE}
    extract = config.extract.model_copy(update={"encoder_params": params})
    return config.model_copy(update={"cluster": cluster, "extract": extract})


def submits(backend: str) -> bool:
    """Whether a back end hands verbs to a scheduler instead of making items itself. Raises LookupFailed."""
    return hasattr(lookup.find(PACKAGE, backend), "submit")


def jobs(work: layout.Work, folder: Path | None = None) -> list[ArrayState]:
    """The state of every array submitted from this work folder (or of one job folder), oldest first. A folder whose
    record is damaged says so, and stops no other."""
    folders = [folder] if folder else sorted(p.parent for p in (work.root / "jobs").glob("*/job.json"))
    by_backend: dict[str, list[ArrayState]] = {}
    arrays: list[ArrayState] = []
    for at in folders:
        try:
            card = reading.read_json(at / "job.json")
            submitted = [Submitted(**raw) for raw in card["arrays"]]
        except (layout.StoreError, OSError, KeyError, TypeError) as error:
            why = str(error) if isinstance(error, layout.StoreError) else f"job.json is no record of jobs: {error!r}"
            arrays.append(ArrayState(Submitted("", at.name, 0, 0, ""), at, damaged=why))
            continue
        ends = ends_of(at)
        for array in submitted:
            noted = ends.get(array.verb, [])
            ended = {task: int(code) for task, code in noted if not code.startswith("requeued")}
            requeued = sum(code.startswith("requeued") for _, code in noted)
            arrays.append(ArrayState(array, at, ended=ended, requeued=requeued))
            by_backend.setdefault(str(card.get("backend", FIRST)), []).append(arrays[-1])
    for backend, states in by_backend.items():
        _ask(backend, states)
    return arrays


def _ask(backend: str, states: list[ArrayState]) -> None:
    """Have the back end say what its tasks are doing. Its name stands in a file: it imports nothing but what ships or
    was named in this command."""
    silent = False
    try:
        look: Callable[[list[ArrayState]], str] | None = getattr(lookup.find(PACKAGE, backend), "look", None)
        unasked = look(states) if look else f"{backend!r} submits nothing"
    except lookup.LookupFailed as error:
        unasked = str(error)
    except Stopped as error:  # a busy controller may not answer for minutes; the jobs do not mind
        unasked, silent = str(error), True
    for state in states:
        state.unasked, state.silent = unasked, silent


def ends_of(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Per verb, (task, code) as the tasks noted them, in order; a torn line is ignored."""
    ends: dict[str, list[tuple[int, str]]] = {}
    try:
        lines = (folder / "ends").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ends
    for line in lines:
        words = line.split()
        if len(words) == 6 and words[1].isdigit() and (words[3].isdigit() or words[3].startswith("requeued:")):
            ends.setdefault(words[0], []).append((int(words[1]), words[3]))
    return ends


def follow(
    work: layout.Work,
    folder: Path,
    poll_s: float,
    say: Callable[[str], Any],
    meanwhile: Callable[[], Any] = lambda: None,
) -> int:
    """Tell how the jobs of `folder` go on until all are over. 0: every task ended well; 1: not; 3: refused.

    meanwhile: called each time before it waits. Raises Stopped where the scheduler cannot be asked."""
    last: list[str] = []
    misses = 0
    while True:
        states = jobs(work, folder)
        misses = misses + 1 if any(state.silent for state in states) else 0
        if not 0 < misses <= MISSES:
            lines = [state.line() for state in states]
            for line in lines:
                if line not in last:
                    say(line)
            last = lines
            if all(state.over for state in states):
                break
            if why := next((state.unasked or state.damaged for state in states if state.unasked or state.damaged), ""):
                raise Stopped(f"the jobs cannot be followed: {why}")
        meanwhile()
        time.sleep(poll_s)
    if (folder / "refused").exists():
        return 3
    return 0 if all(not s.lost and not any(s.ended.values()) for s in states) else 1
