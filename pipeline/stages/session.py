"""What every verb works with: the work folder, the settings, one stage through a back end, or handed to a scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhim.configs import lookup
from mhim.configs.schema import Config
from mhim.pipeline.backends import slurm
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.resume import console, leftovers, runner
from mhim.pipeline.resume import stage as stages_core
from mhim.pipeline.resume.runlog import RunLog, label
from mhim.pipeline.resume.stage import Item, Outcome, Plan, Stage
from mhim.pipeline.store import layout

if TYPE_CHECKING:
    pass


FEW = 20  # so many items a dry run lists by itself


MOST_REASONS = 20


@dataclass(frozen=True)
class Session:
    """What every verb needs: where, with which settings, which share, and how bold."""

    work: layout.Work
    config: Config
    replace: bool = False
    dry_run: bool = False
    list_all: bool = False
    shard: tuple[int, int] | None = None
    only: Path | None = None

    def share(self, items: list[Item]) -> list[Item]:
        """The items of this shard: every n-th, so that neighbouring (similarly large) slides spread over the shards.

        Where `only` names a list of keys, the shard is a share of that list, whatever else is there by now."""
        i, n = self.shard or (1, 1)
        wanted = self.wanted
        return items[i - 1 :: n] if wanted is None else [item for item in items if item.key in wanted]

    @property
    def wanted(self) -> set[str] | None:
        """The keys of this shard's share of `only`; None where nothing names keys."""
        i, n = self.shard or (1, 1)
        if self.only is None:
            return None
        try:
            return set(self.only.read_text().splitlines()[i - 1 :: n])
        except OSError as error:
            raise CohortError(f"--items {self.only} cannot be read: {error.strerror}") from error

    @property
    def submits(self) -> bool:
        """Whether the back end hands the commands to a scheduler instead of making the items itself."""
        return hasattr(lookup.find("mhim.pipeline.backends", self.config.cluster.backend), "submit")


def run_stage(session: Session, stage: Stage, args: list[str] | None = None) -> int:
    """Run one stage through the configured back end and tell how it went; or submit its verb, called with `args`.

    Raises Stopped where nothing more can be made (a full disk, say): what follows the stage is not to begin either."""
    cluster = session.config.cluster
    module = lookup.find("mhim.pipeline.backends", cluster.backend)
    if session.dry_run:
        return show_plan(session, stage)
    if session.submits:
        keys = to_do(session, stage)
        if not keys:
            console.err.print(f"[bold]{stage.name}[/]: nothing to do")
            return 0
        return submit(session, [slurm.Step(stage.name, args or [], len(keys), keys)])

    def backend(stage: Stage, items: list[Item], replace: bool, remake: bool) -> Iterator[Outcome]:
        outcomes: Iterator[Outcome] = module.run(stage, items, replace, remake, cluster)
        return outcomes

    leftovers.sweep_work(session.work, cluster.lease_s)
    log = RunLog(session.work.runs, label(stage), session.config, about=_about(stage, args or []))
    with runner.leaving(), log, console.Progressing(stage.name) as progress:

        def planned(plan: Plan) -> None:
            progress.planned(plan)
            log.planned(plan)

        def watch(outcome: Outcome) -> None:
            log.watch(outcome)
            progress.watch(outcome)

        report = runner.run(
            stage,
            backend,
            lease_s=cluster.lease_s,
            replace=session.replace,
            only=session.share,
            watch=watch,
            planned=planned,
        )
        log.finished(report)
    console.finish(report)
    if report.stopped:
        raise stages_core.Stopped(report.stopped)
    if log.broken:
        console.err.print(f"[yellow]the log of this run is incomplete[/]: {console.escape(log.broken)}")
    return report.exit_code


def _about(stage: Stage, args: list[str]) -> dict[str, str]:
    """What `retry` needs to know of a stage besides its settings."""
    new = {"new": "1"} if stage.name == "score" and not getattr(stage, "folds", True) else {}
    return new | ({"labels": args[args.index("--labels") + 1]} if "--labels" in args else {})


def to_do(session: Session, stage: Stage) -> list[str]:
    """Keys of the items that are not done. Raises Refused before anything is submitted."""
    todo = stages_core.plan(stage, session.share(stage.items()))
    if todo.differ and not session.replace:
        raise stages_core.Refused(stages_core.refusal(stage, todo.differ))
    return [item.key for item in (*todo.todo, *(item for item, _ in todo.differ), *todo.remake)]


def submit(session: Session, steps: list[slurm.Step]) -> int:
    """Hand `steps` to the scheduler, print the job numbers, and follow them if asked to."""
    params = lookup.params(slurm, session.config.cluster.backend_params)
    folder, arrays = slurm.submit(session.work, session.config, steps, session.replace)
    for array in arrays:
        tasks = f"{array.tasks} task{'s' * (array.tasks != 1)}, {array.items} item{'s' * (array.items != 1)}"
        console.out.print(f"{array.verb}: job {array.job} ({tasks})")
    console.out.print(f"scripts, settings and logs: {folder}; look with `pipeline status --work {session.work.root}`")
    return slurm.follow(session.work, folder, params.poll_s, console.err.print) if params.wait else 0


def show_plan(session: Session, stage: Stage) -> int:
    """What a run would do: how many items for which reason, then the items, where they are few or asked for. Changes
    nothing."""
    plan = stages_core.plan(stage, session.share(stage.items()))
    replace = "replace" if session.replace else "refuse"
    lines = [("make", item.key, item.wrong or plan.damaged.get(item.key, "missing")) for item in plan.todo]
    lines += [("derive", item.key, "only filter thresholds differ") for item in plan.remake]
    lines += [(replace, item.key, _difference(fields)) for item, fields in plan.differ]
    lines += [("skip", o.key, f"{o.state.value}, same fingerprint") for o in plan.done]
    console.out.print(f"{stage.name}: {len(lines)} items" if lines else f"{stage.name}: nothing to do")
    groups = Counter((what, why) for what, _, why in lines if what != replace)
    # what an item is made from differs from item to item: counted by its name
    groups.update((replace, _difference(fields, values=False)) for _, fields in plan.differ)
    for (what, why), n in groups.most_common(MOST_REASONS):
        console.out.print(f"{n:7} {what:7} {console.escape(why)}")
    if len(groups) > MOST_REASONS:
        console.out.print(f"        ... and {len(groups) - MOST_REASONS} other reasons")
    if session.list_all or len(lines) <= FEW:
        for what, key, why in lines:
            console.out.print(f"{what:7} {console.escape(key)}: {console.escape(why)}")
    else:
        console.out.print("each item by name: --dry-run --list")
    return 3 if plan.differ and not session.replace else 0


def _difference(fields: dict[str, tuple[Any, Any]], values: bool = True) -> str:
    """Which fields differ, one text. values: tell old and new also of an item's own inputs."""
    return "; ".join(
        f"{k}: {old!r} there, {new!r} now" if values or not k.startswith("input.") else f"{k} differs"
        for k, (old, new) in fields.items()
    )


def tell(notes: Iterable[str]) -> None:
    """What was guessed, left out or left alone, one line each."""
    for note in notes:
        console.err.print(console.escape(note))
