"""One estimand, one decision: what the numbers are of, in every table, whatever the scales of the trainings."""

from __future__ import annotations

import dataclasses
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines.utils import concordance_index
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from mhim.configs.schema import ScoreConfig
from mhim.mil import resampling
from mhim.pipeline.results import compare, ensemble, estimand, numbers, operating_point, risk_groups
from mhim.pipeline.results.measures.classification import Classification
from mhim.pipeline.results.measures.measure import Place, confusion, place
from mhim.pipeline.store.layout import StoreError
from tests.pipeline.numbered import COX, THREE, TWO, class_rows, survival_rows, written

Row = dict[str, Any]
QUICK = ScoreConfig(bootstrap=100)
HORIZONS = (0.3, 0.8)


def inside(rows: list[Row]) -> dict[Place, list[Row]]:
    found: dict[Place, list[Row]] = {}
    for row in rows:
        found.setdefault(place(row), []).append(row)
    return found


def test_the_c_index_counts_the_pairs_inside_each_training() -> None:
    rows = survival_rows()
    right = total = 0.0
    for own in inside(rows).values():
        t, e, r = (np.array([row[k] for row in own]) for k in ("time", "event", "risk"))
        pairs = (t[:, None] < t) & (e[:, None] == 1)
        right, total = right + (pairs & (r[:, None] > r)).sum(), total + pairs.sum()
    found = estimand.point(estimand.answers(rows, COX), HORIZONS)
    assert found["c_index"] == pytest.approx(right / total, abs=1e-9)
    t, e, r = (np.array([row[k] for row in rows]) for k in ("time", "event", "risk"))
    assert abs(found["c_index"] - concordance_index(t, -r, e)) > 0.05  # over all pairs it is another number
    assert estimand.pairs(estimand.answers(rows, COX)) == total


def test_every_seed_counts_alike_and_a_lacking_training_weighs_nothing_more() -> None:
    rows = survival_rows(seeds=2)
    each = [estimand.point(estimand.answers([r for r in rows if r["seed"] == s], COX))["c_index"] for s in (7, 8)]
    assert estimand.point(estimand.answers(rows, COX))["c_index"] == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("task", [TWO, THREE])
def test_auc_is_of_pairs_and_auprc_the_mean_over_trainings(task: Any) -> None:
    rows = class_rows(task)
    ranked = task.classes[1:] if task is TWO else task.classes
    aucs, precisions = [], []
    for c in ranked:
        right = total = 0.0
        for own in inside(rows).values():
            p, y = np.array([r[f"p_{c}"] for r in own]), np.array([r["label"] == c for r in own])
            n = y.sum() * (~y).sum()
            right, total = right + n * roc_auc_score(y, p), total + n
            precisions.append(average_precision_score(y, p))
        aucs.append(right / total)
    found = estimand.point(estimand.answers(rows, task))
    assert found["auc"] == pytest.approx(np.mean(aucs), abs=1e-9)
    assert found["auprc"] == pytest.approx(np.mean(precisions), abs=1e-9)


