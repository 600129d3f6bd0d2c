"""Each verb's work: the cohort in, one stage run through a back end, the report told. Returns exit codes.

0 done, 1 some items failed, 2 usage, 3 refused because outputs of other parameters exist, 130 interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mhim.configs import lookup
from mhim.configs.schema import Config
from mhim.pipeline.backends import Step
from mhim.pipeline.cohort import listing
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.cohort.labels import match, of_patients, use
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.resume import console
from mhim.pipeline.resume.stage import Stage
from mhim.pipeline.stages.session import Session, run_stage, submit, tell
from mhim.pipeline.store import reading
from mhim.pipeline.store.layout import CARD, Work
from mhim.pipeline.store.names import readable

if TYPE_CHECKING:
    from mhim.pipeline.cohort.patient_tables.table import PatientTable
    from mhim.pipeline.cohort.patients import Dataset


def tile(session: Session, source: Path, labels: Path | None = None, regions: Path | None = None) -> int:
    """Slides to tiles, with the mpp and regions that `labels` (or a manifest) tell of them. regions: folder with more
    regions, one file `<slide id>.geojson` each."""
    from mhim.pipeline.stages.tile import Tile

    plugins_there(session.config, "tile")
    slides = _slides(session, source, labels, regions)
    if not session.dry_run:
        cohort.remember(session.work, slides)
    args = [str(source.resolve()), *(["--labels", str(labels.resolve())] if labels else [])]
    args += ["--regions", str(regions.resolve())] if regions else []
    return run_stage(session, Tile(session.work, session.config, slides), args)


def _slides(session: Session, source: Path, labels: Path | None, regions: Path | None) -> list[SlideEntry]:
    """The slides of `source` under the ids that the work folder knows them by, with the regions of a folder.
    Tells which files are none."""
    slides = _listed(session, source, labels)
    if regions is not None:
        slides, note = use.drawn_on(slides, regions)
        tell([note])
    return slides


def _listed(session: Session, source: Path, labels: Path | None) -> list[SlideEntry]:
    """The slides of `source` without regions of a folder."""
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
    from mhim.pipeline.stages.extract import Extract

    plugins_there(session.config, "extract")
    slides = cohort.read_cohort(session.work)
    untiled = [s.id for s in slides if reading.stored(session.work.tile_store(s.id)) is None]
    if len(untiled) == len(slides):
        raise CohortError(f"none of the {len(slides)} slides in {session.work.root} is tiled; `pipeline tile` first")
    if untiled:
        console.err.print(f"without tiles, left out: {len(untiled)} slides ({console.escape(', '.join(untiled[:5]))})")
    config = session.config
    if (config.extract.gpu or config.extract.gpus) and config.cluster.backend == "local":
        from mhim.extract.encoders import check_device

        check_device(config.extract)  # told before any work; on a cluster only the nodes can tell
    return run_stage(session, Extract(session.work, config, slides))


def plugins_there(config: Config, *verbs: str) -> None:
    """Raise LookupFailed or EncoderError unless every plug-in that `verbs` use is there. What ships is told by its
    name; only a user's own is imported."""
    from mhim.extract import encoders

    if "extract" in verbs:
        encoders.known(config.extract.encoder)
    named = [("mhim.pipeline.backends", config.cluster.backend)]
    if "tile" in verbs:
        named += [("mhim.extract.tissue", n) for n in (config.tile.segmenter, config.tile.fallback_segmenter) if n]
    if "train" in verbs:
        student = config.train.model_params.get("student")
        named += [("mhim.mil.models", n) for n in (config.train.model, student) if isinstance(n, str)]
    for package, name in named:
        if name.removeprefix(f"{package}.") not in lookup.names(package):
            lookup.find(package, name)


def run_all(session: Session, source: Path, labels: Path | None, name: str | None, regions: Path | None = None) -> int:
    """The four verbs in order. Failed items do not stop the next verb; the worst exit code is returned. Raises Stopped
    at the first verb that can make nothing more. regions: as of `tile`."""
    from mhim.pipeline.stages import tables_given

    # told before hours of tiling, as is a wrong or missing table, whose mpp and regions decide the tiles
    plugins_there(session.config, "tile", "extract", "train")
    if labels is None:
        own = use.of_manifest(source, session.config.labels)
        labels = source if own else match.labels_beside(source, session.work)
    train_ = session.config.train
    table = label_table.read_table(labels, session.config.labels, bool(train_.tables), bag=train_.bag)
    of_patients.joint_sites(table.rows, train_.split_by)
    tables_given.foresee(session.config, table)
    if session.dry_run:
        return foresee(session, source, labels, name, regions)
    if session.submits:
        return submit_all(session, source, labels, name, regions)
    codes = [
        tile(session, source, labels, regions),
        extract(session),
        train(session, labels, name),
        score(session, name),
    ]
    return max(codes)


