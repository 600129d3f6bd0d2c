"""The weighted estimators: against scikit-learn and lifelines on repeated rows, scikit-survival's recorded values, and
the bootstrap by what it promises."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test, multivariate_logrank_test
from lifelines.utils import concordance_index
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from mhim.mil import estimators, metrics, resampling

# recorded with scikit-survival 0.28.0: its licence (GPL) keeps the program itself out of here
SKSURV = json.loads((Path(__file__).parent / "sksurv.json").read_text())
SEEDS = st.integers(0, 10_000)


def patients(seed: int, n: int = 24, ties: bool = True):  # type: ignore[no-untyped-def]
    """time, event, risk and a weight (how often each counts), with ties in all of them."""
    rng = np.random.default_rng(seed)
    time, risk = rng.exponential(8, n), rng.normal(size=n)
    if ties:
        time, risk = np.ceil(time / 2), np.round(risk, 1)
    return time, (rng.random(n) < 0.6).astype(int), risk, rng.integers(0, 4, n)


def repeated(counts: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(c, counts, axis=0) for c in columns]


@settings(max_examples=60)
@given(SEEDS)
def test_concordance_equals_lifelines_on_repeated_rows(seed: int) -> None:
    time, event, risk, counts = patients(seed)
    t, e, r = repeated(counts, time, event, risk)
    found = estimators.ratio(estimators.concordance_pairs(time, event, risk, counts[None, :].astype(float)))[0]
    try:
        expected = concordance_index(t, -r, e)
    except ZeroDivisionError:
        expected = np.nan
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(max_examples=60)
@given(SEEDS)
def test_kaplan_meier_equals_lifelines_on_repeated_rows(seed: int) -> None:
    time, event, _, counts = patients(seed)
    t, e = repeated(counts, time, event)
    curve = KaplanMeierFitter().fit(t, e).survival_function_
    times, alive = estimators.survival_steps(time, event, counts[None, :].astype(float))
    known = dict(zip(times, alive[0], strict=True))
    for at, value in zip(curve.index, curve.iloc[:, 0], strict=True):
        if at > 0:
            assert known[at] == pytest.approx(value, abs=1e-9)


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 4))
def test_classification_equals_scikit_learn_on_repeated_rows(seed: int, n_classes: int) -> None:
    rng = np.random.default_rng(seed)
    true, called = rng.integers(n_classes, size=40), rng.integers(n_classes, size=40)
    p = np.round(rng.dirichlet(np.ones(n_classes), 40), 1) + 0.01
    p /= p.sum(1, keepdims=True)
    counts = rng.integers(0, 3, 40)
    w = counts[None, :].astype(float)
    t, c, q = repeated(counts, true, called, p)
    for k in range(n_classes):
        auc = estimators.ratio(estimators.auc_pairs(true == k, p[:, k], w))[0]
        precision = estimators.average_precision(true == k, p[:, k], w)[0]
        if 0 < (t == k).sum() < len(t):
            assert auc == pytest.approx(roc_auc_score(t == k, q[:, k]), abs=1e-9)
            assert precision == pytest.approx(average_precision_score(t == k, q[:, k]), abs=1e-9)
        else:
            assert np.isnan(auc)
            assert np.isnan(precision)
    found = {k: v[0] for k, v in estimators.of_confusion(estimators.confusion(true, called, n_classes, w)).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(t, c), abs=1e-9)
        assert found["kappa"] == pytest.approx(cohen_kappa_score(t, c), abs=1e-9, nan_ok=True)
    assert found["accuracy"] == pytest.approx((t == c).mean(), abs=1e-9)
    macro = f1_score(t, c, average="macro", labels=range(n_classes), zero_division=0)
    assert found["f1"] == pytest.approx(macro, abs=1e-9)
    if n_classes == 2:
        assert estimators.brier(true, p, w)[0] == pytest.approx(brier_score_loss(t, q[:, 1]), abs=1e-9)


@settings(max_examples=40)
@given(SEEDS)
def test_time_auc_is_the_weighted_auc_of_its_definition(seed: int) -> None:
    time, event, risk, counts = patients(seed)
    t, e, r = repeated(counts, time, event, risk)
    at = float(np.median(time))
    found = estimators.ratio(estimators.time_auc_pairs(time, event, risk, at, counts[None, :].astype(float)))[0]
    case, control = (e == 1) & (t <= at), t > at
    if not case.any() or not control.any():
        assert np.isnan(found)
        return
    kept = KaplanMeierFitter().fit(t, 1 - e).survival_function_at_times(np.nextafter(t[case], 0)).to_numpy()
    weights = np.concatenate([1 / np.clip(kept, 1e-3, None), np.ones(control.sum())])
    truth = np.concatenate([np.ones(case.sum()), np.zeros(control.sum())])
    both = np.concatenate([r[case], r[control]])
    assert found == pytest.approx(roc_auc_score(truth, both, sample_weight=weights), abs=1e-9)


@pytest.mark.parametrize("case", SKSURV["cases"])
def test_survival_equals_scikit_survival_s_recorded_values(case) -> None:  # type: ignore[no-untyped-def]
    time, event, risk = (np.array(case[k]) for k in ("time", "event", "risk"))
    assert metrics.c_index(time, event, risk) == pytest.approx(case["c_index"], abs=1e-9)
    for at, expected in zip(case["at"], case["time_auc"], strict=True):
        assert metrics.time_auc(time, event, risk, at) == pytest.approx(expected, abs=1e-9)
    assert metrics.log_rank(time, event, risk > np.median(risk)) == pytest.approx(case["log_rank"], abs=1e-9)


@settings(max_examples=30)
@given(SEEDS)
def test_log_rank_equals_lifelines(seed: int) -> None:
    time, event, risk, _ = patients(seed, 40)
    high = risk > 0
    expected = logrank_test(time[high], time[~high], event[high], event[~high]).p_value
    assert metrics.log_rank(time, event, high) == pytest.approx(expected, abs=1e-9)
    assert multivariate_logrank_test(time, high, event).p_value == pytest.approx(expected, abs=1e-9)


def test_a_stratified_log_rank_compares_inside_strata_only() -> None:
    """Two strata of other hazards, all of one in one group: unstratified that looks like a difference of the groups."""
    rng = np.random.default_rng(0)
    stratum = np.repeat([0, 1], 200)
    time = rng.exponential(np.where(stratum, 1.0, 10.0))
    high = rng.random(400) < np.where(stratum, 0.9, 0.1)
    assert metrics.log_rank(time, np.ones(400), high) < 1e-6
    assert metrics.log_rank(time, np.ones(400), high, stratum) > 0.05


def test_a_block_of_draws_equals_the_draws_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    time, event, risk, _ = patients(3, 50)
    w = np.concatenate(list(resampling.draws(50, 20)))
    whole = estimators.concordance_pairs(time, event, risk, w)
    one = [estimators.concordance_pairs(time, event, risk, row[None]) for row in w]
    np.testing.assert_allclose(whole[0], [a[0] for a, _ in one])
    monkeypatch.setattr(estimators, "PAIR_BLOCK", 60)  # one row of pairs at a time
    np.testing.assert_allclose(estimators.concordance_pairs(time, event, risk, w), whole)


def test_draws_keep_the_size_of_each_stratum_and_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = np.repeat([0, 1, 2, 3], [3, 27, 1, 1])
    w = np.concatenate(list(resampling.draws(32, 50, strata)))
    assert (w[:, strata == 0].sum(1) == 3).all()
    assert (w[:, strata == 1].sum(1) == 27).all()
    assert set(w[:, 30]) == {0, 1, 2}  # strata of one patient are drawn together: else nothing could vary
    assert (w[:, 30:].sum(1) == 2).all()
    np.testing.assert_array_equal(w, np.concatenate(list(resampling.draws(32, 50, strata))))
    assert (w != np.concatenate(list(resampling.draws(32, 50, strata, seed=1)))).any()
    monkeypatch.setattr(resampling, "BLOCK", 32 * 7)
    assert [len(b) for b in resampling.draws(32, 50)] == [7] * 7 + [1]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        x = rng.normal(size=80)
        found = resampling.intervals(lambda w, x=x: {"mean": w @ x / w.sum(1)}, 80, 200, 0.9, seed=trial)["mean"]
        assert found.value == pytest.approx(x.mean())
        inside += found.low <= 0.0 <= found.high
    assert 45 <= inside <= 60  # 54 expected


def test_without_draws_or_pairs_there_is_no_interval() -> None:
    none = resampling.intervals(lambda w: {"x": w.sum(1)}, 5, 0, 0.95)["x"]
    assert (none.value, none.n) == (5, 0)
    assert np.isnan(none.low)
    assert resampling.interval(1.0, np.array([np.nan, 1.0, np.nan]), 0.95).n == 1


@pytest.mark.parametrize(("shift", "said"), [(0.0, "no difference"), (0.2, "better"), (-0.2, "worse")])
def test_a_verdict_says_better_worse_or_no_difference(shift: float, said: str) -> None:
    rng = np.random.default_rng(2)
    difference = shift + 0.1 * rng.normal(size=100)
    point, drawn = resampling.bootstrap(lambda w: {"d": w @ difference / w.sum(1)}, 100, 300)
    found = resampling.verdict(point["d"], drawn["d"], 0.95)
    assert found["verdict"] == said
    assert found["difference"].low <= found["difference"].value <= found["difference"].high
    assert (found["p"] < 0.05) == (said != "no difference")
    assert resampling.verdict(0.0, np.zeros(100), 0.95)["p"] == 1.0
