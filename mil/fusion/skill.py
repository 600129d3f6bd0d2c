"""How much each modality knows, and with what certainty: out-of-fold scores in, shrunk weights out.

The skill of scores is the concordance of all pairs of patients of different outcome (Harrell's C of survival, AUC of
classes, its like of grades and numbers) minus a half. Pairs are made inside an inner fold only, since two folds' models
share no scale. Its error is the infinitesimal jackknife over patients. Plain NumPy; knows no task and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mhim.mil.fusion.linear import Form

BLOCK = 2048  # rows of the matrix of pairs that are held at once


@dataclass(frozen=True)
class Skill:
    """value: concordance minus .5, 0 where no pair can be compared. influence: float64 (n,), what each patient moves it
    by; their squares add up to its variance."""

    value: float
    influence: np.ndarray


def of(scores: np.ndarray, target: np.ndarray, form: Form, inner: Sequence[np.ndarray]) -> Skill:
    """Of scores (n, q) and targets as `linear.fit` takes them. inner: the patients of each inner fold."""
    if form == "survival":
        return _concordance(scores[:, 0], target[:, 0], target[:, 1] > 0, inner, -1.0)
    if form == "number":
        return _concordance(scores[:, 0], target, np.ones(len(target), bool), inner, 1.0)
    if form == "grades":
        # the expected grade: Σ_k P(y > k), each a product of the steps before it
        expected = np.cumprod(1.0 / (1.0 + np.exp(-scores)), axis=1).sum(axis=1)
        return _concordance(expected, target, np.ones(len(target), bool), inner, 1.0)
    top = scores - scores.max(axis=1, keepdims=True)
    p = np.exp(top) / np.exp(top).sum(axis=1, keepdims=True)
    levels = [1] if p.shape[1] == 2 else range(p.shape[1])
    every = [_concordance(p[:, k], (target == k) * 1.0, np.ones(len(p), bool), inner, 1.0) for k in levels]
    return Skill(float(np.mean([s.value for s in every])), np.mean([s.influence for s in every], axis=0))


def weights(skills: Sequence[Skill]) -> np.ndarray:
    """float64 (M,) >= 0, sum 1: in proportion to the skills, each pulled to their mean as far as they cannot be told
    apart (an empirical Bayes estimate; its error is that of the paired differences), of which half is believed: the
    estimate of τ² from a few modalities is poor itself, and too much pull hands a useless one a share.

        w_m ∝ max(0, v̄ + (1 + B)/2 (v_m - v̄)),   B = τ² / (τ² + s_m²),   τ² = max(0, var(v) - mean(s²))

    With thousands of patients these are the skills themselves; without any skill they are equal."""
    value = np.array([s.value for s in skills])
    if len(value) > 1:
        apart = np.stack([s.influence for s in skills])
        apart = apart - apart.mean(axis=0)
        error = (apart**2).sum(axis=1) * len(value) / (len(value) - 1)
        spread = max(0.0, float(value.var(ddof=1) - error.mean()))
        keep = spread / (spread + error) if spread > 0 else np.zeros(len(value))
        value = value.mean() + 0.5 * (1.0 + keep) * (value - value.mean())
    value = np.maximum(value, 0.0)
    total = value.sum()
    return value / total if total > 0 else np.full(len(value), 1.0 / len(value))


def _concordance(
    score: np.ndarray, order: np.ndarray, usable: np.ndarray, inner: Sequence[np.ndarray], sign: float
) -> Skill:
    """Pairs in which the outcome of one is worse. sign -1: `order` is a time, and only whose event was seen (`usable`)
    is known to be worse than a later one; a censored time counts as just after an equal one of an event."""
    num, den = np.zeros(len(score)), np.zeros(len(score))
    for members in inner:
        t, s, first = sign * order[members], score[members], usable[members]
        for start in range(0, len(members), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(members)))
            worse = first[rows, None] & (t[rows, None] > t[None, :])
            if sign < 0:
                worse |= first[rows, None] & (t[rows, None] == t[None, :]) & ~first[None, :]
            right = worse * ((s[rows, None] > s[None, :]) + 0.5 * (s[rows, None] == s[None, :]))
            num[members[rows]] += right.sum(axis=1)
            den[members[rows]] += worse.sum(axis=1)
            num[members] += right.sum(axis=0)
            den[members] += worse.sum(axis=0)
    total = den.sum()
    if not total:
        return Skill(0.0, np.zeros(len(score)))
    c = num.sum() / total
    return Skill(float(c - 0.5), 2.0 * (num - c * den) / total)
