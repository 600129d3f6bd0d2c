"""A trained run on other slides: tile, extract and score them as the run's own were, and compare with its own numbers.

In: a run, slides or features it has not seen, perhaps their labels. Out: predictions by all its folds, and with labels
the same metrics as inside, side by side. The slides of a patient, as a manifest or the labels name them, are one bag
as in training, unless `score.several_slides` says otherwise; each slide keeps its own tile scores and pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from configs import load, lookup, texts
from configs.schema import Config, ExtractConfig, ScoreConfig, TileConfig, marked
from extract import encoders
from mil import metrics, tasks
from pipeline import bundle, console, decide, label_match, label_table, published, scoring, store, training
from pipeline.cohort import CohortError
from pipeline.label_rows import Row
from pipeline.verbs import Session

OF_THE_SESSION = ("mpp_of_slides", "assume_mpp_from_power", "overlay")  # about these slides, not about the model


def prepare(session: Session, run: Path, slides: Path) -> tuple[Session, Path, str, int]:
    """Tile and extract new slides with the settings of `run`, in a work folder of their own below it.

    Returns the session of that folder, the folder of features, its name, and the worst exit code.
    """
    from pipeline import verbs

    config = settings_of(run, session.config)
    name = slides.stem if slides.is_file() else slides.resolve().name
    there = replace(session, work=store.Work(run / "new" / name), config=config)
    codes = [verbs.tile(there, slides)]
    try:
        codes.append(verbs.extract(there))
    except CohortError:
        if not codes[0]:
            raise
        raise CohortError(f"none of the slides in {slides} could be tiled, as told above: nothing to score") from None
    return there, there.work.features(config.extract.encoder), name, max(codes)


def settings_of(run: Path, own: Config) -> Config:
    """`own`, with the settings by which a run's slides were tiled and extracted. The run's file may be a stranger's: it
    gives values of settings that decide results and nothing else, and names no code but what this command allows.

    Raises StoreError (no such file), ConfigError, or LookupFailed."""
    file = run / "config.yaml"
    try:
        raw = texts.read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise store.StoreError(f"{file} cannot be read: {error}; new slides need the settings of the run") from error
    mine = own.model_dump()
    for section, kind in (("tile", TileConfig), ("extract", ExtractConfig)):
        said = raw.get(section) if isinstance(raw, dict) else None
        if not isinstance(said, dict):
            raise store.StoreError(f"{file} has no section `{section}:`; copy the run again from where it was trained")
        machine = sorted(said.keys() & marked(kind, "speed"))
        if machine:
            raise store.StoreError(f"{file}: {section}.{machine[0]} is about the machine and no business of a run's "
                                   "settings; if the file is yours, delete that line")
        kept = {k: getattr(own.tile, k) for k in OF_THE_SESSION} if section == "tile" else {}
        mine[section] = {k: v for k, v in mine[section].items() if k in marked(kind, "speed")} | said | kept
    config = load.validate(mine)
    for name in filter(None, (config.tile.segmenter, config.tile.fallback_segmenter)):
        lookup.find("extract.tissue", name)
    encoders.known(config.extract.encoder)
    return config


def known_rows(slides: Path | None, labels: Path | None) -> list[Row]:
    """What is known of new slides: the rows of the labels, else those of the manifest. Tell whose the slides are."""
    if labels is not None:
        return label_table.read_rows(labels)
    return label_table.read_rows(slides) if slides is not None and slides.suffix.lower() == ".csv" else []


def predict(
    stage: Any, rows: Sequence[Row], config: ScoreConfig
) -> tuple[list[scoring.Row], dict[str, Row]]:
    """Predictions, one row per patient, and what `rows` know of each slide that was scored."""
    slides = [s for p in stage.data.patients for s in p.slides]
    known = {slide: row for row, slide in label_match.match(published.of_patients(rows, slides), slides).rows}
    alone = config.several_slides != "bag"
    return scoring.of_new_slides(stage, config, {s: r.patient for s, r in known.items()} if alone else None), known


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
    table = Table(title=f"internal: {sizes}")
    for column in ("metric", "internal", "external"):
        table.add_column(column)
    for name, value in found["external"].items():
        table.add_row(name, _text(found["internal"].get(name)), _text(value))
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
        found = compare(rows, before, known, run, config)
        store.write_atomic(out / "metrics.json", json.dumps(found, indent=1) + "\n")
        console.out.print(show(found))


def _cards(run: Path) -> list[dict[str, Any]]:
    return [bundle.card_of(folder) for folder in scoring.folds_of(run)]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in values.items()}


def _text(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "undefined"
    low = value.get("low")
    return f"{value['value']:.3f}" + (f" [{low:.3f}, {value['high']:.3f}]" if low is not None else "")

