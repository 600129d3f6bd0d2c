"""How good ordinal and regression predictions of one model are, and what is fitted on validation: point values.

In: NumPy arrays of targets and predictions, one row per patient. Out: plain floats; NaN where the patients at hand do
not define a metric, never a made-up number. Knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mhim.mil import estimators, metrics


def quadratic_kappa(labels: np.ndarray, called: np.ndarray, levels: int) -> float:
    """Cohen's kappa with quadratic weights, see `estimators.quadratic_kappa`. labels, called: int (n,)."""
    counts = estimators.confusion(labels, called, levels, np.ones((1, len(labels))))
    return float(estimators.quadratic_kappa(counts)[0])


def ordinal(labels: np.ndarray, probabilities: np.ndarray, called: np.ndarray) -> metrics.Metrics:
    """quadratic_kappa, mae and accuracy of the called level; auc_above_<k>: AUC of P(y > k). probabilities: (n, K)."""
    levels = probabilities.shape[1]
    wrong = np.abs(labels - called)
    found = {
        "quadratic_kappa": quadratic_kappa(labels, called, levels),
        "mae": float(wrong.mean()) if len(labels) else float("nan"),
        "accuracy": float((wrong == 0).mean()) if len(labels) else float("nan"),
    }
    above = 1.0 - np.cumsum(probabilities, axis=1)
    w = np.ones((1, len(labels)))
    for k in range(levels - 1):
        found[f"auc_above_{k}"] = float(estimators.ratio(estimators.auc_pairs(labels > k, above[:, k], w))[0])
    return found


def r2(truth: np.ndarray, value: np.ndarray) -> float:
    """The share of the variance that is explained, see `estimators.r2`; NaN where the truth does not vary."""
    return float(estimators.r2(truth, value, np.ones((1, len(truth))))[0])


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation; NaN where one of the two does not vary."""
    return float(estimators.pearson(a, b, np.ones((1, len(a))))[0])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks, ties at their mean rank."""
    return float(estimators.spearman(a, b, np.ones((1, len(a))))[0])


def conformal_half_width(error: np.ndarray, level: float) -> float:
    """Half width of the split conformal interval (Lei et al. 2018): the ceil((n + 1) level)-th smallest absolute error;
    infinite where n is smaller than that."""
    rank = int(np.ceil(round((len(error) + 1) * level, 9)))
    return float(np.sort(error)[rank - 1]) if rank <= len(error) else float("inf")


def regression(truth: np.ndarray, value: np.ndarray, interval: Mapping[str, float | None]) -> metrics.Metrics:
    """r2, mae, rmse, pearson, spearman, and coverage_<level> of the intervals: level -> half width, None of the whole
    line."""
    wrong = np.abs(truth - value)
    found = {
        "r2": r2(truth, value),
        "mae": float(wrong.mean()) if len(wrong) else float("nan"),
        "rmse": float(np.sqrt((wrong**2).mean())) if len(wrong) else float("nan"),
        "pearson": pearson(truth, value),
        "spearman": spearman(truth, value),
    }
    for level, width in interval.items():
        found[f"coverage_{level}"] = float((wrong <= (np.inf if width is None else width)).mean())
    return found


def tempered(loss: Callable[[float], float]) -> float:
    """The temperature that minimises `loss`, a sum over patients, plus one pseudo-observation with log T normal around
    0, as `metrics.temperature` does for classes."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(lambda t: loss(float(np.exp(t))) + 0.5 * t**2, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))
