"""How good predictions are: point values, bootstrap intervals by patient, paired comparison of two models.

In: NumPy arrays of targets and predictions, one row per patient. Out: plain floats. Classification goes through
scikit-learn, survival through lifelines. Knows no model, no file. A metric that the cases at hand do not define (one
class only, no event) is NaN, never a made-up number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Metrics = dict[str, float]


@dataclass(frozen=True)
class Interval:
    """A point estimate and its bootstrap interval; `n` is the number of bootstrap samples that defined the metric."""

    value: float
    low: float
    high: float
    n: int


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: of the last class for two classes, macro one-vs-rest for more; NaN if a class lacks.

    labels: int (n,). probabilities: float (n, C).
    """
    from sklearn.metrics import roc_auc_score

    n_classes = probabilities.shape[1]
    if len(np.unique(labels)) < n_classes:
        return float("nan")
    if n_classes == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    each = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(n_classes)]
    return float(np.mean(each))


def auprc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Average precision: of the last class for two classes, macro one-vs-rest for more; NaN if a class lacks."""
    from sklearn.metrics import average_precision_score

    n_classes = probabilities.shape[1]
    if len(np.unique(labels)) < n_classes:
        return float("nan")
    classes = [1] if n_classes == 2 else range(n_classes)
    return float(np.mean([average_precision_score(labels == c, probabilities[:, c]) for c in classes]))


def ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over equal-width confidence bins."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = sum(abs(right[which == b].sum() - confidence[which == b].sum()) for b in np.unique(which))
    return float(gap / len(labels))


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Brier score: mean squared distance to the one-hot truth, halved for two classes so that it is the usual one."""
    truth = np.eye(probabilities.shape[1])[labels]
    scale = 0.5 if probabilities.shape[1] == 2 else 1.0
    return float(scale * ((probabilities - truth) ** 2).sum(axis=1).mean())


