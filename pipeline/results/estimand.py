"""What each number is of: pairs and decisions inside one training, seed by seed, for many weightings of patients.

In: prediction rows that carry their truth (one per patient and training, as in `predictions.csv`). Out: `Answers`, and
from weights (D, patients) the value of every metric in each of D draws. The rules, once for `score`, `compare`,
`benchmark`, the report and other cohorts (which metrics a kind of outcome has is in `measures/`):

- ranking (AUC, C-index, time-dependent AUC, correlations): the pairs inside each training (repeat, fold, seed) are
  counted and added up over the trainings of a seed; the seeds' values are averaged. Two models' answers never make a
  pair, so that an increasing transformation of one training's scores changes nothing. What has no pairs (AUPRC,
  Pearson, Spearman) is the mean over the trainings that define it.
- decisions (balanced accuracy, F1, accuracy, kappa): of the column `decision`, over all patients of a seed; who was
  left undecided counts in none of them. Errors of what has a unit of its own (Brier score, ECE, grades, R2): over all
  patients of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import resampling
from mhim.mil.tasks import Task
from mhim.pipeline.results import measures
from mhim.pipeline.results.measures.measure import Answers, Place, Row, Training, bag_of, mean, of_slides, place
from mhim.pipeline.store import tables

NUMERIC = (
    "time",
    "event",
    "risk",
    "risk_threshold",
    "threshold",
    "undecided_from",
    "undecided_to",
    "high_risk",
    "spread",
    "unlike",
    "expected_level",
    "predicted",
    "low",
    "high",
)


def read(path: Path) -> list[Row]:
    """The rows of a `predictions.csv`, numbers as numbers."""
    return [{k: _number(k, v) for k, v in row.items()} for row in tables.read(path)]


def answers(rows: Sequence[Row], task: Task, together: bool = False) -> Answers:
    """Rows with their truth as arrays. together: patients are one stratum (another cohort's, whom no fold divides)."""
    measure = measures.of(task)
    at: dict[str, int] = {}
    fold_of: list[int] = []
    people: dict[str, int] = {}
    whose: list[int] = []
    members: dict[Place, list[Row]] = {}
    for row in sorted(rows, key=place):
        if bag_of(row) not in at:
            at[bag_of(row)] = len(at)
            whose.append(people.setdefault(row["patient"], len(people)))
            fold_of.append(0 if together else int(row["fold"]))
        members.setdefault(place(row), []).append(row)
    made = []
    for (repeat, fold, seed), own in members.items():
        who = np.array([at[bag_of(r)] for r in own])
        arrays = measure.truth_of(own), measure.score_of(own), measure.called_of(own)
        made.append(Training(repeat, fold, seed, who, *arrays))
    if not any(of_slides(r) for r in rows):
        return Answers(task, tuple(at), np.array(fold_of), tuple(made))
    # few patients with many slides each: of two in a fold hardly anything would vary, so all are drawn together
    return Answers(task, tuple(at), np.zeros(len(at), np.int64), tuple(made), np.array(whose))


def values(found: Answers, weights: np.ndarray, horizons: Sequence[float] = ()) -> dict[str, np.ndarray]:
    """Every metric (D,) for weights (D, N): how often each patient counts in each draw."""
    measure = measures.of(found.task)
    each = [measure.values(own, weights, horizons) for own in found.seeds]
    return {name: mean([v[name] for v in each]) for name in each[0]}


def point(found: Answers, horizons: Sequence[float] = ()) -> dict[str, float]:
    """Every metric with each patient counted once."""
    return {k: float(v[0]) for k, v in values(found, np.ones((1, len(found.patients))), horizons).items()}


def metric(found: Answers, horizons: Sequence[float] = ()) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`values` as a function of the weights alone, for the bootstrap."""
    return lambda weights: values(found, weights, horizons)


def intervals(
    found: Answers, horizons: Sequence[float], samples: int, confidence: float
) -> dict[str, resampling.Interval]:
    """Every metric with its interval over patients drawn with replacement in their fold, each with all its slides."""
    n, own = len(found.patients), metric(found, horizons)
    return resampling.intervals(own, n, samples, confidence, found.strata, clusters=found.clusters)


def per_training(found: Answers, horizons: Sequence[float] = ()) -> dict[Place, dict[str, float]]:
    """(repeat, fold, seed) -> the metrics of that training alone."""
    measure, made = measures.of(found.task), {}
    for one in found.trainings:
        weights = np.zeros((1, len(found.patients)))
        weights[0, one.who] = 1.0
        of = measure.values([one], weights, horizons)
        made[one.repeat, one.fold, one.seed] = {k: float(v[0]) for k, v in of.items()}
    return made


def pairs(found: Answers) -> int:
    """How many pairs the headline metric counts: see the kind's `pairs`."""
    measure = measures.of(found.task)
    return int(sum(measure.pairs(one) for one in found.trainings))


def _number(name: str, text: str) -> Any:
    if name in ("repeat", "fold", "seed"):
        return int(text)
    if text and (name in NUMERIC or name.startswith(("p_", "free_after_bin_"))):
        return int(float(text)) if name == "event" else float(text)
    return text
