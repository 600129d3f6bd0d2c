"""What a trained run holds, and what is to be scored with it.

In: a run's name or folder. Out: the `Score` stage for its held-out patients or for new slides, and the tables that a
person reads afterwards. Knows layouts through `store` and `bundle` only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mhim.configs.schema import Config
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort import provenance
from mhim.pipeline.cohort.labels.rows import CohortError, Row, counted
from mhim.pipeline.cohort.patients import Dataset
from mhim.pipeline.results import fused, known, predictions, views
from mhim.pipeline.results import numbers as numbers_
from mhim.pipeline.results.measures.measure import of_slides
from mhim.pipeline.results.metrics_file import Metrics
from mhim.pipeline.resume.console import escape
from mhim.pipeline.stages import external, tables_given
from mhim.pipeline.stages.score import Score
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle, choices, fold


def find(work: layout.Work, name: str | None, model: str) -> Path:
    """The folder of a run: by name, by path, the one of `model`, or the only one. StoreError lists the runs."""
    if name is not None:
        for folder in (work.run(name), Path(name), work.run(name.rsplit(".", 1)[-1])):  # a module's run has its name
            if folder.is_dir():
                return folder
    there = sorted(p.name for p in work.runs.iterdir() if p.is_dir()) if work.runs.is_dir() else []
    if name is None and there:
        usual = model.rsplit(".", 1)[-1]
        if usual in there:
            return work.run(usual)
        if len(there) == 1:
            return work.run(there[0])
    wanted = f"no run {name!r} in {work.runs}" if name else f"no run in {work.runs} to choose without --name"
    raise layout.StoreError(f"{wanted}; there is: {', '.join(there) or 'none, run `pipeline train` first'}")


def why_taken(run: Path, name: str | None, model: str) -> str:
    """Which run `find` took, and why; one line."""
    others = sorted(p.name for p in run.parent.iterdir() if p.is_dir() and p != run) if run.parent.is_dir() else []
    if name is not None:
        why = f"as --name {name} says"
    elif not others:
        why = "the only one"
    else:
        why = f"that of train.model={model.rsplit('.', 1)[-1]}; --name takes another: {', '.join(others[:5])}"
        why += " ..." if len(others) > 5 else ""
    return f"run {run} ({why})"


def named(name: str | None, model: str) -> str:
    """The name of a new run: as given, or the model's. It becomes one folder below `runs`. Raises CohortError."""
    found = model.rsplit(".", 1)[-1] if name is None else name
    if not found.isprintable() or found.startswith((".", "-")) or set(found) & set("/\\") or len(found.encode()) > 100:
        found = ""
    if not found.strip():
        raise CohortError(
            f"--name {name!r}: a run's name becomes a folder: up to 100 letters, digits, blanks and "
            "signs, no / or \\, and no . or - at its beginning"
        )
    return found


def held_out(work: layout.Work, config: Config, run: Path) -> Score:
    """Every test patient (or slide, where each is a bag) with the trainings that held it out; pictures and tile
    scores use the first seed's."""
    folders = predictions.folds_of(run)
    members: dict[str, list[Path]] = {}
    slides: dict[str, list[str]] = {}
    whose: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for folder in folders:
        facts = bundle.card_of(folder).features.plain()
        for row in fold.read_predictions(folder):
            own = json.loads(row["slides"])
            bag = own[0] if of_slides(row) else row["patient"]
            if row["side"] == "test" and bag not in members:
                members[bag], slides[bag] = [folder], own
                whose |= {bag: row["patient"]} if of_slides(row) else {}
    folder = cases.features_of(work, facts)
    stores = layout.feature_stores(folder)
    missing = [s for of in slides.values() for s in of if s not in stores]
    if missing and len(missing) == sum(map(len, slides.values())):
        raise layout.StoreError(
            f"the features of {missing[0]} ({len(missing)} slides in all) that {run.name} was "
            f"trained on are not in {folder}; extract them again"
        )
    stores |= {s: folder / f"{s}.zarr" for s in missing}  # those patients fail alone
    patients = tuple(replace(cases.patient_of(p, of, stores), of=whose.get(p, "")) for p, of in sorted(slides.items()))
    return Score(work, config, run, Dataset(patients, (), facts), members, folders)


def numbers(work: layout.Work, config: Config, run: Path) -> Score:
    """The held-out predictions and metrics of a run alone, without the scores of its tiles."""
    folders = predictions.folds_of(run)
    facts = bundle.card_of(folders[0]).features.plain()
    return Score(work, config, run, Dataset((), (), facts), {}, folders)