def foresee(session: Session, source: Path, labels: Path, name: str | None, regions: Path | None) -> int:
    """What the four verbs would do: each verb's plan, or how many items it will have where what it needs is not made
    yet. Changes nothing."""
    from mhim.pipeline.stages import runs
    from mhim.pipeline.stages.tile import Tile

    config = session.config
    run = session.work.run(runs.named(name, config.train.model))
    slides = _slides(session, source, labels, regions)
    codes = [run_stage(session, Tile(session.work, config, slides))]
    if any(reading.stored(session.work.tile_store(s.id)) for s in slides):
        codes.append(extract(session))
    else:
        console.out.print(f"extract: {len(slides)} items, once `tile` is done")
    if session.work.features(config.extract.encoder).is_dir():
        codes.append(train(session, labels, name))
    else:
        console.out.print(f"train: {_trainings(config)} items, once `extract` is done")
    if any(run.rglob(CARD)):
        codes.append(score(session, run.name))
    else:
        console.out.print("score: 1 item, once `train` is done")
    return max(codes)


def _trainings(config: Config) -> int:
    """How many trainings the settings ask for, besides the baselines of MHIM-MIL."""
    cells = math.prod(len(values) for values in config.train.grid.values())
    return (cells * config.train.seeds + config.train.draws) * config.train.folds * config.train.repeats


def submit_all(session: Session, source: Path, labels: Path, name: str | None, regions: Path | None) -> int:
    """The four verbs as jobs, each after the one before. What can be wrong now is told now."""
    from mhim.pipeline.stages import runs
    from mhim.pipeline.stages.tile import Tile

    config = session.config
    found = labels.resolve()
    tiled = _slides(session, source, found, regions)
    cohort.remember(session.work, tiled)
    tiles = session.plan(Tile(session.work, config, tiled))
    tiles.permit(session.replace)
    slides = [s.id for s in cohort.read_cohort(session.work)]
    called = ["--name", runs.named(name, config.train.model)]
    args = [str(source.resolve()), "--labels", str(found)]
    args += ["--regions", str(regions.resolve())] if regions else []
    steps = [Step("tile", args, len(tiles.keys), tiles.keys)] if tiles.keys else []
    steps += [
        Step("extract", [], len(slides), slides),
        Step("train", ["--labels", str(found), *called], _trainings(config)),
        Step("score", called, 1),
    ]
    return submit(session, steps)


def train(session: Session, labels: Path | None, name: str | None) -> int:
    """Features to models: one training per grid cell, seed and fold."""
    from mhim.pipeline.cohort import patients
    from mhim.pipeline.cohort.patient_tables import join
    from mhim.pipeline.stages import runs, tables_given
    from mhim.pipeline.stages.train import Train

    plugins_there(session.config, "train")
    run = runs.named(name, session.config.train.model)
    whole = tables_given.to_train_on(session.config)
    found, data, config = to_train_on(session, labels, whole)
    beside, told = join.of_patients(whole, [p.id for p in data.patients], {p.id for p in data.patients if p.slides})
    tell(told)
    folds = patients.make_folds(data, config.train)
    tell(patients.told_of_sites(data, config.train, folds))
    stage = Train(session.work, config, run, data, folds, beside)
    tell(stage.told())
    code = run_stage(session, stage, ["--labels", str(found.resolve()), "--name", run])
    if not (session.dry_run or session.submits):
        runs.show_folds(stage.root, console.out)
    return max(code, 1) if data.damaged else code


def features_taken(session: Session, features: Path) -> str:
    """Which features a training takes, and why; one line."""
    asked = "encoder" in session.config.extract.model_fields_set
    why = "the settings or --encoder say so" if asked else "the default encoder"
    others = sorted(p.name for p in features.parent.iterdir() if p.is_dir() and p.name != features.name)
    more = f"; --encoder takes others: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    return f"features {features} ({why}{more})"


