"""Kappa of levels, errors and correlations of numbers, weighted: as scikit-learn and SciPy on the repeated rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score

from mhim.mil import estimators


def drawn(n: int, seed: int, draws: int = 20) -> np.ndarray:
    """Weights as the bootstrap draws them, the sample itself first."""
    rng = np.random.default_rng(seed)
    weights = np.array([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(draws)], dtype=np.float64)
    weights[0] = 1.0
    return weights


@pytest.mark.parametrize("seed", range(4))
def test_weights_stand_for_repeated_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 40
    truth = np.round(rng.normal(50, 10, n), 0)  # with ties
    value = truth + np.round(rng.normal(0, 8, n), 1)
    level, called = rng.integers(0, 4, n), rng.integers(0, 4, n)
    weights = drawn(n, seed)
    found = {
        "r2": estimators.r2(truth, value, weights),
        "mae": estimators.mean_error(np.abs(truth - value), weights),
        "pearson": estimators.pearson(truth, value, weights),
        "spearman": estimators.spearman(truth, value, weights),
        "kappa": estimators.quadratic_kappa(estimators.confusion(level, called, 4, weights)),
    }
    for d, w in enumerate(weights.astype(int)):
        y, f, a, b = (np.repeat(x, w) for x in (truth, value, level, called))
        expected = {
            "r2": r2_score(y, f),
            "mae": mean_absolute_error(y, f),
            "pearson": pearsonr(y, f).statistic,
            "spearman": spearmanr(y, f).statistic,
            "kappa": cohen_kappa_score(a, b, weights="quadratic", labels=range(4)),
        }
        for name, right in expected.items():
            assert found[name][d] == pytest.approx(right, abs=1e-9), name


def test_what_does_not_vary_defines_nothing() -> None:
    w, same, other = np.ones((1, 5)), np.full(5, 0.1), np.arange(5.0)
    assert np.isnan(estimators.r2(same, other, w)).all()
    assert np.isnan(estimators.pearson(other, same, w)).all()
    assert np.isnan(estimators.spearman(same, other, w)).all()
    level = np.zeros(5, np.int64)
    for called in (level, level + 1):
        assert np.isnan(estimators.quadratic_kappa(estimators.confusion(level, called, 3, w))).all()
    alone = np.zeros((1, 5))
    alone[0, 2] = 5  # one patient, drawn five times
    assert np.isnan(estimators.r2(other, other, alone)).all()
    assert np.isnan(estimators.pearson(other, other, alone)).all()


def test_a_constant_far_from_zero_is_still_one() -> None:
    rng = np.random.default_rng(0)
    truth = 1e6 + rng.normal(size=30)
    value = truth + rng.normal(size=30)
    w = np.ones((1, 30))
    assert estimators.r2(truth, value, w)[0] == pytest.approx(r2_score(truth, value), abs=1e-9)
    assert estimators.pearson(truth, value, w)[0] == pytest.approx(pearsonr(truth, value).statistic, abs=1e-9)
