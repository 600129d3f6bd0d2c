"""Several trainings' answers about one patient as one answer: where one row per patient is needed.

In: prediction rows, several per patient. Out: one row per patient. It is not what the metrics are of (`estimand.py`),
and stands under its own name: in the report's tables and pictures, in the predictions of new patients, and as the key
`ensemble` of `metrics.json`.

Probabilities and thresholds are averaged, the decision is made anew from them. Risks of two models have no common
scale: each is first turned into its position among the patients that its own model held out, 0 lowest to 1 highest,
and the positions are averaged. A patient is of high risk if at least half of its trainings put it above their own
thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mhim.mil.tasks import Task
from mhim.pipeline.results import measures
from mhim.pipeline.results.measures.measure import Place, Row, bag_of, place


def ensemble(rows: Sequence[Row], task: Task, references: Mapping[Place, np.ndarray] | None = None) -> list[Row]:
    """One row per patient, in the order of their first rows. With one training per patient its row, unchanged.

    references: training -> risks of the patients that it held out; None: those of `rows` themselves.
    Adds `spread`: standard deviation over the trainings of the positive class's probability (the risk's position, the
    predicted value), None for one; `decision` where there are classes; `high_risk` for survival: share of the trainings
    that say so.
    """
    measure = measures.of(task)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(bag_of(row), []).append(row)
    if measure.scale and any(len(members) > 1 for members in groups.values()):
        known = references or _own(rows, measure.scale)
        groups = {p: [measure.placed(m, known[place(m)]) for m in members] for p, members in groups.items()}
    return [measure.one(members) for members in groups.values()]


def of_seeds(rows: Sequence[Row], task: Task) -> list[Row]:
    """The ensemble of the seeds of each (repeat, fold): what a user has who keeps all of a fold's models. Each of these
    counts as one training."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(place(row)[:2], []).append(row)
    return [row for members in groups.values() for row in ensemble(members, task)]


def _own(rows: Sequence[Row], column: str) -> dict[Place, np.ndarray]:
    found: dict[Place, list[float]] = {}
    for row in rows:
        found.setdefault(place(row), []).append(row[column])
    return {where: np.array(values) for where, values in found.items()}
