"""One file per kind of outcome: what its results are. `of` gives the measure of a task."""

from __future__ import annotations

from mhim.mil.tasks import Task
from mhim.pipeline.results.measures.classification import Classification
from mhim.pipeline.results.measures.measure import Measure
from mhim.pipeline.results.measures.ordinal import Ordinal
from mhim.pipeline.results.measures.regression import Regression
from mhim.pipeline.results.measures.survival import Survival

KINDS: dict[str, type[Measure]] = {
    "classification": Classification,
    "nll": Survival,
    "cox": Survival,
    "ordinal": Ordinal,
    "regression": Regression,
}


def of(task: Task) -> Measure:
    """The measure of a task with one target."""
    return KINDS[task.kind](task)
