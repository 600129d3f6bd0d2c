"""One self-contained HTML file per run: what was used, what was left out and why, how good it is, where it fails.

In: a scored run and its work folder. Out: `report.html` (nothing is loaded from anywhere; every name is escaped) and
`report/` with the figures as SVG and PNG. Pictures of slides are added, worst mistakes first, until the file would grow
beyond `BUDGET`; how many there was no room for is said.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.extract.images import encoded
from mhim.pipeline.pictures import figures
from mhim.pipeline.results import again, ensemble, estimand, numbers, operating_point, predictions
from mhim.pipeline.results import risk_groups as risk
from mhim.pipeline.results.metrics_file import METRICS, Estimate, Metrics
from mhim.pipeline.resume import leftovers
from mhim.pipeline.store import layout, reading, tables, writing
from mhim.pipeline.training import bundle, choices
from mhim.pipeline.upkeep import status

BUDGET = 9 * 2**20  # bytes of the HTML file
PICTURE_PX = 360
Row = dict[str, Any]
ASSETS = Path(__file__).parent / "assets"


def write(work: layout.Work, run: Path) -> Path:
    """Write the report of a scored run. Raises StoreError if it is not scored."""
    if not (run / METRICS).exists() or not (run / "predictions.csv").exists():
        raise layout.StoreError(f"{run} is not scored; run `pipeline score --name {run.name}` first")
    reading.check_scored(run)
    leftovers.sweep_work(work)
    found = Metrics.read(run)
    style, script = ((ASSETS / name).read_text() for name in ("report.css", "report.js"))
    if found.counted_otherwise:
        raise layout.StoreError(
            f"the numbers of {run.name} are of version 0.1, which counted otherwise; run `pipeline "
            f"score --name {run.name}` first, which takes seconds"
        )
    each = estimand.read(run / "predictions.csv")
    rows = ensemble.ensemble(each)
    rows = [row | {"mistake": wrong} for row, wrong in zip(rows, _mistakes(rows, found), strict=True)]
    classes = found.task.classes
    rows.sort(key=lambda row: (not _wrong(row, classes), -row["mistake"]))
    svg = figures.save_all(run / "report", _figures(run, found, rows, each))
    head = [f"<h1>{_e(run.name)}</h1>", _summary(found), *(f'<p class="note">{_e(w)}</p>' for w in found.warnings)]
    parts = [
        *head,
        "<h2>Results</h2>",
        _metrics_table(found),
        _pictures(svg),
        "<h2>Patients</h2>",
        _patients(rows, found),
        "<h2>Cohort</h2>",
        _cohort(work, found),
        "<h2>Left out</h2>",
        _left_out(work),
        "<h2>Splits</h2>",
        _splits(run),
        "<h2>Trainings</h2>",
        _trainings(found),
    ]
    tail = ["<h2>Settings and versions</h2>", _settings(run, found), "<h2>Do it again</h2>", _again(work, run)]
    room = BUDGET - sum(len(p.encode()) for p in (*parts, *tail, style, script)) - 4096
    parts += ["<h2>Slides, worst mistakes first</h2>", _gallery(run, rows, found, room), *tail]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{_e(policy)}"><meta name="viewport" content="width=device-width"><title>{_e(run.name)}</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}<script>{script}</script></body></html>\n"
    )
    writing.write_atomic(run / "report.html", text)
    return run / "report.html"


def _figures(run: Path, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Callable[[Any], None]]:
    classes = found.task.classes
    histories = {}
    for folder in predictions.folds_of(run):
        if (folder / "history.csv").exists():
            histories[folder.name] = tables.read(folder / "history.csv")
    made: dict[str, Callable[[Any], None]] = {}
    if classes:
        answers = estimand.answers(each, found.task.value)
        made |= {
            "roc": figures.curve("roc", answers, classes),
            "pr": figures.curve("pr", answers, classes),
            "confusion": figures.confusion(found.confusion or [], classes),
        }
        if found.reliability:
            made["reliability"] = figures.reliability(found.reliability)
    else:
        grouped = risk.groups(rows)
        if grouped is not None:
            made[risk.NAME] = figures.kaplan_meier(*grouped, found.log_rank_p)
    made["loss"] = figures.training(histories, "loss")
    made["validation"] = figures.training(histories, found.headline)
    return made


def _summary(found: Metrics) -> str:
    shown = ("c_index", "auc", "balanced_accuracy", "f1", "ece")
    cells = "".join(
        f"<div>{_interval(found.test[k])}<small>{_e(k.replace('_', ' '))}</small></div>"
        for k in shown
        if k in found.test
    )
    what = f"{found.model} on {found.features.encoder} features"
    size = f"{found.patients} held-out {found.unit}s, {found.folds} folds, {found.seeds} seed(s)"
    level = f"{100 * found.confidence:.0f} %"
    told = f"{what}; {size}; split {found.split_hash}; {level} intervals over "
    told += "patients drawn inside their folds; ranking is of pairs of patients whom the same training held out."
    return f'<p class="soft">{_e(told)}</p><div class="big">{cells}</div>'


def _metrics_table(found: Metrics) -> str:
    made = _table(("metric", "mean ± sd over trainings", "inside trainings, with interval"), numbers.lines(found))
    counted = choices.lines(found.choices)
    if found.decision_rule is not None:
        counted.insert(0, f"Decisions: {found.decision_rule}.")
    if found.log_rank_stratified_p is not None:
        counted.append(
            f"log-rank test of the risk groups: p = {found.log_rank_p:.3g}; stratified by fold: p = "
            f"{found.log_rank_stratified_p:.3g}"
        )
    made += "".join(f"<p>{_e(line)}</p>" for line in counted)
    told = found.decisions
    if told is not None and told.undecided is not None:
        rates = {"sensitivity": told.sensitivity, "specificity": told.specificity}
        shares = [f"{name} {rate:.3f}" for name, rate in rates.items() if rate is not None]
        made += (
            f"<p>At the frozen thresholds: {', '.join(shares)}; {100 * told.undecided:.0f} % left undecided, "
            f"of {told.patients} patients.</p>"
        )
    return made


def _pictures(svg: dict[str, bytes]) -> str:
    names = {
        "roc": "ROC inside trainings",
        "pr": "Precision and recall inside trainings",
        "confusion": "Confusion (decisions)",
        "reliability": "Calibration before and after temperature scaling",
        "kaplan_meier": "Kaplan–Meier",
        "loss": "Training",
        "validation": "Validation",
    }
    each = [
        f'<figure><img alt="{_e(names[k])}" src="data:image/svg+xml;base64,{base64.b64encode(v).decode()}">'
        f"<figcaption>{_e(names[k])}</figcaption></figure>"
        for k, v in svg.items()
    ]
    return f'<div class="figures">{"".join(each)}</div>'


def _patients(rows: Sequence[Row], found: Metrics) -> str:
    classes = found.task.classes
    columns = [
        "patient",
        "slides",
        "fold",
        *(("label", "decision") if classes else ("time", "event")),
        *(f"p {c}" for c in classes),
        *([] if classes else ["risk", "group", "out of order"]),
    ]
    body = []
    for r in rows:
        cells = [f"<td>{_e(r[k])}</td>" for k in ("patient", "slide")] + [f'<td class="n">{_e(r["fold"])}</td>']
        if classes:
            mark = ' class="wrong"' if _wrong(r, classes) else ""
            cells += [f"<td>{_e(r['label'])}</td>", f"<td{mark}>{_e(_decision(r, classes))}</td>"]
            cells += [f'<td class="n">{r[f"p_{c}"]:.3f}</td>' for c in classes]
        else:
            cells += [
                f'<td class="n">{float(r["time"]):g}</td>',
                f"<td>{_e(str(r['event']))}</td>",
                f'<td class="n">{r["risk"]:.4f}</td>',
                f"<td>{ {True: 'high risk', False: 'low risk', None: ''}[ensemble.high(r)] }</td>",
                f'<td class="n{" wrong" * (r["mistake"] > 0.5)}">{100 * r["mistake"]:.0f} %</td>',
            ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th><button>{_e(c)}</button></th>" for c in columns)
    return (
        '<div><input type="search" placeholder="filter" aria-label="filter patients"><select aria-label="which">'
        '<option value="">all</option><option value="wrong">mistakes</option></select>'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _cohort(work: layout.Work, found: Metrics) -> str:
    try:
        tile = status.read(work)[0]
    except Exception as error:  # features may have come without slides
        return f'<p class="soft">No slides are known in {_e(work.root.name)}: {_e(str(error))}</p>'
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
    return _table(("", ""), rows)


def _left_out(work: layout.Work) -> str:
    rows = []
    try:
        stages = status.read(work)
    except Exception:  # told above
        stages = []
    for stage in stages:
        for state in ("failed", "empty", "missing"):
            rows += [(key, stage.name, state, stage.reasons.get(key, "")) for key in stage.keys[state]]
    return _table(("item", "stage", "state", "why"), rows) if rows else "<p>Nothing.</p>"


def _splits(run: Path) -> str:
    counts = Counter((r["repeat"], r["fold"], r["split"]) for r in tables.read(run / "splits.csv"))
    places = sorted({k[:2] for k in counts})
    rows = [(a, b, *(str(counts[a, b, side]) for side in ("train", "val", "test"))) for a, b in places]
    return _table(("repeat", "fold", "train", "validation", "test"), rows)


def _trainings(found: Metrics) -> str:
    """One line per training, with the plain model that took over where masking hurt."""
    headline = found.headline
    rows = []
    for one in found.per_fold:
        value = one.metrics.get(headline)
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
            )
        )
    measured = headline.replace("_", " ")
    counted = "".join(f"<p>{_e(line)}</p>" for line in choices.lines(found.choices))
    columns = ("repeat", "fold", "seed", "patients", "epoch", "cell of the grid", measured, "fell back")
    return counted + _table(columns, rows)


def _gallery(run: Path, rows: Sequence[Row], found: Metrics, room: int) -> str:
    classes = found.task.classes
    made, left = [], 0
    for r in rows:
        for slide in r["slide"].split(";"):
            drawn = (run / "heatmaps" / slide).glob("*.png")
            pictures = sorted(drawn, key=lambda p: (not p.name.startswith("contribution"), p.name))
            if not pictures:
                continue
            if room <= 0:
                left += 1
                continue
            data = _small_jpeg(pictures[0])
            of = classes[-1] if len(classes) == 2 else str(r.get("label"))
            told = (
                f"{r['label']}, called {_decision(r, classes)}, p {of} {r[f'p_{of}']:.3f}"
                if classes
                else (f"time {float(r['time']):g}, event {r['event']}, risk {r['risk']:.3f}")
            )
            mark = ' class="wrong"' if _wrong(r, classes) else ""
            layer = pictures[0].stem.replace("_", " ")
            figure = (
                f'<figure><img alt="{_e(slide)}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
                f"<figcaption><b>{_e(slide)}</b><br><span{mark}>{_e(told)}</span><br>{_e(layer)}</figcaption></figure>"
            )
            room -= len(figure.encode())
            made.append(figure)
    note = f"<p>{left} more slides had no room here; their pictures are in heatmaps/.</p>" if left else ""
    if not made:
        return f"<p>No heatmaps were drawn: <code>pipeline score --name {_e(run.name)} --heatmaps all</code></p>"
    return f'<div class="gallery">{"".join(made)}</div>{note}'


def _settings(run: Path, found: Metrics) -> str:
    card = bundle.card_of(predictions.folds_of(run)[0])
    versions = _table(("program", "version"), list(card.versions.items()))
    config = (run / "config.yaml").read_text() if (run / "config.yaml").exists() else ""
    facts = _table(("features", ""), [(k, str(v)) for k, v in found.features.plain().items()])
    return f"{versions}{facts}<details><summary>config.yaml</summary><pre>{_e(config)}</pre></details>"


def _again(work: layout.Work, run: Path) -> str:
    return f"<pre>{_e(chr(10).join(again.commands(work, run)))}</pre>"


def _small_jpeg(path: Path) -> bytes:
    import cv2

    picture = cv2.imread(str(path), cv2.IMREAD_REDUCED_COLOR_4)
    if picture is None:
        raise layout.StoreError(f"{path} is damaged; delete its folder and score again")
    k = min(1.0, PICTURE_PX / max(picture.shape[:2]))
    picture = np.asarray(cv2.resize(picture, None, fx=k, fy=k, interpolation=cv2.INTER_AREA))
    return encoded(picture[..., ::-1], ".jpg", 78)


def _mistakes(rows: Sequence[Row], found: Metrics) -> list[float]:
    """How wrong each prediction is: the probability that is missing for the true class; for survival the share of the
    comparable patients of the same fold with whom the risks stand in the wrong order."""
    if found.task.classes:
        return [1.0 - float(row[f"p_{row['label']}"]) for row in rows]
    time, event, risk = (np.array([float(r[k]) for r in rows]) for k in ("time", "event", "risk"))
    fold = np.array([r.get("fold", 0) for r in rows])
    earlier = (time[:, None] < time[None, :]) & (event[:, None] > 0)  # [i, j]: i is known to have come before j
    earlier &= fold[:, None] == fold[None, :]  # the risks of two models have no common scale
    wrong = earlier * ((risk[:, None] < risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :]))
    pairs = earlier.sum(1) + earlier.sum(0)
    return [float(share) for share in (wrong.sum(1) + wrong.sum(0)) / np.maximum(pairs, 1)]


def _wrong(row: Row, classes: Sequence[str]) -> bool:
    return bool(classes) and _decision(row, classes) not in (row["label"], operating_point.UNDECIDED)


def _decision(row: Row, classes: Sequence[str]) -> str:
    return str(row.get("decision") or operating_point.called(row, classes))


def _interval(value: Estimate) -> str:
    if value.value is None:
        return "undefined"
    bounds = value.low is not None and value.high is not None
    return f"{value.value:.3f}" + (f" <small>{value.low:.3f} to {value.high:.3f}</small>" if bounds else "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_e(str(v))}</td>' for v in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _e(text: str) -> str:
    return html.escape(str(text))
