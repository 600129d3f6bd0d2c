"""One self-contained HTML file per run: what was used, what was left out and why, how good it is, where it fails.

In: a scored run and its work folder. Out: `report.html` (nothing is loaded from anywhere; every name is escaped) and
`report/` with the figures as SVG and PNG. Pictures of slides are added, worst mistakes first, until the file would grow
beyond `BUDGET`; how many there was no room for is said.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mhim.mil import evidence
from mhim.pipeline.cohort.labels.rows import counted, some
from mhim.pipeline.pictures import beside, cohort_map, figures, kinds, methods, modalities, of_several, thumbnails
from mhim.pipeline.pictures.kinds.kind import Drawing, Kind
from mhim.pipeline.pictures.of_several import Section, Shown
from mhim.pipeline.pictures.parts import Parts
from mhim.pipeline.results import again, ensemble, estimand, numbers, predictions, truth, views
from mhim.pipeline.results import evidence as measured
from mhim.pipeline.results.metrics_file import METRICS, Metrics
from mhim.pipeline.results.present import Present
from mhim.pipeline.results.present import told as told_of
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import layout, pages, reading, tables, writing
from mhim.pipeline.training import bundle, choices, kept
from mhim.pipeline.training.card import Card
from mhim.pipeline.upkeep import status

PREDICTIONS = "predictions.csv"
BUDGET = 9 * 2**20  # bytes of the HTML file
Row = dict[str, Any]
ASSETS = Path(__file__).parent / "assets"
FIGURES = {
    "loss": "Training",
    "validation": "Validation",
}


@dataclass(frozen=True)
class Written:
    """A report that was made. wrong: of each part that it lacks, which and why."""

    path: Path
    wrong: tuple[str, ...]


def write(work: layout.Work, run: Path) -> Written:
    """Write the report of a scored run; of several targets one page in which each has its section. What is damaged
    beside the run's own numbers costs its part of the page alone. Raises StoreError if it is not scored, or was trained
    again since."""
    if not (run / METRICS).exists() or not (run / PREDICTIONS).exists():
        raise layout.StoreError(f"{run} is not scored; run `pipeline score --name {run.name}` first")
    present, parts = Present(run), Parts()
    present.check(only=(METRICS, PREDICTIONS))
    parts.make("the run's other results", lambda: reading.check_scored(run), None)
    leftovers.sweep_work(work)
    found = Metrics.read(run)
    if found.counted_otherwise:
        raise layout.StoreError(
            f"the numbers of {run.name} are of version 0.1, which counted otherwise; run `pipeline "
            f"score --name {run.name}` first, which takes seconds"
        )
    style, script = ((ASSETS / name).read_text() for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    several = found.targets is not None
    made = [
        parts.make(f"target {v.target}", partial(_section, v, parts), None) if several else _section(v, parts)
        for v in views.of(run)
    ]
    sections = [one for one in made if one is not None]
    cards: list[Card] = parts.make("trainings", lambda: [bundle.card_of(f) for f in predictions.folds_of(run)], [])
    stages = _stages(work)
    maps, more_maps = cohort_map.sections(work, run, found.features.plain(), parts)
    values: dict[str, Any] = {
        "name": run.name,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": pages.own(style),
        "script": pages.own(script),
        "warnings": found.warnings,
        "cohort": parts.make("cohort", lambda: _cohort(work, found, stages), ""),
        "left_out": _left_out(run, stages),
        "stale": parts.make("scores", lambda: told_of(present.stale()), ""),
        "splits": parts.make("splits", lambda: _splits(run), []),
        "choices": choices.lines(found.choices),
        "versions": list(methods.versions(cards).items()),
        "features": list(found.features.plain().items()),
        "cohort_maps": maps,
        "more_maps": more_maps,
        "config": parts.make("config.yaml", lambda: _config(run), ""),
        "again": parts.make("do it again", lambda: "\n".join(again.commands(work, run)), ""),
    }
    if several:
        drawn = figures.save_all(run / "report", _training_figures(run, found, parts))
        values |= {
            "metrics": numbers.lines(found),
            "figures": [(FIGURES[k], pages.data_uri("image/svg+xml", v)) for k, v in drawn.items()],
            "sections": [one.values for one in sections],
            **_summary(found, [k for k in found.test if "." not in k]),
            **of_several.patients(sections),
        }
        template, shown = ASSETS / "several.html", of_several.slides(sections)
    else:
        (only,) = sections
        fused = parts.make("modalities", lambda: modalities.values(run, found.task.value), None)
        values |= only.values | {"fused": fused}
        template, shown = ASSETS / "report.html", [only.shown(row) for row in only.rows]
    values |= _trainings(found) | _maps(run, parts) | _beside(run, found, cards, sections, parts)
    bare = pages.page(template, **values, gallery=[], no_room=0, hidden=[], wrong=[])
    gallery, no_room, hidden = _gallery(present, shown, BUDGET - len(bare.encode()) - 4096, parts)
    text = pages.page(template, **values, gallery=gallery, no_room=no_room, hidden=hidden, wrong=parts.wrong)
    writing.write_atomic(run / "report.html", text)
    return Written(run / "report.html", tuple(parts.wrong))


def _config(run: Path) -> str:
    return (run / "config.yaml").read_text(encoding="utf-8") if (run / "config.yaml").exists() else ""


def _section(view: views.View, parts: Parts) -> Section:
    found = Metrics.read(view.folder)
    each = estimand.read(view.folder / PREDICTIONS)
    kind = kinds.of(found.task.value)
    rows = ensemble.ensemble(each, kind.task)
    rows = [row | {"mistake": wrong} for row, wrong in zip(rows, kind.mistakes(rows), strict=True)]
    rows.sort(key=lambda row: (not kind.measure.said(row).wrong, -row["mistake"]))
    drawn = kind.figures(found, rows, each)
    if not view.target:
        drawn |= _training_figures(view.run, found, parts)
    folder = view.run / "report"
    svg = figures.save_all(folder / views.file_name(view.target) if view.target else folder, drawn)
    titles = kind.titles | FIGURES
    values = {
        "target": view.target,
        "anchor": of_several.anchor(view.target),
        "frozen": methods.frozen(found),
        "metrics": numbers.lines(found),
        "counted": _counted(found),
        "figures": [(titles[k], pages.data_uri("image/svg+xml", v)) for k, v in svg.items()],
        **_summary(found, kind.measure.brief),
        **_patients(rows, kind),
    }
    return Section(view.target, kind, rows, found, values)


def _beside(
    run: Path, found: Metrics, cards: Sequence[Card], sections: Sequence[Section], parts: Parts
) -> dict[str, Any]:
    """The methods paragraph, other runs and other cohorts."""
    compared, more = beside.comparisons(run, found, parts)
    targets = {one.target: one.found for one in sections if one.target}
    return {
        "methods": methods.paragraph(found, cards, targets) if cards else "",
        "compared": compared,
        "compared_columns": beside.COMPARED,
        "drawn": found.drawn,
        "not_compared": more,
        "external": beside.external(run, parts),
        "external_columns": beside.EXTERNAL,
    }


def _training_figures(run: Path, found: Metrics, parts: Parts) -> dict[str, Drawing]:
    histories: dict[str, list[dict[str, str]]] = {}
    for folder in parts.make("training curves", lambda: predictions.folds_of(run), []):
        if (folder / "history.csv").exists():
            read = parts.make(f"training curve of {folder.name}", partial(_history, folder / "history.csv"), [])
            histories |= {folder.name: read} if read else {}
    return {
        "loss": figures.training(histories, "loss"),
        "validation": figures.training(histories, found.headline),
    }


def _history(path: Path) -> list[dict[str, str]]:
    """A training's epochs. Raises ValueError where a cell is no number."""
    rows = tables.read(path)
    for row in rows:
        for cell in row.values():
            float(cell or "nan")
    return rows


