"""Risk groups of a survival run: held-out patients above and below the threshold that others gave, and their picture.

In: one row per held-out patient with its truth (`ensemble.py`). Out: the groups, their log-rank test, and
`kaplan_meier.svg`, `.png` (curves with the number at risk below) and `.csv` beside the run. The threshold of a training
is the median risk of its validation patients: no patient that is drawn had a part in it, and each patient's risk is
compared with the threshold of the very training that gave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mhim.mil import metrics

Row = dict[str, Any]
NAME = "kaplan_meier"


def high(row: Row) -> bool | None:
    """Whether a row (of one training or of several) is of high risk; None if its trainings had no threshold."""
    if row.get("high_risk") not in (None, ""):
        share = float(row["high_risk"])
    else:
        cut = row.get("risk_threshold")
        share = math.nan if cut in (None, "") or math.isnan(float(cut)) else float(row["risk"] > float(cut))
    return None if math.isnan(share) else share >= 0.5


def groups(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """time (n,), event (n,) 0 or 1, high risk bool (n,), one per patient; None if a training has no threshold.

    rows: one per patient (`ensemble.ensemble`)."""
    each = [high(r) for r in rows]
    if any(h is None for h in each):
        return None
    time, event = (np.array([float(r[k]) for r in rows]) for k in ("time", "event"))
    return time, event, np.array(each, dtype=bool)


def log_rank(rows: Sequence[Row], by_fold: bool = False) -> float:
    """p value of the log-rank test between the groups; NaN where there are none. by_fold: stratified, so that only
    patients whom the same fold held out are compared."""
    found = groups(rows)
    strata = np.array([r["fold"] for r in rows]) if by_fold else None
    return math.nan if found is None else metrics.log_rank(*found, strata)


def steps(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> list[Row]:
    """The curves as rows: per group and time at which something happens, patients at risk just before it, events,
    censored, and the Kaplan-Meier estimate after it."""
    made: list[Row] = []
    for name, own in (("low", ~high), ("high", high)):
        if not own.any():
            continue
        t, e = time[own], event[own]
        for at, alive in zip(*metrics.kaplan_meier(t, e), strict=True):
            made.append(
                {
                    "group": name,
                    "time": float(at),
                    "at_risk": int((t >= at).sum()),
                    "events": int(((t == at) & (e == 1)).sum()),
                    "censored": int(((t == at) & (e == 0)).sum()),
                    "event_free": float(alive),
                }
            )
    return made
