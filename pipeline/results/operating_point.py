"""From a probability to a decision: thresholds and the undecided band, found on validation and frozen.

In: a trained fold's predictions of its validation patients, which were written when it was trained. Out: an
operating point, and what it says of a probability: the column `decision`, which every metric that needs a class
follows. No test patient is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import metrics
from mhim.mil.tasks import Task
from mhim.pipeline.training import fold
from mhim.pipeline.training.card import Card

UNDECIDED = "undecided"


@dataclass(frozen=True)
class Point:
    """The positive (last) class is called at `threshold` and above; nothing is called between `low` and `high`."""

    threshold: float
    low: float
    high: float


def point(
    validation: Callable[[], Sequence[dict[str, Any]]], card: Card, task: Task, config: ScoreConfig
) -> Point | None:
    """The operating point of a fold, or None where there is none (more than two classes, no validation). validation:
    reads the rows of its validation patients, as `fold.read_predictions` gives them.

    Youden's J, or the wished-for sensitivity or specificity, on the fold's validation patients with its own
    temperature. The band holds the share `abstain` of them that lie nearest to the threshold; where both a sensitivity
    and a specificity are wished for, it reaches from the threshold of the one to that of the other, so that who is
    called negative keeps the sensitivity and who is called positive the specificity.
    """
    if len(task.classes) != 2:
        return None
    rows = validation()
    if not rows:
        return None
    logits = fold.logits_of(rows) / (card.softening if config.calibrate else 1.0)
    p = task.probabilities(torch.from_numpy(logits)).numpy()[:, 1]
    labels = task.truth(rows)
    if config.sensitivity is not None and config.specificity is not None:
        return _between(labels, p, config.sensitivity, config.specificity)
    if config.sensitivity is not None:
        cut = metrics.at_sensitivity(labels, p, config.sensitivity)
    elif config.specificity is not None:
        cut = metrics.at_specificity(labels, p, config.specificity)
    elif config.calibrate and card.threshold is not None:
        cut = float(card.threshold)
    else:
        cut = metrics.youden(labels, p)
    near = np.sort(np.abs(p - cut))
    n = round(config.abstain * len(p))
    width = float(np.nextafter(near[n - 1], np.inf)) if n else 0.0
    return Point(cut, cut - width, cut + width)


def _between(labels: np.ndarray, p: np.ndarray, sensitivity: float, specificity: float) -> Point:
    """Undecided between the threshold that keeps the sensitivity and the higher one that keeps the specificity; nobody
    is, where one threshold keeps both."""
    low, high = metrics.at_sensitivity(labels, p, sensitivity), metrics.at_specificity(labels, p, specificity)
    cut = float(np.clip(metrics.youden(labels, p), min(low, high), max(low, high)))
    if low >= high:
        return Point(cut, cut, cut)
    return Point(cut, float(np.nextafter(low, -np.inf)), high)  # who lies on the lower one keeps the sensitivity too


def columns(at: Point | None, positive: float, classes: Sequence[str]) -> dict[str, Any]:
    """The columns that tell a decision: threshold, the band, and the class or "undecided"; none without a point."""
    if at is None:
        return {}
    numbers = {"threshold": at.threshold, "undecided_from": at.low, "undecided_to": at.high}
    return {**numbers, "decision": _of_threshold(positive, numbers, classes)}


def called(row: Mapping[str, Any], classes: Sequence[str]) -> str:
    """The decision on a row of probabilities: by its threshold and band where it has them, else the likeliest class.

    The one rule of every metric that needs a class."""
    if len(classes) == 2 and row.get("threshold") not in (None, ""):
        return _of_threshold(row[f"p_{classes[1]}"], row, classes)
    return max(classes, key=lambda c: row[f"p_{c}"])


def rule(rows: Sequence[Mapping[str, Any]], task: Task, config: ScoreConfig) -> str:
    """By what rule the column `decision` was filled, in words."""
    if len(task.classes) != 2:
        return f"the most probable of {len(task.classes)} classes"
    without = sum(r.get("threshold") in (None, "") for r in rows)
    if without == len(rows):
        return "the most probable class (.5): there were no validation patients to find a threshold on"
    wishes = [
        f"{name} {value:g}"
        for name, value in (("sensitivity", config.sensitivity), ("specificity", config.specificity))
        if value is not None
    ]
    found = " and ".join(wishes) or "Youden's J"
    told = f"each training's threshold, found on its validation patients ({found}) and frozen"
    if config.abstain or len(wishes) == 2:
        told += "; who is left undecided counts in no metric of decisions"
    return told + (f"; without one, the most probable class ({without} of {len(rows)} rows)" if without else "")


def _of_threshold(positive: float, row: Mapping[str, Any], classes: Sequence[str]) -> str:
    if row["undecided_from"] < positive < row["undecided_to"]:
        return UNDECIDED
    return classes[int(positive >= row["threshold"])]


def counts(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """Sensitivity, specificity and the share left undecided, over rows with a label and a decision. patients: how many
    these are (slides, where each is a bag); rows: more than that where a patient was held out by several trainings."""
    told = [r for r in rows if r.get("decision") and r.get("label")]
    if not told or len(classes) != 2:
        return {}
    decided = [r for r in told if r["decision"] != UNDECIDED]

    def share(label: str) -> float | None:
        own = [r for r in decided if r["label"] == label]
        return sum(r["decision"] == label for r in own) / len(own) if own else None

    alone = any(r.get("unit") == "slide" for r in told)
    patients = len({r.get("slide" if alone else "patient", k) for k, r in enumerate(told)})
    made = {
        "sensitivity": share(classes[1]),
        "specificity": share(classes[0]),
        "undecided": 1 - len(decided) / len(told),
        "patients": patients,
    }
    return made | ({"rows": len(told)} if len(told) != patients else {})


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Expected calibration error, Brier score, and per confidence bin (upper end, patients, confidence, accuracy)."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for b in np.unique(which).tolist():
        own = which == b
        rows.append(
            {
                "to": (b + 1) / bins,
                "n": int(own.sum()),
                "confidence": float(confidence[own].mean()),
                "accuracy": float(right[own].mean()),
            }
        )
    error, brier = metrics.ece(labels, probabilities, bins), metrics.brier(labels, probabilities)
    return {"ece": error, "brier": brier, "bins": rows}
