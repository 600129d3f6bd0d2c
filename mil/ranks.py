"""Which of several models is ahead, over sets: mean ranks, whether they differ at all, and by how much they must.

In: one number per set and model, more is better. Out: ranks, the Friedman test and the Nemenyi critical difference
(Demšar, JMLR 7 (2006)): two models whose mean ranks lie closer than it are not told apart by these sets. Knows no
model.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def ranks(values: np.ndarray) -> np.ndarray:
    """(..., M) ranks of M models, 1 the best, ties at their mean; what is undefined (NaN) is last."""
    filled = np.where(np.isfinite(values), values, -np.inf)
    found: np.ndarray = stats.rankdata(-filled, axis=-1)
    return found


def friedman(values: np.ndarray) -> float:
    """p value of the hypothesis that all M models are alike on S sets, values (S, M); NaN for fewer than 3 models or 2
    sets, and where no set tells any two apart."""
    sets, models = values.shape
    if models < 3 or sets < 2:
        return math.nan
    each = ranks(values)
    if np.ptp(each, axis=1).max() == 0:
        return math.nan
    return float(stats.friedmanchisquare(*each.T).pvalue)


def critical_difference(models: int, sets: int, alpha: float = 0.05) -> float:
    """Least difference of two mean ranks that is more than chance, over all pairs of `models` on `sets`:
    q sqrt(M (M + 1) / (6 S)), q the studentised range's quantile over sqrt 2 (Nemenyi)."""
    q = float(stats.studentized_range.ppf(1 - alpha, models, np.inf)) / math.sqrt(2)
    return q * math.sqrt(models * (models + 1) / (6 * sets))