def _summary(found: Metrics, brief: Sequence[str]) -> dict[str, Any]:
    """What the page says first: of what the numbers are, and the most asked-for of them."""
    names = [k for k in brief if k in found.test]
    return {"summary": _told(found), "shown": [(k.replace("_", " "), found.test[k]) for k in names]}


def _told(found: Metrics) -> str:
    return (
        f"{found.model} on {found.features.encoder} features; {found.of_whom}, {found.folds} folds, {found.seeds} "
        f"seed(s); split {found.split_hash}; {100 * found.confidence:.0f} % intervals over patients drawn "
        f"{found.drawn}; ranking is of pairs of {found.paired} the same training held out."
    )


def _counted(found: Metrics) -> list[str]:
    """Lines below the table of metrics: what was decided and chosen, how often."""
    lines = [f"Decisions: {found.decision_rule}."] if found.decision_rule is not None else []
    lines += [f"Intervals: {found.interval_rule}."] if found.interval_rule is not None else []
    lines += choices.lines(found.choices)
    if found.log_rank_stratified_p is not None:
        lines.append(
            f"log-rank test of the risk groups: p = {found.log_rank_p:.3g}; stratified by fold: p = "
            f"{found.log_rank_stratified_p:.3g}"
        )
    told = found.decisions
    if told is not None and told.undecided is not None:
        rates = {"sensitivity": told.sensitivity, "specificity": told.specificity}
        shares = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items() if rate is not None)
        lines.append(
            f"At the frozen thresholds: {shares}; {100 * told.undecided:.0f} % left undecided, of {told.patients} "
            f"{found.unit}s."
        )
    return lines


