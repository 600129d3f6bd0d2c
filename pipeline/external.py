"""A trained run on other slides: their predictions, and with labels the run's own numbers and theirs side by side.

In: what the `Score` stage made of them (`newcomers.py` has them tiled and extracted), perhaps their labels. Out:
predictions by all folds, and with labels the same metrics as inside; of patients that the run knows apart. The slides
of a patient, as a manifest or the labels name them, are one bag as in training, unless `score.several_slides` says
otherwise; each slide keeps its own tile scores and pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from configs.schema import Config, ScoreConfig
from mil import metrics, tasks
from pipeline import bundle, console, decide, label_match, label_table, published, scoring, store, training
from pipeline.cases import Dataset
from pipeline.cohort import CohortError
from pipeline.label_rows import Row


def known_rows(slides: Path | None, labels: Path | None) -> list[Row]:
    """What is known of new slides: the rows of the labels, else those of the manifest. Tell whose the slides are."""
    if labels is not None:
        return label_table.read_rows(labels)
    return label_table.read_rows(slides) if slides is not None and slides.suffix.lower() == ".csv" else []


def patients_of(data: Dataset, rows: Sequence[Row]) -> dict[str, str]:
    """Slide -> patient, for the slides of `data` that a row names."""
    slides = [s for p in data.patients for s in p.slides]
    return {slide: row.patient for row, slide in label_match.match(published.of_patients(rows, slides), slides).rows}


def predict(
    stage: Any, rows: Sequence[Row], config: ScoreConfig
) -> tuple[list[scoring.Row], dict[str, Row]]:
    """Predictions, one row per patient, and what `rows` know of each slide that was scored."""
    slides = [s for p in stage.data.patients for s in p.slides]
    known = {slide: row for row, slide in label_match.match(published.of_patients(rows, slides), slides).rows}
    alone = config.several_slides != "bag"
    return scoring.of_new_slides(stage, config, patients_of(stage.data, rows) if alone else None), known


def with_truth(
    rows: Sequence[scoring.Row], known: dict[str, Row], task: tasks.Task
) -> tuple[list[scoring.Row], int]:
    """The predictions whose patient has a label (or time and event) that the model knows, with it; and how many have
    one of another class."""
    told: list[scoring.Row] = []
    other = 0
    for row in rows:
        one = next((known[s] for s in row["slide"].split(";") if s in known), None)
        if one is None:
            continue
        if task.survival and one.time is not None and one.event is not None:
            told.append({**row, "time": one.time, "event": one.event})
        elif not task.survival and one.label in task.classes:
            told.append({**row, "label": one.label})
        elif not task.survival and one.label is not None:
            other += 1
    return told, other


def compare(
    rows: Sequence[scoring.Row], before: Sequence[scoring.Row], known: dict[str, Row], run: Path, config: Config
) -> dict[str, Any]:
    """Metrics of new patients with known labels beside the run's own. Raises CohortError when none can be used.

    before: the same predictions without temperature scaling."""
    cards = _cards(run)
    task = tasks.from_json(cards[0]["task"])
    told, other = with_truth(rows, known, task)
    if not told:
        what = "time and event" if task.survival else f"a label of {', '.join(task.classes)}"
        raise CohortError(f"no scored slide has {what} in the labels: there is nothing to compare with")

    # as for the run's own patients: in the mean of the folds' horizons
    horizons = np.mean([c.get("horizons", []) for c in cards], axis=0).tolist() if task.survival else []

    def of(drawn: np.ndarray) -> metrics.Metrics:
        return scoring.measure([told[i] for i in drawn], task, horizons, None)

    found = metrics.bootstrap(of, len(told), config.score.bootstrap, config.score.confidence)
    inside = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").exists() else {}
    made: dict[str, Any] = {
        "unit": "patient", "patients": len(told), "slides": sum(len(r["slide"].split(";")) for r in told),
        "without_label": len(rows) - len(told) - other, "of_another_class": other, "task": task.to_json(),
        "confidence": config.score.confidence, "several_slides": config.score.several_slides,
        "external": {k: _plain(asdict(v)) for k, v in found.items()}, "internal": inside.get("test", {}),
        "internal_patients": inside.get("patients"),
    }
    if not task.survival:
        made["confusion"] = scoring.confusion(told, task)
        made["decisions"] = {"external": decide.counts(told, task.classes), "internal": inside.get("decisions", {})}
        made["reliability"] = {
            name: scoring.calibration(with_truth(some, known, task)[0], task)
            for name, some in (("before", before), ("after", rows))
        }
    return made


def show(found: dict[str, Any]) -> Table:
    """Internal against external, one metric per line."""
    sizes = f"{found['internal_patients']} held-out patients; external: {found['patients']} patients"
    known = found.get("known")
    if known:
        sizes += f"; of the run's own: {known['patients']}"
    table = Table(title=f"internal: {sizes}")
    for column in ("metric", "internal", "external", *(["known to the run, held out"] if known else [])):
        table.add_column(column)
    for name in found["external"] or (known or {}).get("metrics", {}):
        outside = _text(found["external"].get(name)) if found["external"] else "none"
        apart = [_text(known["metrics"].get(name))] if known else []
        table.add_row(name, _text(found["internal"].get(name)), outside, *apart)
    decisions = found.get("decisions", {})
    for name in ("sensitivity", "specificity", "undecided"):
        if decisions.get("external"):
            cells = (decisions[side].get(name) for side in ("internal", "external"))
            table.add_row(f"{name}, frozen thresholds", *("undefined" if v is None else f"{v:.3f}" for v in cells))
    return table


def finish(stage: Any, known_as: Sequence[Row], labels: Path | None, run: Path, config: Config) -> None:
    """Write the predictions of new slides, and with labels `metrics.json`, and tell both."""
    rows, known = predict(stage, known_as, config.score)
    for note in stage.data.notes:
        console.err.print(console.escape(note))
    task = tasks.from_json(_cards(run)[0]["task"])
    truth = {r["patient"]: r for r in with_truth(rows, known, task)[0]} if labels is not None else {}
    columns = ("time", "event") if task.survival else ("label",)
    out = stage.out
    told = [{**r, **{c: truth.get(r["patient"], {}).get(c, "") for c in columns}} if truth else r for r in rows]
    store.write_atomic(out / training.PREDICTIONS, training.table(told))
    of = f"{sum(len(p.slides) for p in stage.data.patients)} slides of {len(rows)} patients"
    console.out.print(f"{of} scored: {console.escape(str(out / training.PREDICTIONS))}")
    for row in rows[:20]:
        shown = [k for k in row if k.startswith("p_") or k == "risk"]
        values = ", ".join(f"{k.removeprefix('p_')} {row[k]:.3f}" for k in shown)
        spread = f" (sd {row['spread']:.3f} over the folds)" if row.get("spread") is not None else ""
        decided = f" -> {row['decision']}" if "decision" in row else ""
        decided += " (unlike what the model knows)" if row.get("unlike", 0.0) > 1 else ""
        whose = row["slide"] if row["patient"] == row["slide"] else f"{row['patient']} ({row['slide']})"
        console.out.print(console.escape(f"  {whose}: {values}{spread}{decided}"))
    if len(rows) > 20:
        console.out.print(f"  and {len(rows) - 20} more")
    if (out / "cohort.csv").exists():
        console.out.print(f"look at them: pipeline view {console.escape(str(out))}")
    if labels is not None:
        before = predict(stage, known_as, config.score.model_copy(update={"calibrate": False}))[0]
        found = _apart(rows, before, known, run, config)
        if stage.known:
            found["warnings"] = list(stage.data.notes)
        store.write_atomic(out / "metrics.json", json.dumps(found, indent=1) + "\n")
        console.out.print(show(found))


def _apart(
    rows: Sequence[scoring.Row], before: Sequence[scoring.Row], known: dict[str, Row], run: Path, config: Config
) -> dict[str, Any]:
    """`compare` of the strangers alone; under `known` the same numbers of those whom the run knows, which are held-out
    numbers like the internal ones and never external."""
    def of(familiar: bool) -> tuple[list[scoring.Row], list[scoring.Row]]:
        mine, early = ([r for r in some if ("known" in r and not config.score.allow_known) == familiar]
                       for some in (rows, before))
        return mine, early

    (strangers, early), (familiar, familiar_early) = of(False), of(True)
    task = tasks.from_json(_cards(run)[0]["task"])
    inside = compare(familiar, familiar_early, known, run, config) if with_truth(familiar, known, task)[0] else {}
    if with_truth(strangers, known, task)[0] or not inside:
        found = compare(strangers, early, known, run, config)
    else:
        found = {k: v for k, v in inside.items() if k not in ("confusion", "reliability", "decisions")}
        found |= {"patients": 0, "slides": 0, "without_label": len(strangers), "of_another_class": 0, "external": {}}
    if inside:
        found["known"] = {k: inside[k] for k in ("patients", "slides")} | {"metrics": inside["external"]}
    return found


def _cards(run: Path) -> list[dict[str, Any]]:
    return [bundle.card_of(folder) for folder in scoring.folds_of(run)]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in values.items()}


def _text(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "undefined"
    low = value.get("low")
    return f"{value['value']:.3f}" + (f" [{low:.3f}, {value['high']:.3f}]" if low is not None else "")

