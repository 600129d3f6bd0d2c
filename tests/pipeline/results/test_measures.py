"""Levels, numbers and several targets: every number against scikit-learn and SciPy on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, cohen_kappa_score, mean_absolute_error, r2_score, roc_auc_score

from mhim.configs.schema import ScoreConfig
from mhim.mil.tasks import Classification, Ordinal, Regression, Several
from mhim.pipeline.pictures import kinds, layers
from mhim.pipeline.results import compare, ensemble, estimand, measures, several, views
from mhim.pipeline.store import tables
from mhim.pipeline.store.layout import StoreError
from mhim.pipeline.training import fold
from tests.pipeline import records
from tests.pipeline.numbered import TWO, class_rows

Row = dict[str, Any]
GRADES = Ordinal(classes=("1", "2", "3"))
PERCENT = Regression(mean=40.0, sd=10.0)


def level_rows(n: int = 60, folds: int = 3, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        true = i % 3
        p = rng.dirichlet(1.0 + 2.0 * np.eye(3)[true])
        row = {"slide": f"s{i}", "patient": f"p{i:03d}", "repeat": 0, "fold": int(rng.integers(folds)), "seed": 7}
        row |= {"label": GRADES.classes[true], **{f"p_{c}": float(v) for c, v in zip("123", p, strict=True)}}
        made.append(row | measures.of(GRADES).decision(row))
    return made


def number_rows(n: int = 60, folds: int = 3, seed: int = 0, width: float = 15.0) -> list[Row]:
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 5, folds)  # a model's own offset
    made = []
    for i in range(n):
        k, true = int(rng.integers(folds)), float(rng.normal(40, 10))
        value = true + shift[k] + float(rng.normal(0, 8))
        row = {"slide": f"s{i}", "patient": f"p{i:03d}", "repeat": 0, "fold": k, "seed": 7, "label": true}
        made.append(row | {"predicted": value, "low": value - width, "high": value + width})
    return made


def test_the_level_that_is_called_is_the_median_and_the_numbers_are_of_it() -> None:
    rows = level_rows()
    for row in rows:
        below = np.cumsum([row[f"p_{c}"] for c in "123"])
        assert row["decision"] == GRADES.classes[int(np.argmax(below > 0.5))]
        assert row["expected_level"] == pytest.approx(row["p_2"] + 2 * row["p_3"])
    logits = np.random.default_rng(1).normal(0, 2, (200, 2)).round(1)  # 0: a half to either side
    z = torch.from_numpy(logits)
    each = [dict(zip(("p_1", "p_2", "p_3"), p, strict=True)) for p in GRADES.probabilities(z).tolist()]
    levels = [GRADES.classes[k] for k in GRADES.level(z)]
    assert [measures.of(GRADES).decision(row)["decision"] for row in each] == levels, "one rule of the median"
    assert (logits[:, 0] == 0).any()
    found = estimand.point(estimand.answers(rows, GRADES))
    true, called = ([GRADES.classes.index(r[k]) for r in rows] for k in ("label", "decision"))
    assert found["quadratic_kappa"] == pytest.approx(cohen_kappa_score(true, called, weights="quadratic"), abs=1e-9)
    assert found["mae"] == pytest.approx(mean_absolute_error(true, called), abs=1e-9)
    right = total = 0.0
    for k in range(3):
        own = [r for r in rows if r["fold"] == k]
        y = np.array([r["label"] != "1" for r in own])
        pairs = y.sum() * (~y).sum()
        right, total = right + pairs * roc_auc_score(y, [1 - r["p_1"] for r in own]), total + pairs
    assert found["auc_above_0"] == pytest.approx(right / total, abs=1e-9)


def test_errors_are_of_all_patients_and_correlations_inside_each_training() -> None:
    rows = number_rows()
    found = estimand.point(estimand.answers(rows, PERCENT))
    true, value = (np.array([r[k] for r in rows]) for k in ("label", "predicted"))
    assert found["r2"] == pytest.approx(r2_score(true, value), abs=1e-9)
    assert found["mae"] == pytest.approx(mean_absolute_error(true, value), abs=1e-9)
    assert found["coverage"] == pytest.approx(np.mean(np.abs(true - value) <= 15.0), abs=1e-9)
    assert found["interval_width"] == pytest.approx(30.0, abs=1e-9)
    for name, scipys in (("pearson", pearsonr), ("spearman", spearmanr)):
        each = [[r for r in rows if r["fold"] == k] for k in range(3)]
        inside = [scipys([r["label"] for r in own], [r["predicted"] for r in own]).statistic for own in each]
        assert found[name] == pytest.approx(np.average(inside, weights=[len(own) for own in each]), abs=1e-9)
    # another offset for one model changes its errors and no correlation
    moved = [{**r, "predicted": r["predicted"] + 50 * (r["fold"] == 1)} for r in rows]
    other = estimand.point(estimand.answers(moved, PERCENT))
    assert other["pearson"] == pytest.approx(found["pearson"], abs=1e-9)
    assert other["r2"] < found["r2"] - 1


def test_an_interval_without_end_is_told_and_its_width_is_of_the_others() -> None:
    rows = number_rows()
    rows = [{**r, "low": -np.inf, "high": np.inf} if r["fold"] == 0 else r for r in rows]
    measure, found = measures.of(PERCENT), estimand.answers(rows, PERCENT)
    assert estimand.point(found)["interval_width"] == pytest.approx(30.0)
    told = measure.tables(found, rows, rows, ScoreConfig(), lambda _: rows)["interval_rule"]
    assert "1 of 3 trainings had fewer than 19" in told
    assert "19" not in measure.tables(found, number_rows(), [], ScoreConfig(), lambda _: rows)["interval_rule"]
    slides = [row | {"unit": "slide"} for row in rows]
    assert "validation slides" in measure.tables(found, slides, slides, ScoreConfig(), lambda _: rows)["interval_rule"]


@pytest.mark.parametrize("confidence", [0.8, 0.9])
def test_the_interval_is_the_card_s_or_by_the_same_rule(confidence: float) -> None:
    errors = np.arange(1.0, 40.0)  # in the labels' unit; validation of 39
    validation = [{"target": str(40.0 + e), "logit_0": "0.0"} for e in errors]
    measure = measures.of(PERCENT)
    width = float(errors[int(np.ceil(40 * confidence)) - 1])
    plain = records.card(PERCENT)
    assert measure.frozen(plain, lambda: validation, ScoreConfig(confidence=confidence)) == width
    kept = records.card(PERCENT, interval={"0.9": 3.0})
    assert measure.frozen(kept, lambda: validation, ScoreConfig(confidence=0.9)) == 3.0
    assert measure.frozen(plain, list, ScoreConfig(confidence=confidence)) == np.inf


def test_several_models_together() -> None:
    ones, twos = number_rows(), [{**r, "seed": 8, "predicted": r["predicted"] + 2.0} for r in number_rows()]
    joined = ensemble.ensemble([*ones, *twos], PERCENT)
    assert [r["predicted"] for r in joined] == pytest.approx([r["predicted"] + 1.0 for r in ones])
    assert joined[0]["spread"] == pytest.approx(np.std([0, 2], ddof=1))
    levels = [*level_rows(), *({**r, "seed": 8} for r in level_rows(seed=3))]
    both = [r for r in levels if r["patient"] == "p000"]
    found = ensemble.ensemble(both, GRADES)[0]
    mean = np.mean([[r[f"p_{c}"] for c in "123"] for r in both], axis=0)
    assert found["decision"] == GRADES.classes[int(np.argmax(np.cumsum(mean) > 0.5))]


def test_macro_and_micro_are_those_of_scikit_learn_inside_each_training() -> None:
    rows = {"er": (class_rows(TWO, seed=1), TWO), "pr": (class_rows(TWO, seed=2)[:30], TWO)}  # pr has gaps
    metric, patients, strata, _ = several.together(rows)
    found = {k: float(v[0]) for k, v in metric(np.ones((1, len(patients)))).items()}
    each = {name: estimand.point(estimand.answers(own, task)) for name, (own, task) in rows.items()}
    assert found["macro_auc"] == pytest.approx(np.mean([e["auc"] for e in each.values()]), abs=1e-9)
    assert found["headline"] == found["macro_auc"]
    assert found["er.auc"] == each["er"]["auc"]
    right = total = 0.0
    precise = []
    for k in range(3):
        cells = [r for own, _ in rows.values() for r in own if r["fold"] == k]
        y, p = np.array([r["label"] == "yes" for r in cells]), [r["p_yes"] for r in cells]
        pairs = y.sum() * (~y).sum()
        right, total = right + pairs * roc_auc_score(y, p), total + pairs
        precise.append(average_precision_score(y, p))
    assert found["micro_auc"] == pytest.approx(right / total, abs=1e-9)
    assert found["micro_auprc"] == pytest.approx(np.mean(precise), abs=1e-9)
    assert len(strata) == len(patients) == 45


def test_targets_of_other_kinds_have_a_mean_headline_and_no_macro() -> None:
    rows = {"er": (class_rows(TWO), TWO), "ki67": (number_rows(), PERCENT)}
    metric, patients, *_ = several.together(rows)
    found = {k: float(v[0]) for k, v in metric(np.ones((1, len(patients)))).items()}
    assert set(found) == {"headline", "er.auc", "ki67.r2"}
    assert found["headline"] == pytest.approx((found["er.auc"] + found["ki67.r2"]) / 2)


def view(run: Path, target: str, rows: list[Row], task: Any) -> None:
    at = views.View(run, target).folder
    at.mkdir(parents=True)
    (at / fold.PREDICTIONS).write_text(tables.of_mappings(rows))
    (at / "metrics.json").write_text(records.metrics(task, target=target).text())


def test_runs_are_compared_target_by_target_by_names_that_are_no_folders_too(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 4)):
        view(tmp_path / name, "HER2 +/-", class_rows(TWO, seed=0), TWO)
        view(tmp_path / name, "ki67", [{**r, "predicted": r["predicted"] + seed} for r in number_rows()], PERCENT)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / fold.PREDICTIONS).write_text(tables.of_mappings(number_rows()))
    (alone / "metrics.json").write_text(records.metrics(PERCENT).text())
    one, two = tmp_path / "one", tmp_path / "two"
    assert [v.target for v in views.of(one)] == ["HER2 +/-", "ki67"]
    sides = compare.views_of(one, two, None)
    assert [a.target for a, _ in sides] == ["HER2 +/-", "ki67"]
    found = compare.compare(*sides[1], ScoreConfig(bootstrap=50))
    assert found["mae"]["difference"].value != 0
    assert found["mae"]["verdict"] in ("better", "worse", "no difference")
    ((left, right),) = compare.views_of(alone, two, "ki67")  # a run of it alone beside one of several
    assert (left.target, right.target) == ("", "ki67")
    assert compare.compare(left, right, ScoreConfig(bootstrap=20))["r2"]
    for known in (None, "ki67", "pr"):  # it tells the column that it was trained on, or is of an earlier version
        if known is not None:
            (alone / "labels.yaml").write_text(f"labels: {{label_column: {known}}}\n")
        if known == "pr":
            says = (
                r"alone is of column pr, a number, which is none of .*: HER2 \+/- \(classification\), ki67 \(a number"
            )
            with pytest.raises(StoreError, match=says):
                compare.views_of(alone, two, None)
            continue
        assert [(a.target, b.target) for a, b in compare.views_of(alone, two, None)] == [("", "ki67")]
        assert [(a.target, b.target) for a, b in compare.views_of(two, alone, None)] == [("ki67", "")]
    with pytest.raises(StoreError, match="no target 'pr'"):
        views.pick(two, "pr")
    with pytest.raises(StoreError, match="a number"):
        compare.compare(sides[0][0], sides[1][1], ScoreConfig(bootstrap=20))


def test_layers_of_each_kind_are_signed_where_they_argue() -> None:
    attention = np.full(4, 0.25)
    raw = np.array([[0.0, 1.0, 2.0, 1.0], [1.0, 0.0, -2.0, -1.0], [0, 0, 0, 0.5], [0, 0, 1, 0]], np.float64)
    task = Several((("er", Classification(("neg", "pos"))), ("ki67", PERCENT), ("own", PERCENT)))
    evidence = task.of_tiles(raw, attention, attention @ raw)  # a model without bias
    found = {x.name: x for x in layers.layers({"attention": attention, "evidence": evidence}, task, "all")}
    of_er = ["probability_pos_of_er", "contribution_pos_of_er"]
    of_numbers = [f"{what}_of_{name}" for name in ("ki67", "own") for what in ("value", "contribution_value")]
    assert list(found) == ["attention", *of_er, *of_numbers]
    assert found["value_of_ki67"].scores == pytest.approx(40 + 10 * raw[:, 2])
    added = found["contribution_value_of_ki67"]
    assert added.signed
    assert added.scores.sum() == pytest.approx(10 * raw[:, 2].mean())  # adds up to the answer less the mean
    levels = kinds.of(GRADES).layers(attention, raw[:, :2], "contribution")
    assert [x.name for x in levels] == ["contribution_level"]
    assert levels[0].scores.sum() == pytest.approx(0, abs=1e-12)