MAPS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda x: 3 * x - 40,
    np.exp,
    np.arctan,
    lambda x: x**3,
    lambda x: np.sign(x) * np.sqrt(np.abs(x)),
]


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(0, len(MAPS) - 1), min_size=6, max_size=6))
def test_an_increasing_map_of_a_training_s_risks_changes_no_ranking(seed: int, which: list[int]) -> None:
    rows = survival_rows(seeds=2, seed=seed, n=30)
    places = sorted(inside(rows))
    risk = {p: np.array([r["risk"] for r in own]) for p, own in inside(rows).items()}

    def moved(row: Row, value: float) -> float:
        own = risk[place(row)]
        scaled = (value - own.mean()) / own.std()  # so that no map overflows or rounds two risks into one
        return float(MAPS[which[places.index(place(row))]](np.array(scaled)))

    other = [{**r, "risk": moved(r, r["risk"]), "risk_threshold": moved(r, r["risk_threshold"])} for r in rows]
    w = np.concatenate(list(resampling.draws(30, 20)))
    for one, two in ((rows, other), (ensemble.of_seeds(rows, COX), ensemble.of_seeds(other, COX))):
        a, b = (estimand.values(estimand.answers(r, COX), w, HORIZONS) for r in (one, two))
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-9)
    assert [risk_groups.high(r) for r in ensemble.ensemble(rows, COX)] == [
        risk_groups.high(r) for r in ensemble.ensemble(other, COX)
    ]


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_an_increasing_map_of_a_training_s_probabilities_changes_no_ranking(seed: int) -> None:
    rows = class_rows(TWO, seeds=2, seed=seed, n=30)
    rng = np.random.default_rng(seed)
    power = {place: rng.uniform(0.2, 4) for place in inside(rows)}
    other = [{**r, "p_yes": r["p_yes"] ** power[place(r)]} for r in rows]
    other = [{**r, "p_no": 1 - r["p_yes"]} for r in other]
    a, b = (estimand.point(estimand.answers(r, TWO)) for r in (rows, other))
    for name in ("auc", "auprc", *Classification.decided):  # and no decision, which is a column of its own
        assert a[name] == pytest.approx(b[name], abs=1e-9)


def test_runs_that_differ_by_a_constant_per_fold_do_not_differ(tmp_path: Path) -> None:
    rows = survival_rows()
    moved = [{**r, "risk": r["risk"] + 100 * r["fold"]} for r in rows]
    one, two = written(tmp_path / "one", rows, COX, HORIZONS), written(tmp_path / "two", moved, COX, HORIZONS)
    found = compare.compare(one, two, QUICK)
    assert set(found) == {"c_index", "time_auc_1", "time_auc_2"}
    for verdict in found.values():
        d = verdict["difference"]
        assert (d.value, d.low, d.high, verdict["p"], verdict["verdict"]) == (0, 0, 0, 1, "no difference")


def test_a_better_run_is_told_and_the_other_way_round_worse(tmp_path: Path) -> None:
    rows = survival_rows(n=120)
    noise = np.random.default_rng(1).normal(size=len(rows))
    worse = [{**r, "risk": float(v)} for r, v in zip(rows, noise, strict=True)]
    one, two = written(tmp_path / "one", worse, COX), written(tmp_path / "two", rows[::-1], COX)  # any order of rows
    found, turned = compare.compare(one, two, QUICK)["c_index"], compare.compare(two, one, QUICK)["c_index"]
    assert (found["verdict"], turned["verdict"]) == ("better", "worse")
    assert found["difference"].value == pytest.approx(-turned["difference"].value)
    assert found["difference"].low == pytest.approx(-turned["difference"].high)
    each = [estimand.point(estimand.answers(r, COX))["c_index"] for r in (worse, rows)]
    assert found["difference"].value == pytest.approx(each[1] - each[0])


@pytest.mark.parametrize("task", [TWO, THREE])
def test_decisions_are_scikit_learn_s_of_the_column(task: Any) -> None:
    rows = class_rows(task, n=60)
    found = estimand.answers(rows, task)
    per = estimand.per_training(found)
    for own, values in [(rows, estimand.point(found)), *((own, per[p]) for p, own in inside(rows).items())]:
        true, called = [r["label"] for r in own], [r["decision"] for r in own]
        assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, called), abs=1e-9)
        assert values["f1"] == pytest.approx(f1_score(true, called, average="macro", labels=task.classes), abs=1e-9)
        assert values["kappa"] == pytest.approx(cohen_kappa_score(true, called), abs=1e-9)
        assert values["accuracy"] == pytest.approx(np.mean(np.array(true) == called), abs=1e-9)
    expected = confusion_matrix([r["label"] for r in rows], [r["decision"] for r in rows], labels=task.classes)
    assert confusion(found) == expected.tolist()
    if task is TWO:  # the larger probability is another decision, and no metric follows it
        likeliest = [{**r, "decision": max(task.classes, key=lambda c, r=r: r[f"p_{c}"])} for r in rows]
        assert estimand.point(estimand.answers(likeliest, task))["accuracy"] != estimand.point(found)["accuracy"]