def _patients(rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """The table of patients. mark: the class of a cell, `n` for numbers, `wrong` for mistakes."""
    body = []
    for r in rows:
        cells = [(str(r["patient"]), ""), (str(r["slide"]), ""), (str(r["fold"]), "n"), *kind.cells(r)]
        body.append([{"text": text, "mark": mark} for text, mark in cells])
    return {"patient_columns": ["patient", "slides", "fold", *kind.columns], "patients": body}


def _stages(work: layout.Work) -> list[status.StageStatus] | str:
    """The state of the work folder's stages, or why it cannot be told."""
    try:
        return status.read(work)
    except Exception as error:  # whatever is odd there: the run has numbers, and they are told
        return str(error)


def _cohort(work: layout.Work, found: Metrics, stages: list[status.StageStatus] | str) -> str | list[tuple[str, str]]:
    """Rows of the table of slides, or why there is none."""
    if isinstance(stages, str):
        return f"No slides are known in {work.root.name}: {stages}"
    if not work.cohort.exists():
        return f"No slides are known in {work.root.name}: its features came without them."
    tile = stages[0]
    tiles = [reading.read_attrs(work.tile_store(s)) for s in tile.keys["done"]]
    mpps = Counter(f"{t['slide_mpp'][0]:.4g}" for t in tiles)
    vendors = Counter(str(t.get("vendor")) for t in tiles)
    rows = [
        ("slides tiled", str(len(tile.keys["done"]))),
        ("without tissue", str(len(tile.keys["empty"]))),
        ("failed", str(len(tile.keys["failed"]))),
        ("µm per px of level 0", ", ".join(f"{k}: {n}" for k, n in sorted(mpps.items()))),
        ("scanner format", ", ".join(f"{k}: {n}" for k, n in sorted(vendors.items()))),
        ("tissue, mm²", f"{sum(t.get('tissue_um2', 0) for t in tiles) / 1e6:.1f}"),
    ]
    if found.class_patients is not None:
        counts = (f"{c}: {n}" for c, n in sorted(found.class_patients.items()))
        rows.append(("patients per class", ", ".join(counts)))
    return rows


def _left_out(run: Path, stages: list[status.StageStatus] | str) -> list[tuple[str, str, str, str]]:
    """(item, stage, state, why) of everything that no number of the run is of; not what other runs lack."""
    rows = []
    for stage in [] if isinstance(stages, str) else stages:
        if stage.name.startswith("train ") and stage.name != f"train {run.name}":
            continue
        for state in ("failed", "empty", "missing"):
            rows += [(key, stage.name, state, stage.reasons.get(key, "")) for key in stage.keys[state]]
    return rows


def _splits(run: Path) -> list[tuple[str, ...]]:
    """(repeat, fold, and how many patients train, validate and test)."""
    counts = Counter((r["repeat"], r["fold"], r["split"]) for r in tables.read(run / "splits.csv"))
    places = sorted({k[:2] for k in counts})
    return [(a, b, *(str(counts[a, b, side]) for side in ("train", "val", "test"))) for a, b in places]


def _trainings(found: Metrics) -> dict[str, Any]:
    """One line per training, with the plain model that took over where masking hurt."""
    headline = found.headline
    measured = headline.replace("_", " ")
    weighed = any(one.choice for one in found.per_fold)  # train.choice
    rows = []
    for one in found.per_fold:
        value = one.metrics.get(headline)
        evidence = kept.told(one.choice, measured) if one.choice else ""
        rows.append(
            (
                one.repeat,
                one.fold,
                one.seed,
                one.patients,
                one.epoch,
                one.cell or "",
                "undefined" if value is None else f"{value:.3f}",
                one.fallback.why if one.fallback else "",
                *((evidence,) if weighed else ()),
            )
        )
    columns: tuple[str, ...] = (
        "repeat",
        "fold",
        "seed",
        "patients",
        "epoch",
        "cell of the grid",
        measured,
        "fell back",
    )
    columns += ("evidence for the student",) if weighed else ()
    return {"training_columns": columns, "trainings": rows}


def _maps(run: Path, parts: Parts) -> dict[str, Any]:
    """What each map is worth, where that was measured (`score.evidence`)."""
    columns = {
        "patients": "patients",
        "sufficiency": f"kept by the first 1/{evidence.FEW}",
        "necessity": "lost without them",
        "keep_area": "area kept",
        "remove_area": "area left",
        "gain": "gain",
        "smallest_share": f"smallest share of tiles that keeps {100 * evidence.WANTED:.0f} %",
    }

    old: list[str] = []  # what is there and not shown

    def tested() -> list[tuple[str, ...]]:
        found = measured.means(run)  # not the file: it may be of scores that were made anew since
        if not found["maps"] and (run / measured.SUMMARY).is_file():
            old.append(f"{measured.SUMMARY} (of other scores than there are now, or of another way to measure)")
        rows = []
        for name in found["best_first"]:
            one = found["maps"][name]
            cells = [f"{one[k]['mean']:.3f}" if isinstance(one[k], dict) else str(one[k]) for k in columns]
            rows.append((name.replace("_", " "), *cells))
        return rows

    def pointed() -> tuple[dict[str, Any], list[tuple[str, ...]]]:
        told = truth.read(run)
        if not told and (run / truth.FILE).is_file():
            old.append(f"{truth.FILE} (of other scores than there are now)")
        return told, truth.rows(told)

    rows = parts.make("what the maps say", tested, [])
    told, lines = parts.make(f"{truth.FILE}, where the maps point", pointed, ({}, []))
    truths = {"truth_columns": truth.COLUMNS, "truth_rows": lines, "truth": told}
    return {"map_columns": ("map", *columns.values()), "maps": rows, "old_maps": old, **truths}


def _gallery(
    present: Present, patients: Sequence[Shown], room: int, parts: Parts
) -> tuple[list[dict[str, Any]], int, list[str]]:
    """The slides' pictures, of trainings that are there now, that fit into `room` bytes of HTML; how many there was no
    room for; and a line for each reason why pictures that lie there are not shown."""
    made: list[dict[str, Any]] = []
    left, hidden = 0, dict[str, list[str]]()
    for one in patients:
        for slide in one.slides:
            folder, why = present.pictures(slide)
            if why:
                hidden.setdefault(why, []).append(slide)
            drawn = folder.glob("*.png") if folder else []
            pictures = sorted(drawn, key=lambda p: (not p.name.startswith("contribution"), p.name))
            if not pictures:
                continue
            if room <= 0:
                left += 1
                continue
            tiles = pictures[0].with_name("tiles.jpg")
            small = [(p, thumbnails.heatmap) for p in pictures] + [(tiles, thumbnails.sheet)] * tiles.exists()
            made_of = [(p, parts.make(f"{slide}: {p.stem}", partial(draw, p), b"")) for p, draw in small]
            shown = {
                "name": slide,
                "pictures": [
                    {
                        "uri": pages.data_uri("image/jpeg", data),
                        "layer": "highest and lowest tiles" if p == tiles else p.stem.replace("_", " "),
                        "file": quote(p.relative_to(present.folder).as_posix()),
                    }
                    for p, data in made_of
                    if data
                ],
                "wrong": one.wrong,
                "told": one.told,
            }
            room -= len(pages.page(ASSETS / "slide.html", slide=shown).encode())
            made.append(shown)
    lines = [f"pictures of {counted(len(of), 'slide')} ({some(of)}) are not shown: {why}" for why, of in hidden.items()]
    return made, left, lines
