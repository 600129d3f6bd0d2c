"""A table alone as a model: its penalty by inner folds of the training part, and what it says of those it did not see.

In: a design (a table that can be fitted on some patients and read of all), targets, inner folds. Out: the fitted scores
and the out-of-fold scores of every patient that was learnt from. The penalty is the one of the largest cross-validated
likelihood; of survival that of Verweij and van Houwelingen (1993), l(all; b_-k) - l(others; b_-k). The likelihood, and
not the C-index, because thirty events rank too few pairs to choose by. Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mhim.mil.fusion import linear
from mhim.mil.fusion.linear import Form, Linear

PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
# int (m,) patients to learn from -> float64 (n, p) of all patients, every fitted number from those m alone
Design = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Member:
    """linear: fitted on all patients of the training part. penalty: the chosen one, per `Reduced.scale`. outside:
    float64 (n, q), each patient's scores by the fit that did not see it. risk: cross-validated loss per penalty."""

    linear: Linear
    penalty: float
    outside: np.ndarray
    risk: tuple[float, ...]


def fit(design: Design, target: np.ndarray, form: Form, inner: Sequence[np.ndarray], levels: int = 0) -> Member:
    """Fit a table on its n patients. inner: int arrays, the patients that each inner fold leaves out, each once."""
    n = len(target)
    everyone = np.arange(n)
    q = {"survival": 1, "number": 1, "classes": levels, "grades": levels - 1}[form]
    outside = np.zeros((len(PENALTIES), n, q))
    risk = np.zeros(len(PENALTIES))
    for left in inner:
        kept = np.setdiff1d(everyone, left)
        x = design(kept)
        of = linear.reduced(x[kept])
        start = None
        for k, penalty in enumerate(PENALTIES):
            found = linear.fit(of, target[kept], form, penalty, levels, start)
            start = found[0]
            scores = linear.whole(of, found).scores(x)
            outside[k, left] = scores[left]
            if form == "survival":
                risk[k] += linear.loss(scores, target, form) - linear.loss(scores[kept], target[kept], form)
            else:
                risk[k] += linear.loss(scores[left], target[left], form)
    best = int(np.argmin(risk))
    of = linear.reduced(design(everyone))
    start = None
    for penalty in PENALTIES[: best + 1]:  # from the strongest on, each from the one before: a sure and quick way
        found = linear.fit(of, target, form, penalty, levels, start)
        start = found[0]
    return Member(linear.whole(of, found), PENALTIES[best], outside[best], tuple(risk.tolist()))
