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
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mhim.mil import evidence
from mhim.pipeline.pictures import beside, cohort_map, figures, kinds, methods, modalities, of_several, thumbnails
from mhim.pipeline.pictures.kinds.kind import Drawing, Kind
from mhim.pipeline.pictures.of_several import Section, Shown
from mhim.pipeline.results import again, ensemble, estimand, numbers, predictions, truth, views
from mhim.pipeline.results import evidence as measured
from mhim.pipeline.results.metrics_file import METRICS, Metrics
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import layout, pages, reading, tables, writing
from mhim.pipeline.training import bundle, choices, kept
from mhim.pipeline.training.card import Card
from mhim.pipeline.upkeep import status

BUDGET = 9 * 2**20  # bytes of the HTML file
Row = dict[str, Any]
ASSETS = Path(__file__).parent / "assets"
FIGURES = {
    "loss": "Training",
    "validation": "Validation",
}


def write(work: layout.Work, run: Path) -> Path:
    """Write the report of a scored run; of several targets one page in which each has its section. Raises StoreError if
    it is not scored."""
    if not (run / METRICS).exists() or not (run / "predictions.csv").exists():
        raise layout.StoreError(f"{run} is not scored; run `pipeline score --name {run.name}` first")
    reading.check_scored(run)
    leftovers.sweep_work(work)
    found = Metrics.read(run)
    if found.counted_otherwise:
        raise layout.StoreError(
            f"the numbers of {run.name} are of version 0.1, which counted otherwise; run `pipeline "
            f"score --name {run.name}` first, which takes seconds"
        )
    style, script = ((ASSETS / name).read_text() for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = [_section(view) for view in views.of(run)]
    cards = [bundle.card_of(folder) for folder in predictions.folds_of(run)]
    stages = _stages(work)
    maps, more_maps = cohort_map.sections(work, run.name, found.features.plain())
    values: dict[str, Any] = {
        "name": run.name,
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "style": pages.own(style),
        "script": pages.own(script),
        "warnings": found.warnings,
        "cohort": _cohort(work, found, stages),
        "left_out": _left_out(run, stages),
        "splits": _splits(run),
        "choices": choices.lines(found.choices),
        "versions": list(methods.versions(cards).items()),
        "features": list(found.features.plain().items()),
        "cohort_maps": maps,
        "more_maps": more_maps,
        "config": (run / "config.yaml").read_text() if (run / "config.yaml").exists() else "",
        "again": "\n".join(again.commands(work, run)),
    }
    if found.targets is not None:
        drawn = figures.save_all(run / "report", _training_figures(run, found))
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
        values |= only.values | {"fused": modalities.values(run, found.task.value)}
        template, shown = ASSETS / "report.html", [only.shown(row) for row in only.rows]
    values |= _trainings(found) | _maps(run) | _beside(run, found, cards, sections)
    bare = pages.page(template, **values, gallery=[], no_room=0)
    gallery, no_room = _gallery(run, shown, BUDGET - len(bare.encode()) - 4096)
    text = pages.page(template, **values, gallery=gallery, no_room=no_room)
    writing.write_atomic(run / "report.html", text)
    return run / "report.html"


def _section(view: views.View) -> Section:
    found = Metrics.read(view.folder)
    each = estimand.read(view.folder / "predictions.csv")
    kind = kinds.of(found.task.value)
    rows = ensemble.ensemble(each, kind.task)
    rows = [row | {"mistake": wrong} for row, wrong in zip(rows, kind.mistakes(rows), strict=True)]
    rows.sort(key=lambda row: (not kind.measure.said(row).wrong, -row["mistake"]))
    drawn = kind.figures(found, rows, each)
    if not view.target:
        drawn |= _training_figures(view.run, found)
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


def _beside(run: Path, found: Metrics, cards: Sequence[Card], sections: Sequence[Section]) -> dict[str, Any]:
    """The methods paragraph, other runs and other cohorts."""
    compared, more = beside.comparisons(run, found)
    return {
        "methods": methods.paragraph(found, cards, {one.target: one.found for one in sections if one.target}),
        "compared": compared,
        "compared_columns": beside.COMPARED,
        "drawn": found.drawn,
        "not_compared": more,
        "external": beside.external(run),
        "external_columns": beside.EXTERNAL,
    }


def _training_figures(run: Path, found: Metrics) -> dict[str, Drawing]:
    histories = {}
    for folder in predictions.folds_of(run):
        if (folder / "history.csv").exists():
            histories[folder.name] = tables.read(folder / "history.csv")
    return {
        "loss": figures.training(histories, "loss"),
        "validation": figures.training(histories, found.headline),
    }


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


def _maps(run: Path) -> dict[str, Any]:
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
    found = measured.means(run)  # not the file: it may be of scores that were made anew since
    rows = []
    for name in found["best_first"]:
        one = found["maps"][name]
        cells = [f"{one[k]['mean']:.3f}" if isinstance(one[k], dict) else str(one[k]) for k in columns]
        rows.append((name.replace("_", " "), *cells))
    told = truth.read(run)
    pointed = {"truth_columns": truth.COLUMNS, "truth_rows": truth.rows(told), "truth": told}
    return {"map_columns": ("map", *columns.values()), "maps": rows, **pointed}


def _gallery(run: Path, patients: Sequence[Shown], room: int) -> tuple[list[dict[str, Any]], int]:
    """The slides' pictures that fit into `room` bytes of HTML, and how many there was no room for."""
    made: list[dict[str, Any]] = []
    left = 0
    for one in patients:
        for slide in one.slides:
            drawn = (run / "heatmaps" / slide).glob("*.png")
            pictures = sorted(drawn, key=lambda p: (not p.name.startswith("contribution"), p.name))
            if not pictures:
                continue
            if room <= 0:
                left += 1
                continue
            made_of = [(p, thumbnails.heatmap(p)) for p in pictures]
            tiles = run / "heatmaps" / slide / "tiles.jpg"
            made_of += [(tiles, thumbnails.sheet(tiles))] if tiles.exists() else []
            shown = {
                "name": slide,
                "pictures": [
                    {
                        "uri": pages.data_uri("image/jpeg", data),
                        "layer": "highest and lowest tiles" if p == tiles else p.stem.replace("_", " "),
                        "file": quote(p.relative_to(run).as_posix()),
                    }
                    for p, data in made_of
                ],
                "wrong": one.wrong,
                "told": one.told,
            }
            room -= len(pages.page(ASSETS / "slide.html", slide=shown).encode())
            made.append(shown)
    return made, left
