"""How good the predictions of one model are: point values, operating points, the temperature.

In: NumPy arrays of targets and predictions, one row per patient, all of one model. Out: plain floats. Knows no file.
The estimators themselves are in `estimators.py`, the bootstrap in `resampling.py`. A metric that the cases at hand do
not define (one class only, no event) is NaN, never a made-up number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mhim.mil import estimators

Metrics = dict[str, float]


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: of the last class for two classes, macro one-vs-rest for more; NaN if a class lacks.

    labels: int (n,). probabilities: float (n, C).
    """
    w = np.ones((1, len(labels)))
    each = [estimators.ratio(estimators.auc_pairs(labels == c, probabilities[:, c], w)) for c in _ranked(probabilities)]
    return float(np.mean(each))


def auprc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Average precision: of the last class for two classes, macro one-vs-rest for more; NaN if a class lacks."""
    w = np.ones((1, len(labels)))
    each = [estimators.average_precision(labels == c, probabilities[:, c], w) for c in _ranked(probabilities)]
    return float(np.mean(each))


def ece(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over equal-width confidence bins."""
    return float(estimators.ece(labels, probabilities, np.ones((1, len(labels))), bins)[0])


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Brier score: mean squared distance to the one-hot truth, halved for two classes so that it is the usual one."""
    return float(estimators.brier(labels, probabilities, np.ones((1, len(labels))))[0])


def call(probabilities: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """int (n,) class that is called: for two classes and a threshold the last one where its probability is at least
    that, else the most probable one."""
    if threshold is not None and probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    likeliest: np.ndarray = probabilities.argmax(axis=1)
    return likeliest


def classification(
    labels: np.ndarray, probabilities: np.ndarray, threshold: float | None = None, called: np.ndarray | None = None
) -> Metrics:
    """All classification metrics. labels: int (n,); probabilities: float (n, C), rows sum to one.

    Balanced accuracy, F1, accuracy and kappa are those of `called`, int (n,), -1 for who was left undecided and counts
    in none of them; None: as `call` calls them. A class with no case is left out of balanced accuracy.
    """
    if called is None:
        called = call(probabilities, threshold)
    counts = estimators.confusion(labels, called, probabilities.shape[1], np.ones((1, len(labels))))
    decided = {name: float(v[0]) for name, v in estimators.of_confusion(counts).items()}
    return {
        "auc": auc(labels, probabilities),
        "auprc": auprc(labels, probabilities),
        **decided,
        "brier": brier(labels, probabilities),
        "ece": ece(labels, probabilities),
    }


def c_index(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's concordance of risk (larger = earlier event) with time; NaN when no pair is comparable."""
    return float(estimators.ratio(estimators.concordance_pairs(time, event, risk, np.ones((1, len(time)))))[0])


def time_auc(time: np.ndarray, event: np.ndarray, risk: np.ndarray, at: float) -> float:
    """Cumulative/dynamic AUC at time `at` (Uno et al. 2007): cases had the event by then, controls live on.

    Cases are weighted by the inverse Kaplan–Meier probability of not being censored before their event. NaN without
    a case or a control.
    """
    return float(estimators.ratio(estimators.time_auc_pairs(time, event, risk, at, np.ones((1, len(time)))))[0])


def survival(time: np.ndarray, event: np.ndarray, risk: np.ndarray, horizons: Sequence[float] = ()) -> Metrics:
    """C-index, and the time-dependent AUC at each horizon (in the labels' time unit), named time_auc_1, 2 ..."""
    found = {"c_index": c_index(time, event, risk)}
    for k, at in enumerate(horizons, start=1):
        found[f"time_auc_{k}"] = time_auc(time, event, risk, at)
    return found


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step times and survival probabilities of the Kaplan–Meier estimate, starting at time 0."""
    times, alive = estimators.survival_steps(time.astype(np.float64), event, np.ones((1, len(time))))
    if times[0] > 0:
        return np.concatenate([[0.0], times]), np.concatenate([[1.0], alive[0]])
    return times, alive[0]


def log_rank(time: np.ndarray, event: np.ndarray, high: np.ndarray, strata: np.ndarray | None = None) -> float:
    """p value of the log-rank test (Mantel 1966) between high-risk (True) and low-risk patients; NaN if a group is
    empty or nothing is seen in it. strata: (n,), patients are compared with those of their own stratum only."""
    from scipy.special import chdtrc

    high = high.astype(bool)
    strata = np.zeros(len(time)) if strata is None else strata
    excess = variance = 0.0
    for stratum in np.unique(strata):
        t, e, h = (v[strata == stratum] for v in (time, event.astype(bool), high))
        for at in np.unique(t[e]):
            there, died = t >= at, (t == at) & e
            n, d, n_high = there.sum(), died.sum(), (there & h).sum()
            excess += (died & h).sum() - d * n_high / n
            variance += d * (n_high / n) * (1 - n_high / n) * (n - d) / (n - 1) if n > 1 else 0.0
    return float(chdtrc(1, excess**2 / variance)) if variance > 0 else float("nan")


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


def over_folds(per_fold: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Mean, standard deviation (n - 1) and number of the defined values of each metric over folds or seeds."""
    found: dict[str, tuple[float, float, int]] = {}
    for name in per_fold[0] if per_fold else ():
        values = np.array([m[name] for m in per_fold if np.isfinite(m[name])])
        sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        found[name] = (float(values.mean()) if len(values) else float("nan"), sd, len(values))
    return found


def _ranked(probabilities: np.ndarray) -> Sequence[int]:
    """The classes whose ranking counts: the last of two, each of several."""
    n_classes = probabilities.shape[1]
    return [1] if n_classes == 2 else range(n_classes)
