"""The estimators behind every metric, for many weightings of the patients at once.

In: arrays of targets and predictions of patients that one model answered for (one training), and `weights`, float64
(D, n): how often each patient counts in each of D draws (all ones is the sample itself). Out: float64 (D,) values, or
the numerators and denominators (D,) that the caller adds up over trainings before it divides, so that no pair is ever
made of two models' answers. Plain NumPy; a draw costs a few matrix products and no Python loop. Knows no task, no
file, no random number. What a draw does not define is NaN (a denominator of 0).

Weights stand for repeated rows: every value equals that of scikit-learn or lifelines on the rows repeated so often.
"""

from __future__ import annotations

import numpy as np

Pairs = tuple[np.ndarray, np.ndarray]
PAIR_BLOCK = 4_000_000  # entries of one block of the matrix of pairs, 32 MB
LEAST_KEPT = 1e-3  # a case counts at most 1000-fold for those who were lost before it


def ratio(pairs: Pairs) -> np.ndarray:
    """Numerator by denominator, NaN where there is nothing to divide by."""
    above, below = pairs
    quotient: np.ndarray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return quotient


def auc_pairs(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> Pairs:
    """Mann-Whitney count of (positive, negative) pairs with the positive one higher, ties a half; and all such pairs.

    Their ratio is the area under the ROC curve (Hanley & McNeil 1982). positive: bool (n,); score: (n,).
    """
    positive = positive.astype(bool)
    return _higher(score, weights * positive, weights * ~positive)


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) Σ (R_k - R_k-1) P_k over the distinct thresholds, from the highest down; NaN without a positive or a
    negative patient. positive: bool (n,); score: (n,)."""
    positive = positive.astype(bool)
    order = np.argsort(-score, kind="stable")
    starts = _starts(score[order])
    hits = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    called = np.cumsum(np.add.reduceat(weights[:, order], starts, axis=1), axis=1)
    precision = np.divide(np.cumsum(hits, axis=1), called, out=np.zeros_like(called), where=called > 0)
    total = hits.sum(axis=1)
    defined = np.where(weights.sum(axis=1) > total, total, 0.0)
    return ratio(((hits * precision).sum(axis=1), defined))


def concordance_pairs(time: np.ndarray, event: np.ndarray, risk: np.ndarray, weights: np.ndarray) -> Pairs:
    """Concordant and comparable pairs of Harrell's C (Harrell et al. 1982), ties of the risk a half.

    A pair is comparable if the shorter time ended in an event, or, of equal times, one did and the other was
    censored. time, event (0 or 1), risk (larger = earlier event): (n,). O(n² D), in blocks of rows.
    """
    n = len(time)
    event = event.astype(bool)
    above, below = np.zeros(len(weights)), np.zeros(len(weights))
    first = np.flatnonzero(event)
    rows = max(1, PAIR_BLOCK // max(n, 1))
    for start in range(0, len(first), rows):
        own = first[start : start + rows]
        later = (time[own, None] < time[None, :]) | ((time[own, None] == time[None, :]) & ~event[None, :])
        right = (risk[own, None] > risk[None, :]) + 0.5 * (risk[own, None] == risk[None, :])
        w = weights[:, own]
        above += np.einsum("di,di->d", w, weights @ (later * right).T)
        below += np.einsum("di,di->d", w, weights @ later.T.astype(np.float64))
    return above, below


def survival_steps(time: np.ndarray, event: np.ndarray, weights: np.ndarray) -> Pairs:
    """Distinct times (U,) and the Kaplan-Meier estimate (D, U) at and after each (Kaplan & Meier 1958)."""
    order = np.argsort(time, kind="stable")
    starts = _starts(time[order])
    w = weights[:, order]
    ended = np.add.reduceat(w * event.astype(bool)[order], starts, axis=1)
    left = np.add.reduceat(w, starts, axis=1)
    at_risk = np.cumsum(left[:, ::-1], axis=1)[:, ::-1]
    kept = 1.0 - np.divide(ended, at_risk, out=np.zeros_like(ended), where=at_risk > 0)
    return time[order][starts], np.cumprod(kept, axis=1)


def time_auc_pairs(time: np.ndarray, event: np.ndarray, risk: np.ndarray, at: float, weights: np.ndarray) -> Pairs:
    """Pairs of the cumulative/dynamic AUC at time `at` (Uno et al. 2007): a case had the event by then, a control lives
    on; each case weighs 1 / G(t-), the Kaplan-Meier probability of not being lost before its event."""
    event = event.astype(bool)
    case, control = event & (time <= at), time > at
    if not case.any() or not control.any():
        return np.zeros(len(weights)), np.zeros(len(weights))
    times, kept = survival_steps(time, ~event, weights)
    before = np.concatenate([np.ones((len(weights), 1)), kept], axis=1)  # column k: just before times[k]
    g = np.clip(before[:, np.searchsorted(times, time[case], side="left")], LEAST_KEPT, None)
    cases = np.zeros_like(weights)
    cases[:, case] = weights[:, case] / g
    return _higher(risk, cases, weights * control)


def confusion(true: np.ndarray, called: np.ndarray, n_classes: int, weights: np.ndarray) -> np.ndarray:
    """(D, C, C) patients of each true class (rows) called each class. Negative calls (undecided) count nowhere."""
    decided = called >= 0
    cell = np.zeros((len(true), n_classes * n_classes))
    cell[np.flatnonzero(decided), (true * n_classes + called)[decided]] = 1.0
    return np.asarray(weights @ cell).reshape(-1, n_classes, n_classes)


def of_confusion(counts: np.ndarray) -> dict[str, np.ndarray]:
    """balanced_accuracy (mean recall of the classes that have a patient), f1 (macro over all classes), accuracy and
    Cohen's kappa, each (D,), of (D, C, C) counts."""
    total, hit = counts.sum(axis=(1, 2)), np.diagonal(counts, axis1=1, axis2=2)
    true, called = counts.sum(axis=2), counts.sum(axis=1)
    recall = np.divide(hit, true, out=np.full(hit.shape, np.nan), where=true > 0)
    there = (true > 0).sum(axis=1).astype(np.float64)
    both = true + called
    f1 = np.divide(2 * hit, both, out=np.zeros(hit.shape), where=both > 0).mean(axis=1)
    agreed, chance = hit.sum(axis=1), (true * called).sum(axis=1)
    return {
        "balanced_accuracy": ratio((np.nansum(recall, axis=1), there)),
        "f1": np.where(total > 0, f1, np.nan),
        "accuracy": ratio((agreed, total)),
        "kappa": ratio((agreed * total - chance, total**2 - chance)),
    }