def to_train_on(
    session: Session, labels: Path | None, tables: Mapping[str, PatientTable] | None = None
) -> tuple[Path, Dataset, Config]:
    """The path of the labels, the patients of a training, and the settings with the columns that were read. Tells what
    is left out, and what would stop it later. tables: of a fused training, which tell of patients without slides and
    may not tell the outcome."""
    from mhim.pipeline.cohort import patients
    from mhim.pipeline.cohort.patient_tables import join
    from mhim.pipeline.exchange import bag_table
    from mhim.pipeline.stages import tables_given
    from mhim.pipeline.training import experiment_log, fold

    config = session.config
    if labels is None:
        bag_table.ensure_digits(session.work, config.extract.encoder)
    if not (session.work.root / "features").is_dir():
        raise CohortError(f"{session.work.root} holds no features; run `pipeline tile`, then `pipeline extract` first")
    features = session.work.features(config.extract.encoder)
    found = match.find_labels(labels, session.work, features)
    tables = tables or {}
    in_tables = tables_given.patients(tables)
    table = label_table.read_table(found, config.labels, bool(in_tables), bag=config.train.bag)
    if not table.has_outcome:
        raise CohortError(
            f"{found} tells neither a class nor time and event; it has the columns "
            f"{', '.join(table.header)}: say which with --label-column, or --time-column and "
            "--event-column"
        )
    join.without_outcomes(tables, table)
    data = patients.labelled(table.rows, features, config.train, in_tables)
    tell([f"{features_taken(session, features)}; labels {found}"])
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
    truth: Path | None = None,
) -> int:
    """Models to held-out predictions, metrics, per-tile scores and pictures; or predictions by all folds for new
    `slides` or `features`, compared with `labels` where given. called: what their results are to be called. truth:
    folder with the truth of tiles, on which the maps are measured."""
    from mhim.pipeline.results import predictions
    from mhim.pipeline.stages import external, newcomers, runs
    from mhim.pipeline.stages import truth as held
    from mhim.pipeline.training import bundle

    plugins_there(session.config)
    if truth is not None:
        held.demand(truth)
    run = runs.find(session.work, name, session.config.train.model)
    tell([runs.why_taken(run, name, session.config.train.model)])
    bundle.permitted(predictions.folds_of(run))  # told before hours of tiling
    if session.submits and not session.dry_run:
        files = [("--features", features), ("--labels", labels), ("--truth", truth)]
        args = [str(slides.resolve())] if slides else []
        args += ["--name", str(run.resolve())]
        args += [part for flag, path in files if path for part in (flag, str(path.resolve()))]
        args += ["--as", called] if called else []
        return submit(session, [Step("score", args, 1)])
    codes = []
    given = session.config.train.tables  # of new patients, who may have no slides
    if labels is not None and slides is None and features is None and not given:
        raise CohortError(
            "--labels are those of new slides: name the slides, or their --features. The run's own "
            "patients keep the labels that they were trained with"
        )
    rows = external.known_rows(slides, labels, session.config.labels, run, bool(given))
    measured = labels if labels is None or external.tells(rows, labels, run) else None
    source = slides or features or (Path(next(iter(given.values()))) if given else None)
    if source is not None:
        out = newcomers.folder_of(run / "new", source, called)
        if not session.dry_run:
            newcomers.remember(out, source)
        if slides is not None:
            session, features, code = prepare(session, run, slides, out, labels)
            codes.append(code)
            if session.dry_run:
                return code
        if features is not None:
            rows, told = external.with_barcodes(rows, features, session.config.labels)
            tell(told)
        stage = runs.new_slides(session.config, session.work, run, features, out, rows)
    else:
        stage = runs.held_out(session.work, session.config, run)
    code = run_stage(session, stage) if stage.folds or features is not None else 0
    if not session.dry_run:
        runs.tell(stage, console.out)
        if not stage.folds:
            external.finish(stage, rows, measured, run, session.config)
            codes.append(1 if stage.data.damaged else 0)
        if stage.folds or features is not None:
            codes += [draw(session, stage), tested(session, stage)]
            codes += [held.held_against(session.config, stage, truth, console.out)] if truth else []
    return max(code, *codes) if codes else code


def prepare(
    session: Session, run: Path, slides: Path, out: Path, labels: Path | None = None
) -> tuple[Session, Path, int]:
    """Tile and extract new slides as those of `run` were, in the work folder `out`. labels: tell their mpp and
    regions.

    Returns the session of that folder, the folder of features, and the worst exit code. Raises as
    `newcomers.settings_of`, and CohortError where what lies here (weights,
    plug-ins) would make them otherwise, or where no slide could be tiled.
    """
    from mhim.pipeline.cohort import provenance
    from mhim.pipeline.stages import newcomers
    from mhim.pipeline.stages.extract import Extract
    from mhim.pipeline.stages.tile import Tile

    config, unused = newcomers.settings_of(run, session.config)
    for line in unused:
        console.err.print(console.escape(line))
    config = config.model_copy(update={"train": config.train.model_copy(update={"bag": newcomers.card_of(run).bag})})
    there = replace(session, work=Work(out), config=config)
    now = Tile(there.work, config, []).settings() | Extract(there.work, config, []).settings()
    provenance.demand_same(newcomers.card_of(run).made or {}, now, run.name)
    codes = [tile(there, slides, labels)]
    try:
        codes.append(extract(there))
    except CohortError:
        if not codes[0]:
            raise
        raise CohortError(f"none of the slides in {slides} could be tiled, as told above: nothing to score") from None
    return there, there.work.features(config.extract.encoder), max(codes)


def draw(session: Session, scored: Stage) -> int:
    """Pictures of a scored run, as `score.heatmaps` and its neighbours ask for."""
    from mhim.pipeline.stages import draw as draw_

    wanted = session.config.score
    if wanted.heatmaps == "none" and not (wanted.tiff or wanted.geojson or wanted.top_tiles):
        return 0
    stage, lacking = draw_.drawing(session.work, session.config, scored)
    tell(lacking)
    return run_stage(session, stage)


def tested(session: Session, scored: Stage) -> int:
    """Maps of a scored run against its models, as `score.evidence` asks for."""
    from mhim.pipeline.stages import evidence

    if session.config.score.evidence == "none":
        return 0
    stage = evidence.testing(session.work, session.config, scored)
    if stage.task.kind == "several":
        tell(["score.evidence: maps of several targets are not tested; train one target alone to test its maps"])
        return 0
    code = run_stage(session, stage)
    evidence.tell(stage, console.out)
    return code