def test_the_undecided_count_in_no_metric_of_decisions() -> None:
    rows = class_rows(TWO)
    for row in rows[::4]:
        row["decision"] = operating_point.UNDECIDED
    decided = [r for r in rows if r["decision"] != operating_point.UNDECIDED]
    found = estimand.point(estimand.answers(rows, TWO))
    assert found["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score([r["label"] for r in decided], [r["decision"] for r in decided]), abs=1e-9
    )
    told = operating_point.counts(rows, TWO.classes)
    assert found["balanced_accuracy"] == pytest.approx((told["sensitivity"] + told["specificity"]) / 2, abs=1e-9)
    assert told["undecided"] == pytest.approx(12 / 45)
    assert found["auc"] == estimand.point(estimand.answers(class_rows(TWO), TWO))["auc"]  # ranking is of all


def test_rows_without_a_decision_follow_the_likeliest_class_and_the_rule_says_so() -> None:
    rows = [
        {k: v for k, v in r.items() if k not in ("decision", "threshold", "undecided_from", "undecided_to")}
        for r in class_rows(TWO)
    ]
    right = np.mean([max(TWO.classes, key=lambda c, r=r: r[f"p_{c}"]) == r["label"] for r in rows])
    assert estimand.point(estimand.answers(rows, TWO))["accuracy"] == pytest.approx(right)
    assert "no validation patients" in operating_point.rule(rows, TWO, QUICK)
    assert operating_point.rule(class_rows(THREE), THREE, QUICK) == "the most probable of 3 classes"
    assert "Youden's J" in operating_point.rule(class_rows(TWO), TWO, QUICK)
    assert "sensitivity 0.9" in operating_point.rule(class_rows(TWO), TWO, ScoreConfig(sensitivity=0.9))


def test_a_training_that_calls_all_patients_one_class_is_told() -> None:
    rows = class_rows(TWO, seed=4, signal=3.0)
    assert numbers.one_class(rows) == []
    one = [{**r, "decision": "no"} if r["fold"] == 1 else r for r in rows]
    assert numbers.one_class(one) == ["1 of 3 trainings call all their patients 'no'"]
    (all_,) = numbers.one_class([{**r, "decision": "no"} for r in rows])
    assert "3 of 3" in all_
    assert "tells nothing" in all_
    slides = [{**r, "unit": "slide", "slide": f"{r['patient']}.svs"} for r in one]
    assert numbers.one_class(slides) == ["1 of 3 trainings call all their slides 'no'"]


@pytest.mark.parametrize("task", [TWO, THREE, COX])
def test_trainings_that_define_no_pair_are_left_out_and_told(task: Any) -> None:
    if task is COX:
        rows = [{**r, "event": 0} if r["fold"] == 2 else r for r in survival_rows()]
    else:
        rows = [{**r, "label": task.classes[0]} if r["fold"] == 2 else r for r in class_rows(task)]
    found = estimand.answers(rows, task)
    rest = estimand.point(estimand.answers([r for r in rows if r["fold"] != 2], task))
    values = estimand.point(found)
    for name in ("c_index",) if task is COX else ("auc", "auprc"):
        if not (task is THREE and name == "auc"):  # one-against-rest has pairs of a with nobody, so none either
            assert values[name] == pytest.approx(rest[name], abs=1e-12)
    each = estimand.per_training(found)
    over = numbers.metrics.over_folds(list(each.values()))
    told = estimand.intervals(found, (), 50, 0.95)
    (said,) = [w for w in numbers.undefined(found, over, told, ScoreConfig(bootstrap=50), task) if "trainings" in w]
    assert "undefined in 1 of 3 trainings" in said
    assert "among the patients they held out" in said
    each_alone = dataclasses.replace(found, clusters=np.arange(len(found.patients)))
    told_of = numbers.undefined(each_alone, over, told, ScoreConfig(bootstrap=50), task)
    assert any("among the slides they held out" in w for w in told_of)
    assert over[task.headline][2] == 2


