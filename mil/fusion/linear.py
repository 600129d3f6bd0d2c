"""Ridge regression of every kind of outcome on a table, fast for 20,000 columns and 30 patients.

    scores s = X B + a, (n, q);   (B, a) minimise  1/n Σ_i loss(s_i, y_i) + λ/2 |B|²,   a is free

| outcome | q | loss |
|---|---|---|
| survival | 1 (log risk, no a) | Breslow's partial likelihood (`cox.py`) |
| classes | C logits | log loss (scikit-learn's logistic regression) |
| grades | K - 1 logits | log loss of each step "above k, if at least k" (continuation ratio, Armstrong & Sloan 1989) |
| number | 1 | half the squared error of the standardised number |

The minimum lies in the span of the patients, so a wide X (n, p) = U S V' is turned into Z = X V of at most n columns,
and B = V B_Z: exact, and no product is larger than (n, p). Knows no task, no file and no random number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mhim.mil.fusion import cox

Form = Literal["survival", "classes", "grades", "number"]
RANK = 1e-10  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class Linear:
    """Scores of a table. weights: float64 (p, q). offset: float64 (q,)."""

    weights: np.ndarray
    offset: np.ndarray

    def scores(self, x: np.ndarray) -> np.ndarray:
        """float64 (n, q) of x (n, p), each row by itself: who else is scored changes no bit of it."""
        found: np.ndarray = np.stack([row @ self.weights for row in x]) if len(x) else np.empty((0, len(self.offset)))
        whole: np.ndarray = found + self.offset
        return whole


@dataclass(frozen=True)
class Reduced:
    """X = Z V' of the patients that are learnt from. z: (n, r). basis: V, (p, r). scale: mean squared length of the
    rows, in whose unit penalties are: p of a table of standardised columns."""

    z: np.ndarray
    basis: np.ndarray
    scale: float


def reduced(x: np.ndarray) -> Reduced:
    """x (n, p) without loss in at most n columns."""
    if x.shape[1] <= x.shape[0]:
        return Reduced(x, np.eye(x.shape[1]), float((x * x).sum() / max(len(x), 1)))
    # of the small matrix of products: a tenth of the time of an SVD of 20,000 columns
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > max(values.max(initial=0.0), 0.0) * RANK
    values, vectors = values[kept][::-1], vectors[:, kept][:, ::-1]
    root = np.sqrt(values)
    return Reduced(vectors * root, x.T @ (vectors / root), float((x * x).sum() / len(x)))


def fit(
    of: Reduced, target: np.ndarray, form: Form, penalty: float, levels: int = 0, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(B_Z (r, q), a (q,)) for `of.z`. penalty: λ in units of `of.scale`. target: (n, 2) time and event; (n,) classes
    or grades from 0, of which there are `levels`; (n,) numbers. start: B_Z to begin at (survival)."""
    z, each = of.z, penalty * of.scale
    if not z.shape[1]:  # a table without a usable column says nothing: the rate of each class, the mean
        z = np.zeros((len(z), 1))
        found, offset = fit(Reduced(z, np.zeros((1, 1)), 1.0), target, form, 1.0, levels)
        return found[:0], offset
    if form == "survival":
        b = cox.fit(z, target[:, 0], target[:, 1], each, None if start is None else start[:, 0])
        return b[:, None], np.zeros(1)
    if form == "number":
        mean, sd = target.mean(), target.std() or 1.0
        centre = z.mean(axis=0)
        moved = z - centre
        gram = moved.T @ moved / len(z) + each * np.eye(z.shape[1])
        b = np.linalg.solve(gram, moved.T @ ((target - mean) / sd) / len(z)) * sd
        return b[:, None], np.array([mean - centre @ b])
    if form == "classes":
        return _classes(z, target.astype(np.int64), each, levels)
    steps = [_step(z, target, k, each) for k in range(levels - 1)]
    return np.stack([b for b, _ in steps], axis=1), np.array([a for _, a in steps])


def whole(of: Reduced, found: tuple[np.ndarray, np.ndarray]) -> Linear:
    """The scores of the whole table from those of its reduced form."""
    return Linear(of.basis @ found[0], found[1])


def loss(scores: np.ndarray, target: np.ndarray, form: Form) -> float:
    """Sum over the patients of minus the log likelihood (number: half the squared error). scores: (n, q)."""
    if form == "survival":
        return -cox.likelihood(scores[:, 0], cox.RiskSets.of(target[:, 0], target[:, 1]))
    if form == "number":
        return 0.5 * float(((scores[:, 0] - target) ** 2).sum())
    if form == "classes":
        top = scores.max(axis=1)
        sums = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
        return float((sums - scores[np.arange(len(scores)), target.astype(np.int64)]).sum())
    total = 0.0
    for k in range(scores.shape[1]):
        there = target >= k
        above = target[there] > k
        total += float(np.logaddexp(0.0, np.where(above, -1.0, 1.0) * scores[there, k]).sum())
    return total


def _classes(z: np.ndarray, target: np.ndarray, each: float, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every class; one without a patient here keeps the logit of half a patient."""
    from sklearn.linear_model import LogisticRegression

    there = np.unique(target)
    weights, offset = np.zeros((z.shape[1], levels)), np.full(levels, 0.0)
    if len(there) > 1:
        made = LogisticRegression(C=1.0 / (len(z) * each), tol=1e-10, max_iter=1000, solver="newton-cg").fit(z, target)
        if len(there) == 2:
            weights[:, there[1]], offset[there[1]] = made.coef_[0] / 2, made.intercept_[0] / 2
            weights[:, there[0]], offset[there[0]] = -made.coef_[0] / 2, -made.intercept_[0] / 2
        else:
            weights[:, there], offset[there] = made.coef_.T, made.intercept_
    lacking = np.setdiff1d(np.arange(levels), there)
    if len(lacking):
        mean = z.mean(axis=0) @ weights + offset
        offset[lacking] = mean[there].max() + np.log(0.5 / len(z))
    return weights, offset


def _step(z: np.ndarray, target: np.ndarray, k: int, each: float) -> tuple[np.ndarray, float]:
    """Weights (r,) and offset of the logit of "above grade k", among those of at least k."""
    from sklearn.linear_model import LogisticRegression

    there = target >= k
    above = target[there] > k
    if above.all() or not above.any():  # one side alone: its odds with half a patient on the other
        odds = (above.sum() + 0.5) / ((~above).sum() + 0.5)
        return np.zeros(z.shape[1]), float(np.log(odds))
    made = LogisticRegression(C=1.0 / (len(z) * each), tol=1e-10, max_iter=1000, solver="newton-cg").fit(
        z[there], above
    )
    return made.coef_[0], float(made.intercept_[0])


def one_number(values: np.ndarray, form: Form) -> np.ndarray:
    """What a person reads of scores, or of weights on them: float64 (...) of (..., q).

    The log risk or the number itself; of two classes the log-odds of the last; of grades the mean of the steps, larger
    towards higher grades; of more classes the spread around their mean, which has no sign."""
    if form == "classes":
        if values.shape[-1] == 2:
            return np.asarray(values[..., 1] - values[..., 0])
        return np.asarray(values.std(axis=-1))
    return np.asarray(values.mean(axis=-1))