def quadratic_kappa(counts: np.ndarray) -> np.ndarray:
    """(D,) Cohen's kappa with quadratic weights (Cohen 1968) of (D, K, K) counts; NaN where all patients are of one
    level, whatever they are called: there is nothing to agree on."""
    levels = np.arange(counts.shape[1], dtype=np.float64)
    wrong = (levels[:, None] - levels[None, :]) ** 2
    true, called, total = counts.sum(axis=2), counts.sum(axis=1), counts.sum(axis=(1, 2))
    missed = total * np.einsum("dij,ij->d", counts, wrong)
    chance = np.einsum("di,dj,ij->d", true, called, wrong)
    varied = (true > 0).sum(axis=1) > 1
    kappa: np.ndarray = 1.0 - ratio((missed, np.where(varied, chance, 0.0)))
    return kappa


def mean_error(error: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) mean of what each patient's answer is off by, error (n,); NaN without patients."""
    return ratio((weights @ error, weights.sum(axis=1)))


def r2(true: np.ndarray, value: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) 1 - Σ (y - f)² / Σ (y - mean of y)²; NaN where the truth does not vary. true, value: (n,)."""
    centred = true - true.mean() if len(true) else true  # numbers far from 0 would lose digits
    total = weights.sum(axis=1)
    middle = np.divide(weights @ centred, total, out=np.zeros(len(weights)), where=total > 0)
    around = (weights * (centred[None, :] - middle[:, None]) ** 2).sum(axis=1)
    varied = np.array([len(np.unique(true[w > 0])) > 1 for w in weights], dtype=bool)
    explained: np.ndarray = 1.0 - ratio((weights @ (true - value) ** 2, np.where(varied, around, 0.0)))
    return explained


def pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) correlation of a and b, (n,) or (D, n); NaN where one of them does not vary."""
    total = weights.sum(axis=1, keepdims=True)

    def centred(x: np.ndarray) -> np.ndarray:
        x = np.broadcast_to(x, weights.shape)
        middle = np.divide((weights * x).sum(1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
        off: np.ndarray = x - middle
        off[np.abs(off) <= 1e-12 * np.abs(x)] = 0.0  # of a constant nothing but rounding is left
        return off

    da, db = centred(a), centred(b)
    squares = (weights * da**2).sum(axis=1) * (weights * db**2).sum(axis=1)
    return ratio(((weights * da * db).sum(axis=1), np.sqrt(squares)))


def spearman(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) correlation of the ranks, ties at their mean rank. a, b: (n,)."""
    return pearson(_ranks(a, weights), _ranks(b, weights), weights)


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D, n) mean rank of each value where each stands as often as its weight says."""
    _, which = np.unique(x, return_inverse=True)
    own = np.zeros((len(weights), which.max(initial=0) + 1))
    for place in range(own.shape[1]):
        own[:, place] = weights[:, which == place].sum(axis=1)
    ranks: np.ndarray = (np.cumsum(own, axis=1) - 0.5 * own + 0.5)[:, which]
    return ranks


def brier(true: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(D,) mean squared distance to the one-hot truth (Brier 1950), halved for two classes so that it is the usual one.

    true: int (n,); probabilities: (n, C)."""
    n_classes = probabilities.shape[1]
    each = ((probabilities - np.eye(n_classes)[true]) ** 2).sum(axis=1) * (0.5 if n_classes == 2 else 1.0)
    return ratio((weights @ each, weights.sum(axis=1)))


def ece(true: np.ndarray, probabilities: np.ndarray, weights: np.ndarray, bins: int = 10) -> np.ndarray:
    """(D,) expected calibration error (Guo et al. 2017): mean |accuracy - confidence| over equal-width bins of the
    confidence, each closed on the right."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.zeros((len(true), bins))
    gap[np.arange(len(true)), which] = right - confidence
    return ratio((np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1)))


def _higher(score: np.ndarray, ups: np.ndarray, downs: np.ndarray) -> Pairs:
    """Weight of the pairs whose up scores higher than its down (ties a half), and of all pairs. ups, downs: (D, n)."""
    order = np.argsort(score, kind="stable")
    starts = _starts(score[order])
    up = np.add.reduceat(ups[:, order], starts, axis=1)
    down = np.add.reduceat(downs[:, order], starts, axis=1)
    below = np.cumsum(down, axis=1) - 0.5 * down
    return (up * below).sum(axis=1), up.sum(axis=1) * down.sum(axis=1)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins in a sorted array."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