def test_folds_of_one_patient_have_no_pair_and_the_pooled_value_stands_under_its_own_name() -> None:
    rows = class_rows(TWO, n=12, folds=12)
    found = estimand.answers(rows, TWO)
    assert np.isnan(estimand.point(found)["auc"])
    told = estimand.intervals(found, (), 200, 0.95)
    assert told["accuracy"].low < told["accuracy"].high
    over = numbers.metrics.over_folds(list(estimand.per_training(found).values()))
    assert any("folds of one patient" in w for w in numbers.undefined(found, over, told, QUICK, TWO))
    pooled = estimand.point(estimand.answers(numbers.pooled(rows), TWO))["auc"]
    assert pooled == pytest.approx(roc_auc_score([r["label"] == "yes" for r in rows], [r["p_yes"] for r in rows]))


def test_what_is_not_the_same_question_is_refused(tmp_path: Path) -> None:
    rows = survival_rows()
    months = written(tmp_path / "months", rows, COX)
    days = written(tmp_path / "days", [{**r, "time": r["time"] * 30.44} for r in rows], COX)
    other = [{**r, "event": 1 - r["event"]} if r["patient"] == "p003" else r for r in rows]
    died = written(tmp_path / "died", other, COX)
    lost = written(tmp_path / "lost", [r for r in rows if r["patient"] != "p003"], COX)
    with pytest.raises(StoreError, match=r"45 of 45 patients have another truth .*30\.44 times as long: another unit"):
        compare.compare(months, days, QUICK)
    with pytest.raises(StoreError, match=r"1 of 45 patients have another truth in died than in months, such as p003"):
        compare.compare(months, died, QUICK)
    with pytest.raises(StoreError, match="patient p003"):
        compare.compare(months, lost, QUICK)
    two, three = written(tmp_path / "two", class_rows(TWO), TWO), written(tmp_path / "three", class_rows(THREE), THREE)
    with pytest.raises(StoreError, match="of survival"):
        compare.compare(two, months, QUICK)
    with pytest.raises(StoreError, match="the classes no, yes, three a, b, c"):
        compare.compare(two, three, QUICK)
    turned = written(tmp_path / "turned", class_rows(TWO), type(TWO)(classes=("yes", "no")))
    with pytest.raises(StoreError, match="in the same order"):
        compare.compare(two, turned, QUICK)
    relabelled = [{**r, "label": "yes" if r["label"] == "no" else "no"} for r in class_rows(TWO)]
    with pytest.raises(StoreError, match="45 of 45 patients have another truth"):
        compare.compare(two, written(tmp_path / "other", relabelled, TWO), QUICK)
    with pytest.raises(StoreError, match="same splits"):
        compare.compare(two, written(tmp_path / "split", class_rows(TWO), TWO, split_hash="y"), QUICK)


@pytest.mark.parametrize("rows", [survival_rows(24), class_rows(TWO, 24)])
def test_a_thousand_draws_of_24_patients_take_a_moment(rows: list[Row]) -> None:
    task = COX if "risk" in rows[0] else TWO
    began = clock.process_time()
    estimand.intervals(estimand.answers(rows, task), (0.2, 0.5, 0.9), 1000, 0.95)
    assert clock.process_time() - began < 2


def test_a_thousand_draws_of_a_thousand_patients_take_seconds(tmp_path: Path) -> None:
    rows = survival_rows(1000, folds=5)
    one, two = (written(tmp_path / name, rows, COX, (0.2, 0.5, 0.9)) for name in ("one", "two"))
    began = clock.process_time()
    compare.compare(one, two, ScoreConfig(bootstrap=1000))
    assert clock.process_time() - began < 20


def test_differences_are_told_at_the_level_asked_for(tmp_path: Path) -> None:
    one, two = (written(tmp_path / str(signal), class_rows(TWO, signal=signal), TWO) for signal in (0.2, 1.0))
    narrow, wide = (
        compare.compare(one, two, ScoreConfig(bootstrap=200, confidence=level))["auc"]["difference"]
        for level in (0.6, 0.95)
    )
    assert wide.low < narrow.low < narrow.high < wide.high
