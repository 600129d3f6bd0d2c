"""Which of two models patients speak for: the paired difference of the headline, its standard error, and the verdict.

In: the answers of two models of one outcome, and the truth, of patients whom neither was trained on. Where several
pairs of models answered (inner folds), each pair is compared on its own patients, so that no two patients whom
different models answered are ever compared. Out: one difference, the mean over those pairs of models by their numbers
of patients. Any outcome, by its own headline. Plain NumPy; knows no file and no settings.

The standard error is the delete-one jackknife over patients (Miller, Biometrika 61 (1974)); of the area under the ROC
curve that is DeLong's to a factor n / (n - 1) of each class (Arvesen, Ann. Math. Stat. 40 (1969)). It tells how much
other patients would say otherwise, not how much other trainings would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mhim.mil.tasks import Task

GROUPS = 200  # of more patients so many groups of them are left out in turn, which bounds the time


@dataclass(frozen=True, eq=False)
class Pair:
    """What two models say of the same bags.

    truth: (n,) or (n, width), as `Task.truth` gives it. simple, other: float64 (n, n_out) logits. owner: (n,), whose
    each bag is: patients are left out whole."""

    task: Task
    truth: np.ndarray
    simple: np.ndarray
    other: np.ndarray
    owner: np.ndarray

    @property
    def patients(self) -> int:
        """How many there are."""
        return len(np.unique(self.owner))


@dataclass(frozen=True)
class Evidence:
    """value: headline of the other model less that of the simple one; NaN where the patients define none. error: its
    standard error; NaN where leaving out one patient leaves none. patients: those that gave evidence. parts: pairs of
    models that did; of: that there were."""

    value: float
    error: float
    patients: int
    parts: int
    of: int

    def tells(self, margin: float) -> bool:
        """Whether the difference is beyond `margin` standard errors, either way."""
        return math.isfinite(self.error) and self.value != 0.0 and abs(self.value) > margin * self.error

    def prefers_other(self, margin: float) -> bool:
        """Whether the other model is better, by more than `margin` standard errors: a tie is the simple one's."""
        return self.tells(margin) and self.value > 0


def weigh(pairs: Sequence[Pair]) -> Evidence:
    """The evidence of all pairs of models. A pair whose patients do not define difference and error gives none; where
    none does, the first that has a difference is told without an error."""
    found = [(*_difference(pair), pair.patients) for pair in pairs]
    there = [f for f in found if math.isfinite(f[1])]
    if not there:
        value = next((v for v, _, _ in found if math.isfinite(v)), math.nan)
        return Evidence(value, math.nan, sum(n for _, _, n in found), 0, len(pairs))
    share = np.array([n for _, _, n in there], dtype=np.float64) / sum(n for _, _, n in there)
    value = float(share @ np.array([v for v, _, _ in there]))
    error = math.sqrt(float(share**2 @ np.array([e**2 for _, e, _ in there])))
    return Evidence(value, error, sum(n for _, _, n in there), len(there), len(pairs))


def _difference(pair: Pair) -> tuple[float, float]:
    """The difference of one pair of models and its standard error."""
    _, group = np.unique(pair.owner, return_inverse=True)
    group = group % GROUPS
    count = int(group.max()) + 1 if len(group) else 0
    whole = _headline(pair, np.ones(len(group), dtype=bool)) if count else math.nan
    if count < 2 or not math.isfinite(whole):
        return whole, math.nan
    without = np.array([_headline(pair, group != g) for g in range(count)])
    spread = float(((without - without.mean()) ** 2).sum())
    return whole, math.sqrt((count - 1) / count * spread)


def _headline(pair: Pair, kept: np.ndarray) -> float:
    """Headline of the other less that of the simple model, of the bags with `kept`, bool (n,)."""
    if not kept.any():
        return math.nan
    task, truth = pair.task, pair.truth[kept]
    both = [task.headline_of(truth, torch.from_numpy(x[kept]))[task.headline] for x in (pair.simple, pair.other)]
    return both[1] - both[0]
