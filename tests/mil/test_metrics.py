"""Metrics: against scikit-learn and recorded numbers, by definition, and the bootstrap's coverage of a known truth."""

import numpy as np
import pytest
from scipy.special import softmax

from mhim.mil import metrics
from tests.mil import recorded


@pytest.mark.parametrize("classes", [2, 3])
def test_point_values_equal_the_recorded_ones(classes):
    arrays, points = recorded.arrays(recorded.PUBLISHED, "metrics"), recorded.facts(recorded.PUBLISHED, "metrics")
    labels = arrays[f"metric_labels_c{classes}"]
    found = metrics.classification(labels, softmax(arrays[f"metric_logits_c{classes}"].astype(np.float64), axis=1))
    point = points[f"c{classes}_binmetricFalse"]["point"]
    assert found["balanced_accuracy"] == pytest.approx(point["acc_macro"], abs=1e-6)
    assert found["f1"] == pytest.approx(point["f1"], abs=1e-6)
    assert found["kappa"] == pytest.approx(point["kappa"], abs=1e-6)
    assert found["accuracy"] == pytest.approx(point["acc_micro"], abs=1e-6)
    assert found["auc"] == pytest.approx(point["auc"], abs=1e-6)


def test_c_index_equals_the_recorded_one():
    arrays, points = recorded.arrays(recorded.PUBLISHED, "metrics"), recorded.facts(recorded.PUBLISHED, "metrics")
    found = metrics.c_index(arrays["cindex_time"], arrays["cindex_event"], arrays["cindex_risk"])
    assert found == pytest.approx(points["cindex_point"], abs=1e-6)  # recorded in float32


def test_confusion_metrics_equal_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

    rng = np.random.default_rng(3)
    labels = rng.integers(3, size=80)
    p = softmax(rng.normal(size=(80, 3)) + 1.5 * np.eye(3)[labels], axis=1)
    called, found = p.argmax(1), metrics.classification(labels, p)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, called))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, called))
    assert found["f1"] == pytest.approx(f1_score(labels, called, average="macro"))


def test_calibration_by_definition():
    labels = np.array([1, 0, 1, 1])
    p = np.array([0.9, 0.2, 0.6, 0.4])
    two = np.stack([1 - p, p], 1)
    assert metrics.brier(labels, two) == pytest.approx(np.mean((p - labels) ** 2))
    # confidences .9 right, .8 right, .6 right, .6 wrong: bins (.5,.6], (.7,.8], (.8,.9]
    assert metrics.ece(labels, two) == pytest.approx((abs(1 - 0.9) + abs(1 - 0.8) + 2 * abs(0.5 - 0.6)) / 4)
    sharp = np.array([[4.0, -4.0], [-4.0, 4.0]] * 50)
    truth = np.array([0, 1] * 50)
    truth[::10] = 1 - truth[::10]  # one in ten wrong: the best probability is .9
    t = metrics.temperature(truth, sharp)
    assert softmax(sharp / t, axis=1).max() == pytest.approx(0.9, abs=1e-2)


def test_undefined_values_are_nan():
    ones = np.ones(5, dtype=int)
    p = np.full((5, 2), 0.5)
    found = metrics.classification(ones, p)
    assert np.isnan(found["auc"])
    assert np.isnan(found["auprc"])
    assert np.isnan(metrics.c_index(np.arange(5.0), np.zeros(5), np.arange(5.0)))
    assert np.isnan(metrics.time_auc(np.arange(5.0), np.zeros(5), np.arange(5.0), 2.0))
    assert np.isnan(metrics.log_rank(np.arange(5.0), np.ones(5), np.ones(5, dtype=bool)))
    assert metrics.youden(ones, p[:, 1]) == 0.5


def test_c_index_counts_pairs_by_definition():
    time, event, risk = np.array([1.0, 2, 3, 4]), np.array([1, 0, 1, 1]), np.array([4.0, 1, 1, 2])
    # comparable: (1,2) (1,3) (1,4) right; (3,4) wrong
    assert metrics.c_index(time, event, risk) == pytest.approx(3 / 4)


def test_time_auc_without_censoring_is_the_plain_auc():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    time, risk = rng.exponential(5, 60), rng.normal(size=60)
    expected = roc_auc_score(time <= 4.0, risk)
    assert metrics.time_auc(time, np.ones(60), risk, 4.0) == pytest.approx(expected)


def test_kaplan_meier_and_log_rank():
    times, curve = metrics.kaplan_meier(np.array([1.0, 2, 3, 4]), np.array([1, 0, 1, 1]))
    assert dict(zip(times, curve, strict=True)) == pytest.approx({0.0: 1.0, 1.0: 0.75, 2.0: 0.75, 3.0: 0.375, 4.0: 0.0})
    rng = np.random.default_rng(0)
    early, late = rng.exponential(1, 40), rng.exponential(6, 40)
    time, high = np.concatenate([early, late]), np.arange(80) < 40
    assert metrics.log_rank(time, np.ones(80), high) < 1e-6
    assert metrics.log_rank(time, np.ones(80), np.arange(80) % 2 == 0) > 0.01


def test_operating_points_reach_what_they_promise():
    rng = np.random.default_rng(5)
    labels = rng.integers(2, size=200)
    p = 1 / (1 + np.exp(-(rng.normal(size=200) + 1.2 * labels)))
    cut = metrics.at_sensitivity(labels, p, 0.9)
    assert (p[labels == 1] >= cut).mean() >= 0.9
    above = np.sort(p[p > cut])[1:2]
    assert (p[labels == 1] >= above).mean() < 0.9 or (p[labels == 0] >= above).mean() == (p[labels == 0] >= cut).mean()
    cut = metrics.at_specificity(labels, p, 0.8)
    assert (p[labels == 0] < cut).mean() >= 0.8

    def j(c):
        return (p[labels == 1] >= c).mean() - (p[labels == 0] >= c).mean()

    assert j(metrics.youden(labels, p)) == pytest.approx(max(j(c) for c in p))


def test_over_folds_leaves_out_what_is_undefined():
    mean, sd, n = metrics.over_folds([{"auc": 0.8}, {"auc": 0.6}, {"auc": float("nan")}])["auc"]
    assert (mean, n) == (pytest.approx(0.7), 2)
    assert sd == pytest.approx(np.std([0.8, 0.6], ddof=1))
