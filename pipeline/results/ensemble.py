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

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mhim.pipeline.results import estimand, operating_point

Row = dict[str, Any]
AVERAGED = ("threshold", "undecided_from", "undecided_to", "unlike")


def position(risk: float, reference: np.ndarray) -> float:
    """Share of the reference risks below `risk`, ties a half: its mid-rank, between 0 and 1. reference: (m,), m > 0."""
    return float(((reference < risk).sum() + 0.5 * (reference == risk).sum()) / len(reference))


def ensemble(rows: Sequence[Row], references: Mapping[estimand.Place, np.ndarray] | None = None) -> list[Row]:
    """One row per patient, in the order of their first rows. With one training per patient its row, unchanged.

    references: training -> risks of the patients that it held out; None: those of `rows` themselves.
    Adds `spread`: standard deviation over the trainings of the positive class's probability (or the risk's position),
    None for one; `decision` where there are classes; `high_risk` for survival: share of the trainings that say so.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["patient"], []).append(row)
    several = any(len(members) > 1 for members in groups.values())
    if several and rows and "risk" in rows[0]:
        known = references or _own(rows)
        groups = {p: [_placed(m, known) for m in members] for p, members in groups.items()}
    return [_one(members) for members in groups.values()]


def of_seeds(rows: Sequence[Row]) -> list[Row]:
    """The ensemble of the seeds of each (repeat, fold): what a user has who keeps all of a fold's models. Each of these
    counts as one training."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault(estimand.place(row)[:2], []).append(row)
    return [row for members in groups.values() for row in ensemble(members)]


def high(row: Row) -> bool | None:
    """Whether a row (of one training or of several) is of high risk; None if its trainings had no threshold."""
    if row.get("high_risk") not in (None, ""):
        share = float(row["high_risk"])
    else:
        cut = row.get("risk_threshold")
        share = math.nan if cut in (None, "") or math.isnan(float(cut)) else float(row["risk"] > float(cut))
    return None if math.isnan(share) else share >= 0.5


def _own(rows: Sequence[Row]) -> dict[estimand.Place, np.ndarray]:
    risks: dict[estimand.Place, list[float]] = {}
    for row in rows:
        risks.setdefault(estimand.place(row), []).append(row["risk"])
    return {place: np.array(values) for place, values in risks.items()}


def _placed(row: Row, references: Mapping[estimand.Place, np.ndarray]) -> Row:
    """The row with its risk and threshold as positions, and what its own model says of the group."""
    own = high(row)
    reference = references[estimand.place(row)]
    cut = row.get("risk_threshold")
    moved = {"risk": position(row["risk"], reference), "high_risk": math.nan if own is None else float(own)}
    if cut not in (None, ""):
        moved["risk_threshold"] = position(cut, reference) if math.isfinite(cut) else math.nan
    return row | moved


def _one(members: Sequence[Row]) -> Row:
    row = dict(members[0])
    for key in row:
        if len(members) > 1 and (
            key in (*AVERAGED, "risk", "risk_threshold", "high_risk") or key.startswith(("p_", "free_after_bin_"))
        ):
            row[key] = float(np.mean([m[key] for m in members]))
    classes = [k.removeprefix("p_") for k in row if k.startswith("p_")]
    if "decision" in row:
        row["decision"] = operating_point.called(row, classes)
    of = f"p_{classes[-1]}" if classes else "risk"
    row["spread"] = float(np.std([m[of] for m in members], ddof=1)) if len(members) > 1 else None
    return row
