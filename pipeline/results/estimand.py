"""What each number is of: pairs and decisions inside one training, seed by seed, for many weightings of patients.

In: prediction rows that carry their truth (one per patient and training, as in `predictions.csv`). Out: `Answers`, and
from weights (D, patients) the value of every metric in each of D draws. The rules, once for `score`, `compare`,
`benchmark`, the report and other cohorts:

- ranking (AUC, C-index, time-dependent AUC): the pairs inside each training (repeat, fold, seed) are counted and added
  up over the trainings of a seed; the seeds' values are averaged. Two models' answers never make a pair, so that an
  increasing transformation of one training's scores changes nothing. AUPRC, which has no pairs, is the mean over the
  trainings that define it.
- decisions (balanced accuracy, F1, accuracy, kappa): of the column `decision`, over all patients of a seed; who was
  left undecided counts in none of them. Brier score and ECE: over all patients of a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mhim.mil import estimators, resampling
from mhim.mil.tasks import Task
from mhim.pipeline.results import operating_point
from mhim.pipeline.store import tables

Row = dict[str, Any]
Place = tuple[int, int, int]
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
)
RANKING = ("auc", "auprc", "c_index")
DECIDED = ("balanced_accuracy", "f1", "accuracy", "kappa")


@dataclass(frozen=True)
class Training:
    """One training's answers about the patients it held out. who: int (n,), places in `Answers.patients`.

    survival: truth float (n, 2) of time and event, score float (n,) risk. classification: truth int (n,), score float
    (n, C) probabilities, called int (n,) class that was decided on, -1 for undecided.
    """

    repeat: int
    fold: int
    seed: int
    who: np.ndarray
    truth: np.ndarray
    score: np.ndarray
    called: np.ndarray


@dataclass(frozen=True)
class Answers:
    """All trainings of a run, of an ensemble, or all models on another cohort's patients.

    strata: int (N,), the fold that held each patient out (of the first repetition), inside which draws are made.
    """

    task: Task
    patients: tuple[str, ...]
    strata: np.ndarray
    trainings: tuple[Training, ...]

    @property
    def seeds(self) -> list[list[Training]]:
        """The trainings, seed by seed."""
        return [[t for t in self.trainings if t.seed == s] for s in sorted({t.seed for t in self.trainings})]


def read(path: Path) -> list[Row]:
    """The rows of a `predictions.csv`, numbers as numbers."""
    return [{k: _number(k, v) for k, v in row.items()} for row in tables.read(path)]


def place(row: Mapping[str, Any]) -> Place:
    """(repeat, fold, seed) of the training that a row is of."""
    return int(row["repeat"]), int(row["fold"]), int(row["seed"])


def answers(rows: Sequence[Row], task: Task, together: bool = False) -> Answers:
    """Rows with their truth as arrays. together: patients are one stratum (another cohort's, whom no fold divides)."""
    at: dict[str, int] = {}
    fold_of: list[int] = []
    members: dict[Place, list[Row]] = {}
    for row in sorted(rows, key=place):
        if row["patient"] not in at:
            at[row["patient"]] = len(at)
            fold_of.append(0 if together else int(row["fold"]))
        members.setdefault(place(row), []).append(row)
    made = []
    for (repeat, fold, seed), own in members.items():
        who = np.array([at[r["patient"]] for r in own])
        if task.survival:
            truth = np.array([[r["time"], r["event"]] for r in own], dtype=np.float64)
            score, called = np.array([r["risk"] for r in own], dtype=np.float64), np.empty(0, np.int64)
        else:
            truth = np.array([task.classes.index(r["label"]) for r in own])
            score = np.array([[r[f"p_{c}"] for c in task.classes] for r in own], dtype=np.float64)
            called = np.array([_called(r, task) for r in own])
        made.append(Training(repeat, fold, seed, who, truth, score, called))
    return Answers(task, tuple(at), np.array(fold_of), tuple(made))


def values(found: Answers, weights: np.ndarray, horizons: Sequence[float] = ()) -> dict[str, np.ndarray]:
    """Every metric (D,) for weights (D, N): how often each patient counts in each draw."""
    each = [_of_seed(found.task, own, weights, horizons) for own in found.seeds]
    return {name: _mean([v[name] for v in each]) for name in each[0]}


def point(found: Answers, horizons: Sequence[float] = ()) -> dict[str, float]:
    """Every metric with each patient counted once."""
    return {k: float(v[0]) for k, v in values(found, np.ones((1, len(found.patients))), horizons).items()}


def metric(found: Answers, horizons: Sequence[float] = ()) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`values` as a function of the weights alone, for the bootstrap."""
    return lambda weights: values(found, weights, horizons)


def intervals(
    found: Answers, horizons: Sequence[float], samples: int, confidence: float
) -> dict[str, resampling.Interval]:
    """Every metric with its interval over patients drawn with replacement inside their fold."""
    return resampling.intervals(metric(found, horizons), len(found.patients), samples, confidence, found.strata)


def per_training(found: Answers, horizons: Sequence[float] = ()) -> dict[Place, dict[str, float]]:
    """(repeat, fold, seed) -> the metrics of that training alone."""
    made = {}
    for one in found.trainings:
        weights = np.zeros((1, len(found.patients)))
        weights[0, one.who] = 1.0
        of = _of_seed(found.task, [one], weights, horizons)
        made[one.repeat, one.fold, one.seed] = {k: float(v[0]) for k, v in of.items()}
    return made


def pairs(found: Answers) -> int:
    """How many pairs the headline metric counts: comparable ones (survival), or of patients of different classes."""
    total = 0.0
    for one in found.trainings:
        w = np.ones((1, len(one.who)))
        if found.task.survival:
            total += estimators.concordance_pairs(one.truth[:, 0], one.truth[:, 1], one.score, w)[1][0]
        else:
            sizes = np.bincount(one.truth, minlength=len(found.task.classes))
            total += (len(one.truth) ** 2 - (sizes**2).sum()) / 2
    return int(total)


def confusion(found: Answers) -> list[list[int]]:
    """counts[true class][class decided on] over all trainings' patients; the undecided count nowhere."""
    n = len(found.task.classes)
    total = np.zeros((n, n))
    for one in found.trainings:
        total += estimators.confusion(one.truth, one.called, n, np.ones((1, len(one.who))))[0]
    return total.astype(int).tolist()


def _of_seed(
    task: Task, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]
) -> dict[str, np.ndarray]:
    """Every metric (D,) of trainings whose pairs are counted inside each and added up."""
    if task.survival:
        made = {
            "c_index": estimators.ratio(
                _sum(
                    [
                        estimators.concordance_pairs(t.truth[:, 0], t.truth[:, 1], t.score, weights[:, t.who])
                        for t in trainings
                    ]
                )
            )
        }
        for k, at in enumerate(horizons, start=1):
            made[f"time_auc_{k}"] = estimators.ratio(
                _sum(
                    [
                        estimators.time_auc_pairs(t.truth[:, 0], t.truth[:, 1], t.score, at, weights[:, t.who])
                        for t in trainings
                    ]
                )
            )
        return made
    n = len(task.classes)
    ranked = [1] if n == 2 else range(n)
    areas = [
        estimators.ratio(
            _sum([estimators.auc_pairs(t.truth == c, t.score[:, c], weights[:, t.who]) for t in trainings])
        )
        for c in ranked
    ]
    precise = [
        np.mean([estimators.average_precision(t.truth == c, t.score[:, c], weights[:, t.who]) for c in ranked], axis=0)
        for t in trainings
    ]
    who, truth, score, called = (
        np.concatenate([getattr(t, k) for t in trainings]) for k in ("who", "truth", "score", "called")
    )
    own = weights[:, who]
    return {
        "auc": np.mean(areas, axis=0),
        "auprc": _mean(precise),
        **estimators.of_confusion(estimators.confusion(truth, called, n, own)),
        "brier": estimators.brier(truth, score, own),
        "ece": estimators.ece(truth, score, own),
    }


def _called(row: Row, task: Task) -> int:
    """Place of the class that a row decides on, -1 for undecided; rows of older runs without a decision: the most
    probable class."""
    said = row.get("decision")
    if said == operating_point.UNDECIDED:
        return -1
    if said:
        return task.classes.index(said)
    return int(np.argmax([row[f"p_{c}"] for c in task.classes]))


def _sum(each: Sequence[estimators.Pairs]) -> estimators.Pairs:
    return np.sum([above for above, _ in each], axis=0), np.sum([below for _, below in each], axis=0)


def _mean(each: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over what is defined, draw by draw; NaN where nothing is."""
    stacked = np.stack(each)
    there = np.isfinite(stacked)
    return estimators.ratio((np.where(there, stacked, 0.0).sum(axis=0), there.sum(axis=0).astype(np.float64)))


def _number(name: str, text: str) -> Any:
    if name in ("repeat", "fold", "seed"):
        return int(text)
    if text and (name in NUMERIC or name.startswith(("p_", "free_after_bin_"))):
        return int(float(text)) if name == "event" else float(text)
    return text
