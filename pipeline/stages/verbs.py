"""Each verb's work: the cohort in, one stage run through a back end, the report told. Returns exit codes.

0 done, 1 some items failed, 2 usage, 3 refused because outputs of other parameters exist, 130 interrupted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mhim.configs import lookup
from mhim.configs.schema import Config
from mhim.pipeline.backends import slurm
from mhim.pipeline.cohort import listing
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.cohort.labels import match, of_patients, use
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.cohort.slides import CohortError
from mhim.pipeline.resume import console, leftovers, runner
from mhim.pipeline.resume import stage as stages_core
from mhim.pipeline.resume.runlog import RunLog, label
from mhim.pipeline.resume.stage import Item, Outcome, Plan, Stage
from mhim.pipeline.store import layout
from mhim.pipeline.store.names import readable

if TYPE_CHECKING:
    from mhim.pipeline.cohort.patients import Dataset

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


def tile(session: Session, source: Path, labels: Path | None = None) -> int:
    """Slides to tiles, with the mpp and regions that `labels` (or a manifest) tell of them."""
    from mhim.pipeline.stages.stages import Tile

    slides = _slides(session, source, labels)
    if not session.dry_run:
        cohort.remember(session.work, slides)
    args = [str(source.resolve()), *(["--labels", str(labels.resolve())] if labels else [])]
    return run_stage(session, Tile(session.work, session.config, slides), args)


def tell(notes: Iterable[str]) -> None:
    """What was guessed, left out or left alone, one line each."""
    for note in notes:
        console.err.print(console.escape(note))


def _slides(session: Session, source: Path, labels: Path | None) -> list[SlideEntry]:
    """The slides of `source` under the ids that the work folder knows them by. Tells which files are none."""
    known = cohort.read_cohort(session.work) if session.work.cohort.exists() else []
    wanted = session.wanted
    if wanted is not None and wanted <= {s.id for s in known}:
        return known  # a task of a scheduler: who submitted it has listed the slides, hundreds need not do it again
    found = use.slides_of(source, session.config, labels)
    tell(found.notes)
    if found.others:
        names = ", ".join(readable(p.name) for p in found.others[:5]) + (" ..." if len(found.others) > 5 else "")
        console.err.print(f"not slides, left alone: {len(found.others)} files ({console.escape(names)})")
    kinds: dict[str, list[str]] = {}
    for path, what in found.what.items():
        kinds.setdefault(what, []).append(path.name)
    for what, names_of in kinds.items():
        more = f" and {len(names_of) - 3} more" if len(names_of) > 3 else ""
        console.err.print(console.escape(f"  {', '.join(names_of[:3])}{more}: {what}"))
    return listing.settled(found.slides, known)


def extract(session: Session) -> int:
    """Tiles to features."""
    from mhim.pipeline.stages.stages import Extract

    slides = cohort.read_cohort(session.work)
    untiled = [s.id for s in slides if layout.stored(session.work.tile_store(s.id)) is None]
    if len(untiled) == len(slides):
        raise CohortError(f"none of the {len(slides)} slides in {session.work.root} is tiled; `pipeline tile` first")
    if untiled:
        console.err.print(f"without tiles, left out: {len(untiled)} slides ({console.escape(', '.join(untiled[:5]))})")
    config = session.config
    if (config.extract.gpu or config.extract.gpus) and config.cluster.backend == "local":
        from mhim.extract.encoders._torch import device_of

        device_of(config.extract)  # told before any work; on a cluster only the nodes can tell
    return run_stage(session, Extract(session.work, config, slides))


def plugins_there(config: Config) -> None:
    """Raise LookupFailed or EncoderError unless every plug-in that the settings name is there. What ships is told by
    its name; only a user's own is imported."""
    from mhim.extract import encoders

    encoders.known(config.extract.encoder)
    named = (
        ("mhim.extract.tissue", config.tile.segmenter),
        ("mhim.extract.tissue", config.tile.fallback_segmenter),
        ("mhim.mil.models", config.train.model),
        ("mhim.pipeline.backends", config.cluster.backend),
    )
    for package, name in named:
        if name and name.removeprefix(f"{package}.") not in lookup.names(package):
            lookup.find(package, name)


def run_all(session: Session, source: Path, labels: Path | None, name: str | None) -> int:
    """The four verbs in order. Failed items do not stop the next verb; the worst exit code is returned. Raises Stopped
    at the first verb that can make nothing more."""
    plugins_there(session.config)  # told before hours of tiling, as is a wrong or missing table
    # whose mpp and regions decide the tiles
    if labels is None:
        own = use.of_manifest(source, session.config.labels)
        labels = source if own else match.labels_beside(source, session.work)
    rows = label_table.read_rows(labels, session.config.labels)
    of_patients.joint_sites(rows, session.config.train.split_by)
    if session.submits:
        return submit_all(session, source, labels, name)
    codes = [tile(session, source, labels), extract(session), train(session, labels, name), score(session, name)]
    return max(codes)


def submit_all(session: Session, source: Path, labels: Path, name: str | None) -> int:
    """The four verbs as jobs, each after the one before. What can be wrong now is told now."""
    from mhim.pipeline.stages import runs
    from mhim.pipeline.stages.stages import Tile

    config = session.config
    found = labels.resolve()
    tiled = _slides(session, source, found)
    cohort.remember(session.work, tiled)
    keys = to_do(session, Tile(session.work, config, tiled))
    slides = [s.id for s in cohort.read_cohort(session.work)]
    cells = math.prod(len(values) for values in config.train.grid.values())
    trainings = cells * config.train.folds * config.train.repeats * config.train.seeds
    called = ["--name", runs.named(name, config.train.model)]
    steps = [slurm.Step("tile", [str(source.resolve()), "--labels", str(found)], len(keys), keys)] if keys else []
    steps += [
        slurm.Step("extract", [], len(slides), slides),
        slurm.Step("train", ["--labels", str(found), *called], trainings),
        slurm.Step("score", called, 1),
    ]
    return submit(session, steps)


