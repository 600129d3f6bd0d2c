"""What the viewer says of a decision: where it lies on the scale of the value that is shown beside it.

In: a patient's row of predictions.csv. Out: JSON values. The decision itself is made elsewhere, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mhim.mil.tasks import Task
from mhim.pipeline.results import fused, risk_groups
from mhim.pipeline.results.measures.measure import Row


def cut(row: Row, classes: Sequence[str]) -> dict[str, Any]:
    """Where the decision of a row lies on the scale of its value: the frozen threshold and the undecided band; nothing
    where its trainings froze none. Of survival also the group."""
    told: dict[str, Any] = {}
    names = ("threshold", "undecided_from", "undecided_to") if classes else ("risk_threshold",)
    if all(_finite(row.get(name)) for name in names):
        cut, *band = (float(row[name]) for name in names)
        told["threshold"] = cut
        if band and band[0] < band[1]:
            told["undecided"] = band
    group = None if classes else risk_groups.high(row)
    return told if group is None else {**told, "group": "high risk" if group else "low risk"}


def modalities(share: fused.Share | None, task: Task) -> dict[str, Any]:
    """What each modality at hand weighs in a fused answer, and adds to its score; nothing of slides alone."""
    if share is None:
        return {}
    each = [{"name": n, "weight": w, "adds": share.parts[n]} for n, w in share.weights.items()]
    return {"modalities": each, "unit": fused.unit(task)}


def _finite(value: Any) -> bool:
    return value not in (None, "") and math.isfinite(float(value))
