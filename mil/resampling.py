"""The bootstrap over patients: how often each is drawn, the interval of many values, the verdict on a difference.

In: the number of patients and their strata (the fold that held each out). Out: weights for `estimators.py`, drawn from
a fixed seed in blocks of bounded memory, so that two runs over the same patients meet the same draws. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 2_000_000  # weights that are held at once, 16 MB
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Interval:
    """A point estimate and its bootstrap interval; `n` is the number of bootstrap samples that defined the metric."""

    value: float
    low: float
    high: float
    n: int


def draws(
    n: int, samples: int, strata: np.ndarray | None = None, seed: int = 0, clusters: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Weights float64 (D, n) block by block, `samples` rows in all: patients drawn with replacement in their stratum.

    strata: int (n,), None is one. A draw keeps the number of patients of each stratum; strata of a single patient, in
    which nothing could vary, are drawn together. clusters: int (n,), 0 to the number of patients, whose each slide is:
    then patients are drawn, each with all its slides (cluster bootstrap), in their stratum.
    """
    if clusters is not None:
        whole, first = np.unique(clusters, return_index=True)
        of_patients = draws(len(whole), samples, None if strata is None else strata[first], seed)
        place = np.searchsorted(whole, clusters)
        yield from (weights[:, place] for weights in of_patients)
        return
    rng = np.random.default_rng(seed)
    groups = [np.arange(n)] if strata is None else [np.flatnonzero(strata == s) for s in np.unique(strata)]
    alone = [g for g in groups if len(g) == 1]
    groups = [g for g in groups if len(g) > 1] + ([np.concatenate(alone)] if alone else [])
    rows = max(1, BLOCK // max(n, 1))
    for start in range(0, samples, rows):
        size = min(rows, samples - start)
        weights = np.zeros((size, n))
        for group in groups:
            picked = rng.integers(len(group), size=(size, len(group))) + len(group) * np.arange(size)[:, None]
            counts = np.bincount(picked.ravel(), minlength=size * len(group))
            weights[:, group] = counts.reshape(size, len(group))
        yield weights


def bootstrap(
    metric: Callable[[np.ndarray], Values],
    n: int,
    samples: int,
    strata: np.ndarray | None = None,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> tuple[dict[str, float], Values]:
    """Point values of `metric` (weights (D, n) -> values (D,)) with all patients once, and its values in the draws."""
    point = {name: float(v[0]) for name, v in metric(np.ones((1, n))).items()}
    blocks = [metric(weights) for weights in draws(n, samples, strata, seed, clusters)]
    return point, {name: np.concatenate([b[name] for b in blocks]) if blocks else np.empty(0) for name in point}


def interval(value: float, drawn: np.ndarray, confidence: float) -> Interval:
    """Percentile interval over the draws that define the metric; NaN bounds without any."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"), 0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high), len(drawn))


def intervals(
    metric: Callable[[np.ndarray], Values],
    n: int,
    samples: int,
    confidence: float,
    strata: np.ndarray | None = None,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Every value of `metric` with its percentile interval over patients drawn with replacement in their stratum."""
    point, drawn = bootstrap(metric, n, samples, strata, seed, clusters)
    return {name: interval(value, drawn[name], confidence) for name, value in point.items()}


def verdict(difference: float, drawn: np.ndarray, confidence: float) -> dict[str, Any]:
    """A paired difference (drawn: of the same resampled patients): its interval, the two-sided bootstrap p value, and
    better, worse or no difference (the interval holds 0)."""
    found = interval(difference, drawn, confidence)
    drawn = drawn[np.isfinite(drawn)]
    said = "no difference"
    if len(drawn) and found.low > 0:
        said = "better"
    elif len(drawn) and found.high < 0:
        said = "worse"
    p = float("nan")
    if len(drawn):
        p = min(1.0, 2 * max(float(min((drawn <= 0).mean(), (drawn >= 0).mean())), 1 / (len(drawn) + 1)))
    return {"difference": found, "p": p, "verdict": said}
