"""What an outcome is to a fusion: the form of its scores, the task that fused logits are of, and targets as arrays.

In: a `Task`. Out: what `linear.py`, `member.py` and `late.py` take. A survival model of time bins is fused by its
risk, so the fused task is Cox's; grades are fused by the steps of a continuation ratio (corn), whatever the slide
model's link. Knows no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mhim.configs.errors import UserError
from mhim.mil import tasks
from mhim.mil.fusion.linear import Form
from mhim.mil.tasks import Target, Task

_FORMS: dict[str, Form] = {
    "classification": "classes",
    "nll": "survival",
    "cox": "survival",
    "ordinal": "grades",
    "regression": "number",
}
LEAST = 1e-6  # of a probability before its logarithm
SEVERAL = "train.fusion is of one outcome: give one --label-column (several are trained by several runs)"


class NotFused(UserError, ValueError):
    """An outcome, or a setting, that no fusion is made of; the message says what to do."""


def form(task: Task) -> Form:
    """How the scores of a task are read. Raises NotFused for several outcomes at once."""
    found = _FORMS.get(task.kind)
    if found is None:
        raise NotFused(SEVERAL)
    return found


def levels(task: Task) -> int:
    """Number of classes or grades; 0 of others."""
    return len(task.classes)


def fused(task: Task, targets: Sequence[Target]) -> Task:
    """The task of the fused logits. targets: of the training part."""
    kind = form(task)
    if kind == "survival":
        return tasks.cox_survival(targets)
    if kind == "grades":
        return tasks.ordinal(task.classes, targets, "corn")
    if kind == "classes":
        return tasks.classification(task.classes, targets)
    return task


def arrays(task: Task, targets: Sequence[Target]) -> np.ndarray:
    """Targets as `linear.fit` takes them: float64 (n, 2), int64 (n,), or float64 (n,) in the task's standard units."""
    kind = form(task)
    if kind == "survival":
        return np.array([list(t) for t in targets if isinstance(t, tuple)], dtype=np.float64)
    values = np.array([float(t) for t in targets if isinstance(t, (int, float))])
    if kind == "number":
        plain: Any = task
        scaled: np.ndarray = (values - plain.mean) / plain.sd
        return scaled
    return values.astype(np.int64)


def scores(task: Task, logits: np.ndarray) -> np.ndarray:
    """float64 (n, q), what is fused, of a model's logits (n, n_out)."""
    given = torch.from_numpy(np.asarray(logits, np.float64))
    kind = form(task)
    if kind == "survival":
        return task.risk(given).numpy()[:, None]
    if kind == "grades":
        above = (1.0 - task.probabilities(given).numpy().cumsum(axis=1))[:, :-1]  # P(y > k)
        before = np.concatenate([np.ones((len(above), 1)), above[:, :-1]], axis=1)
        step = np.clip(above / np.clip(before, LEAST, None), LEAST, 1 - LEAST)
        return np.asarray(np.log(step / (1 - step)))
    return given.numpy()