def classification(labels: np.ndarray, probabilities: np.ndarray, threshold: float | None = None) -> Metrics:
    """All classification metrics. labels: int (n,); probabilities: float (n, C), rows sum to one.

    threshold: for two classes, predict the last class where its probability is at least this; None takes the most
    probable class. A class with no case is left out of balanced accuracy.
    """
    from sklearn.metrics import cohen_kappa_score, f1_score

    n_classes = probabilities.shape[1]
    if threshold is not None and n_classes == 2:
        predicted = (probabilities[:, 1] >= threshold).astype(int)
    else:
        predicted = probabilities.argmax(axis=1)
    recalls = [float((predicted[labels == c] == c).mean()) for c in np.unique(labels)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kappa of one class is 0/0, which is NaN here as documented
        kappa = float(cohen_kappa_score(labels, predicted, labels=list(range(n_classes))))
    return {
        "auc": auc(labels, probabilities),
        "auprc": auprc(labels, probabilities),
        "balanced_accuracy": float(np.mean(recalls)),
        "f1": float(f1_score(labels, predicted, average="macro", labels=list(range(n_classes)), zero_division=0)),
        "accuracy": float((predicted == labels).mean()),
        "kappa": kappa,
        "brier": brier(labels, probabilities),
        "ece": ece(labels, probabilities),
    }


def c_index(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's concordance of risk (larger = earlier event) with time; NaN when no pair is comparable."""
    from lifelines.utils import concordance_index

    try:
        return float(concordance_index(time, -np.asarray(risk, dtype=np.float64), event))
    except ZeroDivisionError:
        return float("nan")


def time_auc(time: np.ndarray, event: np.ndarray, risk: np.ndarray, at: float) -> float:
    """Cumulative/dynamic AUC at time `at` (Uno et al. 2007): cases had the event by then, controls live on.

    Cases are weighted by the inverse Kaplan–Meier probability of not being censored before their event. NaN without
    a case or a control.
    """
    from lifelines import KaplanMeierFitter

    case, control = (event.astype(bool)) & (time <= at), time > at
    if not case.any() or not control.any():
        return float("nan")
    censoring = KaplanMeierFitter().fit(time, 1 - event.astype(int))
    # Just before the event: the probability of still being under observation then.
    kept = censoring.survival_function_at_times(np.nextafter(time[case], 0)).to_numpy()
    weight = 1.0 / np.clip(kept, 1e-3, None)
    higher = risk[case][:, None] > risk[control][None, :]
    equal = risk[case][:, None] == risk[control][None, :]
    return float((weight[:, None] * (higher + 0.5 * equal)).sum() / (weight.sum() * control.sum()))


def survival(time: np.ndarray, event: np.ndarray, risk: np.ndarray, horizons: Sequence[float] = ()) -> Metrics:
    """C-index, and the time-dependent AUC at each horizon (in the labels' time unit), named time_auc_1, 2 ..."""
    found = {"c_index": c_index(time, event, risk)}
    for k, at in enumerate(horizons, start=1):
        found[f"time_auc_{k}"] = time_auc(time, event, risk, at)
    return found


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step times and survival probabilities of the Kaplan–Meier estimate, starting at (0, 1)."""
    from lifelines import KaplanMeierFitter

    curve = KaplanMeierFitter().fit(time, event).survival_function_
    return curve.index.to_numpy(dtype=np.float64), curve.iloc[:, 0].to_numpy(dtype=np.float64)


def log_rank(time: np.ndarray, event: np.ndarray, high: np.ndarray) -> float:
    """p value of the log-rank test between high-risk (True) and low-risk patients; NaN if a group is empty."""
    from lifelines.statistics import logrank_test

    high = high.astype(bool)
    if high.all() or not high.any():
        return float("nan")
    return float(logrank_test(time[high], time[~high], event[high], event[~high]).p_value)


def youden(labels: np.ndarray, probability: np.ndarray) -> float:
    """The threshold on the positive class with the largest sensitivity + specificity - 1, midway between two values.

    To be found on validation and frozen. 0.5 when `labels` holds one class only.
    """
    return _operating(labels, probability, lambda tpr, fpr: tpr - fpr)


def at_sensitivity(labels: np.ndarray, probability: np.ndarray, wanted: float) -> float:
    """The threshold of the best specificity among those whose sensitivity is at least `wanted`."""
    return _operating(labels, probability, lambda tpr, fpr: np.where(tpr >= wanted - 1e-12, 1 - fpr, -1.0))


def at_specificity(labels: np.ndarray, probability: np.ndarray, wanted: float) -> float:
    """The threshold of the best sensitivity among those whose specificity is at least `wanted`."""
    return _operating(labels, probability, lambda tpr, fpr: np.where(1 - fpr >= wanted - 1e-12, tpr, -1.0))


def _operating(
    labels: np.ndarray, probability: np.ndarray, value: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> float:
    """Threshold with the largest `value(tpr, fpr)`; the smallest change of class sizes breaks ties."""
    if len(np.unique(labels)) < 2:
        return 0.5
    cuts = np.unique(probability)
    cuts = np.concatenate([[cuts[0]], (cuts[1:] + cuts[:-1]) / 2, [np.nextafter(cuts[-1], np.inf)]])
    called = probability[:, None] >= cuts[None, :]
    tpr, fpr = called[labels == 1].mean(axis=0), called[labels == 0].mean(axis=0)
    return float(cuts[int(np.argmax(value(tpr, fpr)))])


def temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T of softmax(logits / T) (Guo et al. 2017), to be found on validation and frozen.

    Minimises the log loss plus that of one pseudo-observation with log T normal around 0: a handful of patients, all
    classified rightly, would otherwise ask for T = 0.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_t: float) -> float:
        chosen = log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels]
        return -float(chosen.sum()) + 0.5 * log_t**2

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return float(np.exp(found.x))


def bootstrap(
    metric: Callable[[np.ndarray], Metrics], n_patients: int, samples: int, confidence: float, seed: int = 0,
    strata: np.ndarray | None = None,
) -> dict[str, Interval]:
    """Percentile intervals of every value of `metric` over patients drawn with replacement.

    metric: row indices -> values; it is called with all rows first for the point estimate. strata: int (n,); draws
    keep the number of patients of each stratum (of each fold, say). samples 0 gives NaN intervals.
    """
    point = metric(np.arange(n_patients))
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(samples):
        for name, value in metric(_resample(rng, n_patients, strata)).items():
            if np.isfinite(value):
                draws[name].append(value)
    return {name: _interval(value, draws[name], confidence) for name, value in point.items()}


def paired(
    metric: Callable[[np.ndarray, int], float], n_patients: int, samples: int, confidence: float, seed: int = 0,
) -> dict[str, Any]:
    """Difference of one metric between model 1 and model 0 on the same resampled patients.

    metric: (row indices, which model) -> value. Returns the difference with its interval, the two-sided bootstrap p
    value, and the verdict: better, worse or no difference (the interval holds 0).
    """
    rows = np.arange(n_patients)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(samples):
        drawn = _resample(rng, n_patients, None)
        difference = metric(drawn, 1) - metric(drawn, 0)
        if np.isfinite(difference):
            draws.append(difference)
    found = _interval(metric(rows, 1) - metric(rows, 0), draws, confidence)
    verdict = "no difference"
    if draws and found.low > 0:
        verdict = "better"
    elif draws and found.high < 0:
        verdict = "worse"
    tail = min(np.mean(np.array(draws) <= 0), np.mean(np.array(draws) >= 0)) if draws else float("nan")
    p_value = min(1.0, 2 * max(float(tail), 1 / (len(draws) + 1))) if draws else float("nan")
    return {"difference": found, "p": p_value, "verdict": verdict}


def over_folds(per_fold: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Mean, standard deviation (n - 1) and number of the defined values of each metric over folds or seeds."""
    found: dict[str, tuple[float, float, int]] = {}
    for name in per_fold[0] if per_fold else ():
        values = np.array([m[name] for m in per_fold if np.isfinite(m[name])])
        sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[name] = (float(values.mean()) if len(values) else float("nan"), sd, len(values))
    return found


def _resample(rng: np.random.Generator, n: int, strata: np.ndarray | None) -> np.ndarray:
    if strata is None:
        return rng.integers(n, size=n)
    groups = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    return np.concatenate([g[rng.integers(len(g), size=len(g))] for g in groups])


def _interval(value: float, draws: Sequence[float], confidence: float) -> Interval:
    if not draws:
        return Interval(value, float("nan"), float("nan"), 0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high), len(draws))
