"""Risk groups of a survival run: held-out patients above and below the threshold that others gave, and their picture.

In: prediction rows with their truth, and the cards of the trainings they come from. Out: the groups, their log-rank
test, and `kaplan_meier.svg`, `.png` (curves with the number at risk below) and `.csv` beside the run. The threshold of
a training is the median risk of its validation patients: no patient that is drawn had a part in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mil import metrics
from pipeline import figures, training

Row = dict[str, Any]
NAME = "kaplan_meier"


def groups(rows: Sequence[Row], cards: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """time (n,), event (n,) 0 or 1, high risk bool (n,), one per patient; None if a training has no threshold.

    A patient with several trainings (seeds, repetitions) is of high risk if its risk lies above their thresholds on
    average: risks of two trainings have no common scale, distances to the own threshold do.
    """
    cut = {(c["split"]["repeat"], c["split"]["fold"], c["seed"]): c.get("risk_threshold", math.nan) for c in cards}
    each: dict[str, list[float]] = {}
    truth: dict[str, tuple[float, float]] = {}
    for r in rows:
        above = float(r["risk"]) - cut[int(r["repeat"]), int(r["fold"]), int(r["seed"])]
        each.setdefault(r["patient"], []).append(above)
        truth[r["patient"]] = (float(r["time"]), float(r["event"]))
    above = np.array([np.mean(v) for v in each.values()])
    if np.isnan(above).any():
        return None
    time, event = np.array([truth[p] for p in each]).T
    return time, event, above > 0


def log_rank(rows: Sequence[Row], cards: Sequence[dict[str, Any]]) -> float:
    """p value of the log-rank test between the groups; NaN where there are none."""
    found = groups(rows, cards)
    return math.nan if found is None else metrics.log_rank(*found)


def draw(out: Path, rows: Sequence[Row], cards: Sequence[dict[str, Any]]) -> None:
    """Write the picture and its numbers into `out`; nothing where there are no groups."""
    found = groups(rows, cards)
    if found is None:
        return
    figures.save_all(out, {NAME: figures.kaplan_meier(*found, metrics.log_rank(*found))})
    (out / f"{NAME}.csv").write_text(training.table(steps(*found)))


def steps(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> list[Row]:
    """The curves as rows: per group and time at which something happens, patients at risk just before it, events,
    censored, and the Kaplan-Meier estimate after it."""
    made: list[Row] = []
    for name, own in (("low", ~high), ("high", high)):
        if not own.any():
            continue
        t, e = time[own], event[own]
        for at, alive in zip(*metrics.kaplan_meier(t, e), strict=True):
            made.append({"group": name, "time": float(at), "at_risk": int((t >= at).sum()),
                         "events": int(((t == at) & (e == 1)).sum()), "censored": int(((t == at) & (e == 0)).sum()),
                         "event_free": float(alive)})
    return made
