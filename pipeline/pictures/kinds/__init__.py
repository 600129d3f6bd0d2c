"""One file per kind of outcome: its pictures. `of` gives those of a task."""

from __future__ import annotations

from mhim.mil.tasks import Task
from mhim.pipeline.pictures.kinds.classification import Classification
from mhim.pipeline.pictures.kinds.kind import Kind
from mhim.pipeline.pictures.kinds.ordinal import Ordinal
from mhim.pipeline.pictures.kinds.regression import Regression
from mhim.pipeline.pictures.kinds.survival import Survival

KINDS: dict[str, type[Kind]] = {
    "classification": Classification,
    "nll": Survival,
    "cox": Survival,
    "ordinal": Ordinal,
    "regression": Regression,
}


def of(task: Task) -> Kind:
    """The pictures of a task with one target."""
    return KINDS[task.kind](task)
