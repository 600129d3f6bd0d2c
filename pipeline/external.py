"""A trained run on other slides: tile, extract and score them as the run's own were, and compare with its own numbers.

In: a run, slides or features it has not seen, perhaps their labels. Out: predictions by all its folds, and with labels
the same metrics as inside, side by side. Of a patient with several slides the slides' probabilities are averaged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from configs.schema import Config
from mil import metrics, tasks
from pipeline import bundle, cohort, console, scoring, store, training
from pipeline.cohort import CohortError
from pipeline.verbs import Session

OF_THE_SESSION = ("mpp_of_slides", "assume_mpp_from_power", "overlay")  # about these slides, not about the model


def prepare(session: Session, run: Path, slides: Path) -> tuple[Session, Path, str, int]:
    """Tile and extract new slides with the settings of `run`, in a work folder of their own below it.

    Returns the session of that folder, the folder of features, its name, and the worst exit code.
    """
    from pipeline import verbs

    raw = yaml.safe_load((run / "config.yaml").read_text())
    tile = raw["tile"] | {k: getattr(session.config.tile, k) for k in OF_THE_SESSION}
    mine = session.config.extract.model_dump()
    config = Config.model_validate({
        **session.config.model_dump(), "tile": tile, "extract": {**mine, **raw["extract"]},
    })
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


def compare(rows: Sequence[scoring.Row], labels: Path, run: Path, config: Config) -> dict[str, Any]:
    """Metrics of new slides with known labels beside the run's own. Raises CohortError when none can be used."""
    matched = cohort.match(cohort.read_rows(labels), [r["slide"] for r in rows])
    by_slide = {r["slide"]: r for r in rows}
    task = tasks.from_json(json.loads((scoring.folds_of(run)[0] / bundle.CARD).read_text())["task"])
    told: list[scoring.Row] = []
    unknown = 0
    for row, slide in matched.rows:
        target: dict[str, Any] | None = None
        if task.survival and row.time is not None and row.event is not None:
            target = {"time": row.time, "event": row.event}
        elif not task.survival and row.label in task.classes:
            target = {"label": row.label}
        if target is None:
            unknown += 1
            continue
        told.append({**by_slide[slide], "patient": row.patient, **target})
    if not told:
        what = "time and event" if task.survival else f"a label of {', '.join(task.classes)}"
        raise CohortError(f"no scored slide has {what} in {labels}: there is nothing to compare with")
    pooled = scoring.ensemble(told)

    def of(drawn: np.ndarray) -> metrics.Metrics:
        return scoring.measure([pooled[i] for i in drawn], task, (), None)

    found = metrics.bootstrap(of, len(pooled), config.score.bootstrap, config.score.confidence)
    inside = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").exists() else {}
    return {
        "unit": "patient", "patients": len(pooled), "slides": len(told), "without_label": len(rows) - len(told),
        "of_another_class": unknown, "confidence": config.score.confidence,
        "external": {k: _plain(asdict(v)) for k, v in found.items()}, "internal": inside.get("test", {}),
        "internal_patients": inside.get("patients"),
    }


def show(found: dict[str, Any]) -> Table:
    """Internal against external, one metric per line."""
    sizes = f"{found['internal_patients']} held-out patients; external: {found['patients']} patients"
    table = Table(title=f"internal: {sizes}")
    for column in ("metric", "internal", "external"):
        table.add_column(column)
    for name, value in found["external"].items():
        table.add_row(name, _text(found["internal"].get(name)), _text(value))
    return table


def finish(out: Path, rows: Sequence[scoring.Row], labels: Path | None, run: Path, config: Config) -> None:
    """Write the predictions of new slides, and with labels `metrics.json`, and tell both."""
    store.write_atomic(out / training.PREDICTIONS, training.table(rows))
    console.out.print(f"{len(rows)} slides scored: {console.escape(str(out / training.PREDICTIONS))}")
    for row in rows[:20]:
        told = {k.removeprefix("p_"): v for k, v in row.items() if k.startswith("p_") or k == "risk"}
        values = ", ".join(f"{k} {v:.3f}" for k, v in told.items())
        spread = f" (sd {row['spread']:.3f} over the folds)" if row.get("spread") is not None else ""
        decided = f" -> {row['decision']}" if "decision" in row else ""
        console.out.print(console.escape(f"  {row['slide']}: {values}{spread}{decided}"))
    if labels is not None:
        found = compare(rows, labels, run, config)
        store.write_atomic(out / "metrics.json", json.dumps(found, indent=1) + "\n")
        console.out.print(show(found))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in values.items()}


def _text(value: dict[str, Any] | None) -> str:
    if not value or value["value"] is None:
        return "undefined"
    low = value.get("low")
    return f"{value['value']:.3f}" + (f" [{low:.3f}, {value['high']:.3f}]" if low is not None else "")