def train(session: Session, labels: Path | None, name: str | None) -> int:
    """Features to models: one training per grid cell, seed and fold."""
    from mhim.pipeline.cohort import patients
    from mhim.pipeline.stages import runs
    from mhim.pipeline.stages.stages import Train

    config = session.config
    run = runs.named(name, config.train.model)
    found, data, config = to_train_on(session, labels)
    stage = Train(session.work, config, run, data, patients.make_folds(data, config.train))
    code = run_stage(session, stage, ["--labels", str(found.resolve()), "--name", run])
    if not (session.dry_run or session.submits):
        runs.show_folds(stage.root, console.out)
    return max(code, 1) if data.damaged else code


def to_train_on(session: Session, labels: Path | None) -> tuple[Path, Dataset, Config]:
    """The path of the labels, the patients of a training, and the settings with the columns that were read. Tells what
    is left out, and what would stop it later."""
    from mhim.pipeline.cohort import patients
    from mhim.pipeline.exchange import bag_table
    from mhim.pipeline.training import experiment_log, fold

    config = session.config
    if labels is None:  # bags from a table bring their labels along; those of digits are made here
        own = session.work.features(config.extract.encoder) / "labels.csv"
        labels = bag_table.ensure_digits(session.work, config.extract.encoder) or (own if own.is_file() else None)
    if not (session.work.root / "features").is_dir():
        raise CohortError(f"{session.work.root} holds no features; run `pipeline tile`, then `pipeline extract` first")
    found = match.find_labels(labels, session.work)
    table = label_table.read_table(found, config.labels)
    if not table.has_outcome:
        raise CohortError(
            f"{found} tells neither a class nor time and event; it has the columns "
            f"{', '.join(table.header)}: say which with --label-column, or --time-column and "
            "--event-column"
        )
    features = session.work.features(config.extract.encoder)
    data = patients.labelled(table.rows, features, config.train)
    late = use.too_late(table, features, session.work)
    tell((*table.notes, *data.notes, *data.order, *late, *patients.duplicates(data, session.work)))
    if config.train.protocol == "paper":
        console.err.print("[yellow]protocol paper[/]: the epoch is chosen on the test fold; the numbers are optimistic")
    if config.cluster.backend == "local":
        fold.device(config.train.gpu)  # told before any work; on a cluster only the nodes can tell
    if not session.submits:
        experiment_log.check(config.train.log)
    return found, data, config.model_copy(update={"labels": table.settings(config.labels)})


def score(
    session: Session,
    name: str | None,
    features: Path | None = None,
    slides: Path | None = None,
    labels: Path | None = None,
    called: str | None = None,
) -> int:
    """Models to held-out predictions, metrics, per-tile scores and pictures; or predictions by all folds for new
    `slides` or `features`, compared with `labels` where given. called: what their results are to be called."""
    from mhim.pipeline.results import external, predictions
    from mhim.pipeline.stages import newcomers, runs
    from mhim.pipeline.training import bundle

    run = runs.find(session.work, name, session.config.train.model)
    bundle.permitted(predictions.folds_of(run))  # told before hours of tiling
    if session.submits and not session.dry_run:
        given = [("--features", features), ("--labels", labels)]
        args = [str(slides.resolve())] if slides else []
        args += ["--name", str(run.resolve())]
        args += [part for flag, path in given if path for part in (flag, str(path.resolve()))]
        args += ["--as", called] if called else []
        return submit(session, [slurm.Step("score", args, 1)])
    codes = []
    if labels is not None and slides is None and features is None:
        raise CohortError(
            "--labels are those of new slides: name the slides, or their --features. The run's own "
            "patients keep the labels that they were trained with"
        )
    rows = external.known_rows(slides, labels, session.config.labels)
    source = slides or features
    if source is not None:
        out = newcomers.folder_of(run / "new", source, called)
        if not session.dry_run:
            newcomers.remember(out, source)
        if slides is not None:
            session, features, code = newcomers.prepare(session, run, slides, out, labels)
            codes.append(code)
            if session.dry_run:
                return code
        assert features is not None
        rows, told = external.with_barcodes(rows, features, session.config.labels)
        tell(told)
        stage = runs.new_slides(session.config, session.work, run, features, out, rows)
    else:
        stage = runs.held_out(session.work, session.config, run)
    code = run_stage(session, stage)
    if not session.dry_run:
        runs.tell(stage, console.out)
        if not stage.folds:
            external.finish(stage, rows, labels, run, session.config)
            codes.append(1 if stage.data.damaged else 0)
        codes.append(draw(session, stage))
    return max(code, *codes) if codes else code


def draw(session: Session, scored: Stage) -> int:
    """Pictures of a scored run, as `score.heatmaps` and its neighbours ask for."""
    from mhim.pipeline.pictures import layers

    wanted = session.config.score
    if wanted.heatmaps == "none" and not (wanted.tiff or wanted.geojson or wanted.top_tiles):
        return 0
    stage, lacking = layers.drawing(session.work, session.config, scored)
    tell(lacking)
    return run_stage(session, stage)
