"""Scored runs without training: held-out answers written as `train` and `score` leave them, in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil.tasks import Classification, Cox, Task
from mhim.pipeline.store import tables
from mhim.pipeline.training import fold
from tests.pipeline import records

Row = dict[str, Any]
TWO = Classification(classes=("no", "yes"))
THREE = Classification(classes=("a", "b", "c"))
COX = Cox()


def survival_rows(n: int = 45, folds: int = 3, seeds: int = 1, seed: int = 0, repeats: int = 1) -> list[Row]:
    """Patients of a known hazard; each training's risks are informative and on a scale and level of its own."""
    rng = np.random.default_rng(seed)
    hazard = rng.normal(size=n)
    death, lost = rng.exponential(np.exp(-1.2 * hazard)), rng.exponential(2.0, n)
    time, event = np.minimum(death, lost), (death <= lost).astype(int)
    made = []
    for repeat in range(repeats):
        fold_of = rng.permutation(n) % folds
        for s in range(seeds):
            level = rng.normal(0, 20, folds)
            for i in range(n):
                k = int(fold_of[i])
                made.append(
                    {
                        "slide": f"s{i}",
                        "patient": f"p{i:03d}",
                        "repeat": repeat,
                        "fold": k,
                        "seed": 7 + s,
                        "time": float(time[i]),
                        "event": int(event[i]),
                        "risk": float(level[k] + hazard[i] + rng.normal()),
                        "risk_threshold": float(level[k]),
                    }
                )
    return made


def class_rows(
    task: Task = TWO, n: int = 45, folds: int = 3, seeds: int = 1, seed: int = 0, signal: float = 1.0
) -> list[Row]:
    """Patients of the classes in turn; each training has a level and (of two classes) a threshold of its own."""
    rng = np.random.default_rng(seed)
    n_classes = len(task.classes)
    label, fold_of = np.arange(n) % n_classes, rng.permutation(n) % folds
    made = []
    for s in range(seeds):
        level, cut = rng.normal(0, 2, (folds, n_classes)), rng.uniform(0.3, 0.7, folds)
        for i in range(n):
            k = int(fold_of[i])
            z = level[k] + signal * np.eye(n_classes)[label[i]] + rng.normal(size=n_classes)
            p = np.exp(z) / np.exp(z).sum()
            row = {
                "slide": f"s{i}",
                "patient": f"p{i:03d}",
                "repeat": 0,
                "fold": k,
                "seed": 7 + s,
                "label": task.classes[label[i]],
                **{f"p_{c}": float(v) for c, v in zip(task.classes, p, strict=True)},
            }
            if n_classes == 2:
                t = float(cut[k])
                row |= {"threshold": t, "undecided_from": t, "undecided_to": t}
                row["decision"] = task.classes[int(p[1] >= t)]
            else:
                row["decision"] = task.classes[int(p.argmax())]
            made.append(row)
    return made


def written(run: Path, rows: Sequence[Row], task: Task, horizons: Sequence[float] = (), **told: Any) -> Path:
    """The run's folder as `compare` reads it."""
    run.mkdir(parents=True)
    (run / fold.PREDICTIONS).write_text(tables.of_mappings(rows))
    (run / "metrics.json").write_text(records.metrics(task, horizons=list(horizons), **told).text())
    return run
