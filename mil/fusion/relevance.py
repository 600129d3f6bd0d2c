"""How much each feature by itself tells of the outcome, to keep the best of thousands.

In: features (n, p) and targets of the training patients. Out: one score per feature, higher is more. Classes: the F of
an analysis of variance. Numbers: squared Pearson correlation. Survival: the score test of Cox's model at b = 0,
U^2 / I, with Breslow's ties (Cox 1972; of a feature of two values it is the log-rank test).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Target = int | float | tuple[float, float]


def relevance(z: np.ndarray, targets: Sequence[Target]) -> np.ndarray:
    """float64 (p,). targets: all int (classes), all float (numbers) or all (time, event). A constant feature has 0."""
    first = targets[0]
    if isinstance(first, tuple):
        pairs = np.array(targets, dtype=np.float64)
        return of_survival(z, pairs[:, 0], pairs[:, 1] > 0)
    if isinstance(first, (int, np.integer)):
        return of_classes(z, np.array(targets, dtype=np.int64))
    return of_numbers(z, np.array(targets, dtype=np.float64))


def of_classes(z: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Between-class over within-class variance, each over its degrees of freedom."""
    names = np.unique(classes)
    grand = z.mean(axis=0)
    between, within = np.zeros(z.shape[1]), np.zeros(z.shape[1])
    for name in names:
        part = z[classes == name]
        mean = part.mean(axis=0)
        between += len(part) * (mean - grand) ** 2
        within += ((part - mean) ** 2).sum(axis=0)
    if len(names) < 2 or len(z) <= len(names):
        return np.zeros(z.shape[1])
    tiny = np.finfo(np.float64).tiny
    ratio = (between / (len(names) - 1)) / np.maximum(within / (len(z) - len(names)), tiny)
    return np.where(between > 0, ratio, 0.0)


def of_numbers(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Pearson correlation."""
    a, b = z - z.mean(axis=0), y - y.mean()
    norm = (a**2).sum(axis=0) * (b**2).sum()
    return np.where(norm > 0, (a * b[:, None]).sum(axis=0) ** 2 / np.where(norm > 0, norm, 1.0), 0.0)


def of_survival(z: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """U^2 / I of each feature: U sums, over events, its value minus the mean of those at risk; I sums its variance."""
    order = np.argsort(-time, kind="stable")
    z, time, event = z[order], time[order], event[order]
    # the risk set of time t is a beginning of this order: all with a time of t or more
    last = np.searchsorted(-time, -time, side="right") - 1
    n = (last + 1)[:, None]
    mean = np.cumsum(z, axis=0)[last] / n
    square = np.cumsum(z**2, axis=0)[last] / n
    u = (z - mean)[event].sum(axis=0)
    information = np.maximum(square - mean**2, 0.0)[event].sum(axis=0)
    return np.where(information > 1e-12, u**2 / np.where(information > 1e-12, information, 1.0), 0.0)