def new_slides(
    config: Config, work: layout.Work, run: Path, features: Path | None, out: Path, rows: Sequence[Row] = ()
) -> Score:
    """Every slide of a folder of features, scored into `out`: strangers by all folds of `run`, patients that it knows
    by the trainings that held them out. Refuses features of another encoder or mpp, and tells in which other settings
    they were made otherwise than the run's.

    rows: tell which slides are one patient's. They are one bag, as in training, unless `score.several_slides` says that
    each is to be scored alone. Of a run with train.bag=slide each slide is a bag with an answer of its own."""
    folders = predictions.folds_of(run)
    alone = bundle.card_of(folders[0]).bag == "slide"
    if alone and config.score.several_slides != "bag":
        raise CohortError(
            f"{run.name} was trained with train.bag=slide: each slide has an answer of its own, and "
            f"score.several_slides={config.score.several_slides} would make them one; leave it at bag"
        )
    whole = config.score.several_slides == "bag" and not alone
    if features is None:  # patients of whom tables alone are at hand
        data = Dataset((), (), bundle.card_of(folders[0]).features.plain())
    else:
        data = cases.unlabelled(features, rows if whole else ())
        if not data.patients:
            raise CohortError(f"no slide in {features} has tiles: nothing to score")
        bundle.read(folders[0]).check(data.facts)
    beside, told = tables_given.to_score_with(config, folders)
    bare = tables_given.without_slides(beside, data, external.patients_of(data, rows).values())
    if bare:
        told.append(
            f"{counted(len(bare), 'patient')} of the tables {'has' if len(bare) == 1 else 'have'} no slide: "
            "answered by the tables alone"
        )
    data = replace(data, patients=(*data.patients, *bare))
    names = {} if whole else external.patients_of(data, rows)
    if alone:
        data = replace(data, patients=tuple(replace(p, of=names.get(p.id, p.id)) for p in data.patients))
    found = known.recognise(run, folders, data, names)
    allowed = config.score.allow_known
    members = {p.id: list(found[p.id].folders) if p.id in found and not allowed else folders for p in data.patients}
    unscored = [i for i, by in members.items() if not by]
    otherwise = provenance.differences(bundle.card_of(folders[0]).made or {}, data.made, run.name)
    scored = replace(
        data,
        patients=tuple(p for p in data.patients if members[p.id]),
        notes=(*known.unrecorded(run), *known.note(found, unscored, allowed), *told, *otherwise, *data.notes),
    )
    return Score(work, config, out, scored, {i: by for i, by in members.items() if by}, [], found, beside)


def tell(stage: Score, out: Console) -> None:
    """The table of a scored run; for new slides the predictions, which are written first."""
    if not stage.folds:
        return
    for folder, what in [(v.folder, v.name) for v in views.of(stage.out) if v.target] + [(stage.out, stage.out.name)]:
        found = Metrics.read(folder)
        percent = f"{100 * found.confidence:.0f} %"
        table = Table(
            title=f"{what}: {found.of_whom}, {found.folds} folds, {found.seeds} seed(s), split {found.split_hash}"
        )
        for column in ("metric", "mean ± sd over trainings", f"inside trainings, {percent} interval"):
            table.add_column(column, no_wrap=column == "metric")
        for row in numbers_.lines(found):
            table.add_row(*(escape(cell) for cell in row))
        out.print(table)
        if (modalities := fused.read(folder)) is not None:
            out.print(_modalities(modalities))
        if found.decision_rule is not None:
            out.print(escape(f"decisions: {found.decision_rule}"))
        if found.interval_rule is not None:
            out.print(escape(f"intervals: {found.interval_rule}"))
        if found.target is not None:
            continue
        for line in choices.lines(found.choices):
            out.print(escape(line))
        for warning in found.warnings:
            out.print(f"[yellow]note[/]: {escape(warning)}")


def _modalities(found: dict[str, Any]) -> Table:
    """The fused answer, each modality alone, and each removed at test."""
    percent = f"{100 * found['confidence']:.0f} %"
    table = Table(title=f"{found['headline']} of the same held-out patients, paired")
    for column in ("", f"value, {percent} interval", "fused minus it", "weight ± sd"):
        table.add_column(column, no_wrap=not column)
    for row in fused.lines(found):
        table.add_row(*(escape(cell) for cell in row))
    return table


def show_folds(run: Path, out: Console) -> None:
    """The table of a training: every fold's validation and test metric, and the mean ± sd of each grid cell."""
    try:
        folders = predictions.folds_of(run)
    except layout.StoreError:
        return  # every fold failed, which the stage has told
    cards = [bundle.card_of(f) for f in folders]
    headline = cards[0].headline
    table = Table(title=f"{run.name}: {headline} per training")
    for column in ("training", "epoch", "validation", "test"):
        table.add_column(column)
    for folder, card in zip(folders, cards, strict=True):
        values = [side.get(headline) for side in (card.validation, card.test)]
        cells = ["undefined" if v is None else f"{v:.3f}" for v in values]
        table.add_row(folder.relative_to(run).as_posix(), f"{card.epoch}/{card.epochs}", *cells)
    out.print(table)
    for row in predictions.cell_table(run):
        out.print(row)
    for folder, card in zip(folders, cards, strict=True):
        if card.fallback:
            out.print(f"[yellow]note[/] {folder.name}: {escape(card.fallback.why)}")
