"""Two runs on the same splits: is one better? Paired bootstrap over patients.

In: two scored runs. Out: per metric the difference with its interval and a verdict. Refuses runs of other splits or
patients, for which no pair exists. Knows no model.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.schema import ScoreConfig
from mil import metrics, tasks
from pipeline import scoring, training
from pipeline.store import StoreError


def compare(one: Path, two: Path, config: ScoreConfig, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Metric -> difference (two minus one) of the patients' mean predictions, interval, p value, verdict on `two`.

    only: one metric instead of all. Raises StoreError when a run is not scored, or splits, patients or truths differ.
    """
    found = [_scored(run) for run in (one, two)]
    (told_one, rows_one), (told_two, rows_two) = found
    if told_one["split_hash"] != told_two["split_hash"]:
        raise StoreError(f"{one.name} has split {told_one['split_hash']}, {two.name} {told_two['split_hash']}: only "
                         "runs on the same splits can be compared (same labels, train.seed and train.folds)")
    first, second = ({r["patient"]: r for r in rows} for rows in (rows_one, rows_two))
    if first.keys() != second.keys():
        lacking = sorted(first.keys() ^ second.keys())[0]
        raise StoreError(f"patient {lacking} is in one of {one.name} and {two.name} only: train the missing fold first")
    task = tasks.from_json(told_one["task"])
    patients = sorted(first)
    sides = [[first[p] for p in patients], [second[p] for p in patients]]
    verdicts = {}
    named = ("c_index",) if task.survival else ("auc", "auprc", "balanced_accuracy", "f1", "brier")
    for name in (only,) if only else named:
        def value(drawn: np.ndarray, which: int, name: str = name) -> float:
            sign = -1.0 if name == "brier" else 1.0  # smaller is better
            return sign * scoring.measure([sides[which][i] for i in drawn], task, (), None)[name]

        verdicts[name] = metrics.paired(value, len(patients), config.bootstrap, config.confidence)
    return verdicts


def tell(one: Path, two: Path, config: ScoreConfig, out: Console) -> None:
    """The comparison as a table."""
    table = Table(title=f"{two.name} minus {one.name}: same patients, paired bootstrap")
    for column in ("metric", f"difference, {100 * config.confidence:.0f} % interval", "p", "so"):
        table.add_column(column)
    for name, verdict in compare(one, two, config).items():
        d = verdict["difference"]
        said = f"{two.name} is {verdict['verdict']}" if verdict["verdict"] != "no difference" else "no difference"
        label = f"{name} (sign turned)" if name == "brier" else name
        table.add_row(label, f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", f"{verdict['p']:.3f}", said)
    out.print(table)


def _scored(run: Path) -> tuple[dict[str, Any], list[scoring.Row]]:
    """A run's metrics.json, and one row per patient, averaged over its seeds and repetitions."""
    try:
        told = json.loads((run / "metrics.json").read_text())
        with open(run / training.PREDICTIONS, newline="") as f:
            rows: list[scoring.Row] = list(csv.DictReader(f))
    except FileNotFoundError as error:
        raise StoreError(f"{run.name} is not scored; run `pipeline score --name {run.name}` first") from error
    for row in rows:
        for key in row:
            if key in ("time", "event", "risk") or key.startswith("p_"):
                row[key] = float(row[key])
    groups: dict[str, list[scoring.Row]] = {}
    for row in rows:
        groups.setdefault(row["patient"], []).append(row)
    means = []
    for members in groups.values():
        numbers = [k for k in members[0] if k == "risk" or k.startswith("p_")]
        means.append(members[0] | {k: float(np.mean([m[k] for m in members])) for k in numbers})
    return told, means
