"""What every verb works with: the work folder, the settings, one stage through a back end, or handed to a scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhim.configs import lookup
from mhim.configs.schema import Config
from mhim.pipeline import backends
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.resume import console, leftovers, runner
from mhim.pipeline.resume.runlog import RunLog, label
from mhim.pipeline.resume.stage import Item, Outcome, Plan, Stage, Stopped, plan
from mhim.pipeline.store import layout
from mhim.pipeline.upkeep.watch import Watch

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
        return backends.submits(self.config.cluster.backend)

    def plan(self, stage: Stage) -> Plan:
        """What there is to do of this session's share of a stage. Changes nothing."""
        return plan(stage, self.share(stage.items()))


def run_stage(session: Session, stage: Stage, args: list[str] | None = None) -> int:
    """Plan one stage and carry that out; `args` are its verb's own arguments. Raises as `carry_out`."""
    return carry_out(session, session.plan(stage), args or [])


def carry_out(session: Session, plan: Plan, args: list[str]) -> int:
    """Show a plan (dry run), submit its verb, called with `args`, or make its items through the configured back end and
    tell how it went.

    Raises Refused where outputs of other parameters exist and are not to be replaced, and Stopped where nothing more
    can be made (a full disk, say): what follows the stage is not to begin either."""
    if session.dry_run:
        return show(session, plan)
    if not plan.keys:
        tell(plan.stage.recorded())
    if session.submits:
        plan.permit(session.replace)
        if not plan.keys:
            console.err.print(f"[bold]{plan.stage.name}[/]: nothing to do")
            return 0
        return submit(session, [backends.Step(plan.stage.name, args, len(plan.keys), plan.keys)])
    return make(session, plan, args)


def make(session: Session, plan: Plan, args: list[str]) -> int:
    """Make what a plan says is missing. Returns and raises as `carry_out`."""
    cluster = session.config.cluster
    module = lookup.find("mhim.pipeline.backends", cluster.backend)

    def backend(stage: Stage, items: list[Item], replace: bool, remake: bool) -> Iterator[Outcome]:
        outcomes: Iterator[Outcome] = module.run(stage, items, replace, remake, cluster)
        return outcomes

    takes = getattr(module, "Params", None)
    if cluster.backend_params and not (takes and takes.model_fields):  # others refuse what they do not know
        names = ", ".join(sorted(cluster.backend_params))
        tell([f"the back end {cluster.backend} has no settings; not used of cluster.backend_params: {names}"])
    leftovers.sweep_work(session.work, cluster.lease_s)
    log = RunLog(session.work.runs, label(plan.stage), session.config, about=_about(plan.stage, args))
    with runner.leaving(), log, console.Progressing(plan.stage.name, log.under_way) as progress:

        def planned(plan: Plan) -> None:
            progress.planned(plan)
            log.planned(plan)

        def watch(outcome: Outcome) -> None:
            log.watch(outcome)
            progress.watch(outcome)

        report = runner.run(plan, backend, cluster.lease_s, session.replace, watch, planned)
        log.finished(report)
    console.finish(report, None if log.broken else log.summary)
    if report.stopped:
        raise Stopped(report.stopped)
    if log.broken:
        console.err.print(f"[yellow]the log of this run is incomplete[/]: {console.escape(log.broken)}")
    return report.exit_code


def _about(stage: Stage, args: list[str]) -> dict[str, str]:
    """What `retry` needs to know of a stage besides its settings."""
    new = {"new": "1"} if stage.name == "score" and not getattr(stage, "folds", True) else {}
    return new | {name: args[args.index(f"--{name}") + 1] for name in ("labels", "run") if f"--{name}" in args}


def submit(session: Session, steps: list[backends.Step]) -> int:
    """Hand `steps` to the scheduler, print the job numbers, and follow them if asked to."""
    cluster = session.config.cluster
    scheduler = lookup.find("mhim.pipeline.backends", cluster.backend)
    params = lookup.params(scheduler, cluster.backend_params)
    folder, arrays = scheduler.submit(session.work, session.config, steps, session.replace)
    for array in arrays:
        tasks = f"{array.tasks} task{'s' * (array.tasks != 1)}, {array.items} item{'s' * (array.items != 1)}"
        console.out.print(f"{array.verb}: job {array.job} ({tasks})")
    console.out.print(f"scripts, settings and logs: {folder}; look with `pipeline status --work {session.work.root}`")
    if not (isinstance(params, backends.SchedulerParams) and params.wait):
        return 0
    watch = Watch(session.work, lambda line: console.err.print(console.escape(f"  {line}")))
    return backends.follow(session.work, folder, params.poll_s, console.err.print, watch.minute)


def show(session: Session, plan: Plan) -> int:
    """What a run would do: how many items for which reason, then the items, where they are few or asked for. Changes
    nothing."""
    replace = "replace" if session.replace else "refuse"
    lines = [("make", item.key, item.wrong or plan.damaged.get(item.key, "missing")) for item in plan.todo]
    lines += [("derive", item.key, "only filter thresholds differ") for item in plan.remake]
    lines += [(replace, item.key, _difference(fields)) for item, fields in plan.differ]
    lines += [("skip", o.key, f"{o.state.value}, same fingerprint") for o in plan.done]
    name = plan.stage.name
    console.out.print(f"{name}: {len(lines)} items" if lines else f"{name}: nothing to do")
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
