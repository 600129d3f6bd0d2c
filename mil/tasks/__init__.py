"""What a model is trained for, as values: one file per outcome.

In: logits of a bag batch and its targets. Out: the loss, the probabilities or the risk, the metrics, the name of the
headline one. A task is a frozen value that JSON can carry (`to_json`, `from_json`), so a model bundle says by itself
what its outputs mean.

Targets are plain: the class index or level, a number, `(time, event)` with event 1 = seen, 0 = censored; `Cells` of
several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhim.mil.tasks import one
from mhim.mil.tasks.base import EPS, Cells, Kind, One, Points, Target, Task, TaskError
from mhim.mil.tasks.classification import Classification, classification
from mhim.mil.tasks.ordinal import Ordinal, median, ordinal
from mhim.mil.tasks.regression import LEVELS, Regression, regression
from mhim.mil.tasks.several import WORST, Several, several
from mhim.mil.tasks.survival import Cox, Nll, Survival, check_survival, cox_survival, discrete_survival, nll_each

__all__ = [
    "EPS",
    "LEVELS",
    "WORST",
    "Cells",
    "Classification",
    "Cox",
    "Kind",
    "Nll",
    "One",
    "Ordinal",
    "Points",
    "Regression",
    "Several",
    "Survival",
    "Target",
    "Task",
    "TaskError",
    "check_survival",
    "classification",
    "cox_survival",
    "discrete_survival",
    "from_json",
    "median",
    "nll_each",
    "ordinal",
    "regression",
    "several",
]


def from_json(value: Mapping[str, Any]) -> Task:
    """The task that `Task.to_json` described."""
    return Several.from_json(value) if value["kind"] == "several" else one.from_json(value)
