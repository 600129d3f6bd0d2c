"""A trained run on other slides: their predictions, and with labels the run's own numbers and theirs side by side.

In: what the `Score` stage made of them (`newcomers.py` has them tiled and extracted), perhaps their labels. Out:
predictions by all folds, and with labels the same metrics as inside; of patients that the run knows apart. The slides
of a patient, as a manifest or the labels name them, are one bag as in training, unless `score.several_slides` says
otherwise; each slide keeps its own tile scores and pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from mhim.configs.schema import Config, LabelsConfig, ScoreConfig
from mhim.mil import metrics, tasks
from mhim.pipeline.cohort.labels import cells as label_cells
from mhim.pipeline.cohort.labels import match, use
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import TARGET, CohortError, Row
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.results import estimand, measures, numbers, operating_point, predictions, views
from mhim.pipeline.results.measures.measure import Answers, bag_of, of_slides
from mhim.pipeline.results.metrics_file import METRICS, ExternalMetrics, Metrics
from mhim.pipeline.results.present import Present, remember
from mhim.pipeline.resume import console
from mhim.pipeline.store import layout, tables, writing
from mhim.pipeline.training import bundle, choices, fold

_PERSON = "\0"  # before the name of a patient without slides, among names of slides
BY_MODEL = "predictions_by_model.csv"


def known_rows(
    slides: Path | None, labels: Path | None, settings: LabelsConfig, run: Path, may_lack_slide: bool = False
) -> list[Row]:
    """What is known of new slides: the rows of the labels, else those of the manifest. Tell whose the slides are.

    run: whose targets the columns may be. may_lack_slide: patients of whom tables alone are at hand may have a row
    too."""
    from mhim.pipeline.stages import session

    source = labels if labels is not None else slides if slides is not None and slides.is_file() else None
    if source is None or (labels is None and not label_cells.is_table(source)):
        return []
    targets = tuple(_tasks(run)) if labels is not None else ()
    bag = bundle.card_of(predictions.folds_of(run)[0]).bag
    table = label_table.read_table(source, settings, may_lack_slide, () if targets == ("",) else targets, bag)
    told = use.unused_by_score(table, slides is not None)
    other = [
        c.removeprefix(TARGET) for c in table.columns if c.startswith(TARGET) and c.removeprefix(TARGET) not in targets
    ]
    if other and labels is not None:
        told.append(f"{table.path.name}: {', '.join(other)} not used: {run.name} has no such target")
    session.tell((*(() if slides is not None else table.notes), *told))  # else told where the slides are listed
    return table.rows


def tells(rows: Sequence[Row], labels: Path, run: Path) -> bool:
    """Whether the labels tell something that the run answers, known before hours of scoring. Where they tell no outcome
    at all, that is told. Raises CohortError where they tell another one."""
    from mhim.pipeline.stages import session

    each = _tasks(run)
    if any(_knows(row, task, target) for target, task in each.items() for row in rows):
        return True
    if not any(row.label is not None or row.time is not None or any(v for _, v in row.targets) for row in rows):
        how = "--label-column, or --time-column and --event-column, name the columns that do"
        session.tell([f"{labels.name} tells no label: there is nothing to compare with ({how})"])
        return False
    if "" in each:
        how = "--label-column, or --time-column and --event-column"
        raise CohortError(
            f"{labels} does not tell {measures.of(each['']).wanted}, which {run.name} answers: name {how}"
        )
    raise CohortError(
        f"{run.name} has the targets {', '.join(each)}, and {labels} tells none of them: call its columns so (survival "
        "is told by time and event)"
    )


def _tasks(run: Path) -> dict[str, tasks.Task]:
    """Target -> task, of a single one under ""."""
    task = bundle.card_of(predictions.folds_of(run)[0]).task.value
    return dict(task.targets) if isinstance(task, tasks.Several) else {"": task}


def _knows(row: Row, task: tasks.Task, target: str) -> bool:
    """Whether the row has a cell of the target."""
    own = _cell(row, target)
    return all(getattr(own, column) is not None for column in measures.of(task).truth)


def with_barcodes(rows: Sequence[Row], features: Path, settings: LabelsConfig) -> tuple[list[Row], list[str]]:
    """`rows`, and one for each slide of `features` that none names and whose TCGA barcode tells the patient, so that
    slides of one patient are one bag without a table too; and what is to be told."""
    slides = list(layout.feature_stores(features)) if settings.tcga_patients else []
    added = match.by_barcode(rows, slides)
    told = (
        f"no row tells the patient of {len(added)} slides: they are of {len({r.patient for r in added})} patients "
        "by their TCGA barcodes (--no-tcga-patients: each slide by itself)"
    )
    return [*rows, *added], [told] if added else []


def patients_of(data: Dataset, rows: Sequence[Row]) -> dict[str, str]:
    """Slide -> patient, for the slides of `data` that a row names."""
    slides = [s for p in data.patients for s in p.slides]
    return {slide: row.patient for row, slide in match.match(rows, slides).rows}


def predict(
    stage: Any, rows: Sequence[Row], config: ScoreConfig, target: str = ""
) -> tuple[list[predictions.Row], dict[str, Row]]:
    """Predictions, one row per patient and model, and what `rows` know of each slide that was scored (and of
    each patient, for those without slides). target: which of several; then a row's `label` is the cell of that column.
    """
    slides = [s for p in stage.data.patients for s in p.slides]
    known = {slide: _cell(row, target) for row, slide in match.match(rows, slides).rows}
    known |= {_PERSON + r.patient: _cell(r, target) for r in rows}
    alone = config.several_slides != "bag"
    return predictions.each_of_new_slides(
        stage, config, patients_of(stage.data, rows) if alone else None, target
    ), known


def _cell(row: Row, target: str) -> Row:
    """The row as labels of the target alone."""
    return replace(row, label=dict(row.targets).get(target), label_column=target) if target else row


def with_truth(
    rows: Sequence[predictions.Row], known: dict[str, Row], task: tasks.Task
) -> tuple[list[predictions.Row], int]:
    """The predictions whose patient has a label (or time and event) that the model knows, with it; and how many have
    one of another class."""
    measure = measures.of(task)
    told: list[predictions.Row] = []
    others: set[str] = set()
    for row in rows:
        keys = row["slide"].split(";") if row["slide"] else [_PERSON + row["patient"]]
        one = next((known[k] for k in keys if k in known), None)
        truth = None if one is None else measure.told(one)
        if truth:
            told.append({**row, **truth})
        elif truth is not None:
            others.add(bag_of(row))
    return told, len(others)


def compare(
    each: Sequence[predictions.Row],
    before: Sequence[predictions.Row],
    known: dict[str, Row],
    run: Path,
    config: Config,
    held_out: bool = False,
    target: str = "",
) -> ExternalMetrics:
    """Metrics of new patients with known labels beside the run's own. Raises CohortError when none can be used.

    each: predictions, one row per patient and model; before: the same without temperature scaling. As inside, a number
    is that of one model: the mean over the models, each of which scored every new patient (`external`). Decisions are
    those that are handed out, of all models together (column `decision`). `external_models` has the mean and standard
    deviation over the models of every metric, `external_ensemble` every metric of all models together.

    held_out: the patients are the run's own, each scored by the trainings that held it out; then the numbers are
    counted as the internal ones are."""
    folders = predictions.folds_of(run)
    cards = [bundle.card_of(f).seen_as(target) for f in folders]
    task = cards[0].task.value
    measure = measures.of(task)
    told, other = with_truth(each, known, task)
    unlabelled = len({bag_of(r) for r in each}) - len({bag_of(r) for r in told}) - other
    if not told:
        raise CohortError(f"no scored slide has {measure.wanted} in the labels: there is nothing to compare with")

    # as for the run's own patients: in the mean of the folds' horizons
    horizons = numbers.mean_horizons(cards)
    found = estimand.answers(told, task, together=not held_out)
    joined = with_truth(predictions.together(each, folders, target), known, task)[0]
    as_one = estimand.answers(numbers.pooled(joined), task, together=True)
    how = (config.score.bootstrap, config.score.confidence)
    models = estimand.intervals(found if held_out else _one_seed(found), horizons, *how)
    joint = estimand.intervals(as_one, horizons, *how)
    over = metrics.over_folds(list(estimand.per_training(found, horizons).values()))
    at = views.View(run, target).folder
    inside = Metrics.read(at) if (at / METRICS).exists() else None
    own = [r for f in folders if (f / fold.PREDICTIONS).exists() for r in fold.read_target(f, target)]
    made: dict[str, Any] = {
        "numbers": layout.NUMBERS,
        "unit": "slide" if any(of_slides(r) for r in told) else "patient",
        "patients": len({r["patient"] for r in told}),
        **({"target": target} if target else {}),
        "slides": sum(len(r["slide"].split(";")) for r in joined),
        "without_label": unlabelled,
        "of_another_class": other,
        "task": task.to_json(),
        "confidence": config.score.confidence,
        "several_slides": config.score.several_slides,
        "models": len(cards),
        "horizons": horizons,
        "external": {k: asdict(joint[k] if k in measure.decided and not held_out else v) for k, v in models.items()},
        "external_models": {k: {"mean": m, "sd": sd, "n": n} for k, (m, sd, n) in over.items()},
        "external_ensemble": {k: asdict(v) for k, v in joint.items()},
        "internal": {k: v.plain() for k, v in inside.test.items()} if inside else {},
        "internal_patients": inside.patients if inside else None,
        "choices": choices.count(cards).plain(),
        "warnings": [*measure.odd(joined, own), *numbers.one_class(numbers.pooled(joined))],
    }
    try:
        Present(run).check()
    except layout.StoreError as error:
        made["warnings"].append(f"the internal numbers are not of these models: {error}")
    if inside is not None and inside.counted_otherwise:
        made["warnings"].append(
            "the internal numbers are of version 0.1, which counted otherwise (pairs across "
            f"folds): run `pipeline score --name {run.name}` again"
        )

    def scaled(how: bool) -> list[predictions.Row]:
        return with_truth(predictions.together(each if how else before, folders, target), known, task)[0]

    made |= measure.tables(as_one, told, joined, config.score, scaled)
    if "decisions" in made:
        made["decisions"] = {
            "external": operating_point.counts(joined, task.classes),
            "internal": inside.decisions.plain() if inside and inside.decisions else {},
        }
    return ExternalMetrics.of(numbers.no_nan(made), METRICS)


def _one_seed(found: Answers) -> Answers:
    """Every model stands for itself, whatever its seed: their values are averaged one by one."""
    alone = tuple(replace(t, seed=k) for k, t in enumerate(found.trainings))
    return replace(found, trainings=alone)


def show(found: ExternalMetrics) -> Table:
    """Internal against external, one metric per line."""
    ours, theirs = ("slides of ", f"{found.slides} slides of ") if found.unit == "slide" else ("", "")
    sizes = f"{ours}{found.internal_patients} held-out patients; external: {theirs}{found.patients} patients"
    known = found.known
    if known:
        sizes += f"; of the run's own: {known.patients}"
    measure = measures.of(found.task.value)
    table = Table(title=f"internal: {sizes}; {found.models} models")
    strangers = bool(found.external)
    columns = [
        "metric",
        "internal",
        "external",
        *(["all models together"] if strangers else []),
        *(["known to the run, held out"] if known else []),
    ]
    for column in columns:
        table.add_column(column, no_wrap=column == "metric")
    for name in found.external or (known.metrics if known else {}):
        outside = (
            [numbers.text_of(told.get(name)) for told in (found.external, found.external_ensemble)]
            if strangers
            else ["none"]
        )
        apart = [numbers.text_of(known.metrics.get(name))] if known else []
        inside = numbers.text_of(found.internal.get(name))
        table.add_row(measure.label(name, found.horizons), inside, *outside, *apart)
    decided = found.decisions
    for name in ("sensitivity", "specificity", "undecided"):
        if decided is not None and decided.external.plain():
            cells = (getattr(side, name) for side in (decided.internal, decided.external))
            table.add_row(f"{name}, frozen thresholds", *("undefined" if v is None else f"{v:.3f}" for v in cells))
    return table


def finish(stage: Any, known_as: Sequence[Row], labels: Path | None, run: Path, config: Config) -> None:
    """Write the predictions of new slides, and with labels `metrics.json`, and tell both; of each target where there
    are several."""
    for note in stage.data.notes:
        console.err.print(console.escape(note))
    if _cleared(stage.out, _tasks(run)) and labels is None:
        lost = f"{stage.out / METRICS} was of the predictions before and is removed; give --labels to compare again"
        console.err.print(console.escape(lost))
    remember(stage.out, sorted({folder for folders in stage.models.values() for folder in folders}))
    for name in _tasks(run):
        if name:
            console.out.print(f"[bold]{console.escape(name)}[/]")
        _finish(stage, known_as, labels, run, config, name)
    if (stage.out / "cohort.csv").exists():
        console.out.print(f"look at them: pipeline view {console.escape(str(stage.out))}")


def _cleared(out: Path, targets: Collection[str]) -> bool:
    """Remove what the scoring before found of new slides, which would stand beside other models' predictions as if it
    were of them: numbers, and targets that the run has no more. targets: those of now, "" of a single one. Returns
    whether there were numbers."""
    root, keep = out / views.FOLDER, {views.file_name(name) for name in targets if name}
    own = [folder for folder in (root.iterdir() if root.is_dir() else ()) if folder.is_dir()]
    numbers_there = any((folder / METRICS).exists() for folder in (out, *own))
    for folder in (out, *own):
        (folder / METRICS).unlink(missing_ok=True)
    for folder in [f for f in own if f.name not in keep] if keep else [root]:
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    if keep:  # each has a folder of its own
        for file in (fold.PREDICTIONS, BY_MODEL):
            (out / file).unlink(missing_ok=True)
    return numbers_there


def _finish(stage: Any, known_as: Sequence[Row], labels: Path | None, run: Path, config: Config, target: str) -> None:
    each, known = predict(stage, known_as, config.score, target)
    folders = predictions.folds_of(run)
    rows = predictions.together(each, folders, target)
    task = bundle.card_of(folders[0]).seen_as(target).task.value
    truth = {bag_of(r): r for r in with_truth(rows, known, task)[0]} if labels is not None else {}
    measure = measures.of(task)
    out = views.View(stage.out, target).folder
    out.mkdir(parents=True, exist_ok=True)
    for file, some in ((fold.PREDICTIONS, rows), (BY_MODEL, each)):
        told = some
        if truth:
            told = [{**r, **{c: truth.get(bag_of(r), {}).get(c, "") for c in measure.truth}} for r in some]
        writing.write_atomic(out / file, tables.of_mappings(told))
    of = f"{sum(len(p.slides) for p in stage.data.patients)} slides of {len({r['patient'] for r in rows})} patients"
    console.out.print(f"{of} scored: {console.escape(str(out / fold.PREDICTIONS))}")
    for row in rows[:20]:
        values, decision = measure.answer(row, len(folders) > 1)
        spread = f" (sd {row['spread']:.3f} over the folds)" if row.get("spread") is not None else ""
        decided = f" -> {decision}" if decision else ""
        decided += " (unlike what the model knows)" if row.get("unlike", 0.0) > 1 else ""
        slides = row["slide"] or "no slide"
        whose = slides if row["patient"] == slides else f"{row['patient']} ({slides})"
        console.out.print(console.escape(f"  {whose}: {values}{spread}{decided}"))
    if len(rows) > 20:
        console.out.print(f"  and {len(rows) - 20} more")
    if labels is None or (target and not truth):
        if target and labels is not None:
            asked = any(_knows(row, task, target) for row in known_as)
            why = f"no scored slide has {measure.wanted}" if asked else f"no row tells {measure.wanted}"
            console.err.print(console.escape(f"{target}: {why} in the labels: predictions alone"))
        return
    before = predict(stage, known_as, config.score.model_copy(update={"calibrate": False}), target)[0]
    found = _apart(each, before, known, run, config, target)
    found = found.model_copy(update={"warnings": [*stage.data.notes, *found.warnings]})
    writing.write_atomic(out / METRICS, found.text())
    console.out.print(show(found))
    if found.decision_rule is not None:
        console.out.print(console.escape(f"decisions: {found.decision_rule}"))
    if found.interval_rule is not None:
        console.out.print(console.escape(f"intervals: {found.interval_rule}"))
    for line in choices.lines(found.choices):
        console.out.print(console.escape(line))
    for warning in [w for w in found.warnings if w not in stage.data.notes]:
        console.err.print(f"[yellow]note[/]: {console.escape(warning)}")


def _apart(
    rows: Sequence[predictions.Row],
    before: Sequence[predictions.Row],
    known: dict[str, Row],
    run: Path,
    config: Config,
    target: str,
) -> ExternalMetrics:
    """`compare` of the strangers alone; under `known` the same numbers of those whom the run knows, which are held-out
    numbers like the internal ones and never external."""

    def of(familiar: bool) -> tuple[list[predictions.Row], list[predictions.Row]]:
        mine, early = (
            [r for r in some if ("known" in r and not config.score.allow_known) == familiar] for some in (rows, before)
        )
        return mine, early

    (strangers, early), (familiar, familiar_early) = of(False), of(True)
    task = bundle.card_of(predictions.folds_of(run)[0]).seen_as(target).task.value
    told = with_truth(familiar, known, task)[0]
    inside = compare(familiar, familiar_early, known, run, config, held_out=True, target=target) if told else None
    if with_truth(strangers, known, task)[0] or inside is None:
        found = compare(strangers, early, known, run, config, target=target).plain()
    else:
        found = {k: v for k, v in inside.plain().items() if k not in ("confusion", "reliability", "decisions")}
        found |= {
            "patients": 0,
            "slides": 0,
            "without_label": len({bag_of(r) for r in strangers}),
            "of_another_class": 0,
            "external": {},
            "external_models": {},
            "external_ensemble": {},
        }
    if inside is not None:
        told_inside = inside.plain()
        found["known"] = {k: told_inside[k] for k in ("patients", "slides")} | {"metrics": told_inside["external"]}
    return ExternalMetrics.of(found, METRICS)
