"""The paired difference of two models: by hand, against DeLong, over pairs of models, for every outcome."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mhim.mil import metrics, preference, tasks
from mhim.mil.preference import Pair
from mhim.mil.tasks import Task
from tests.benchmarks import choice

TWO = tasks.classification(("no", "yes"), [0, 1])


def two(truth: list[int], simple: list[float], other: list[float], owner: list[str] | None = None) -> Pair:
    """Two classes, whose logits are 0 and a score."""
    logits = [np.stack([np.zeros(len(x)), np.array(x)], axis=1) for x in (simple, other)]
    who = np.array(owner if owner is not None else [str(i) for i in range(len(truth))])
    return Pair(TWO, np.array(truth), logits[0], logits[1], who)


def test_difference_and_error_are_those_made_by_hand() -> None:
    # plain: 3 of 4 pairs right, student: all. Without each patient in turn the differences are 1/2, 0, 0, 1/2:
    # their mean 1/4, squares of what is off 4 / 16, times 3 / 4
    found = preference.weigh([two([1, 1, 0, 0], [3, 1, 2, 0], [4, 3, 2, 1])])
    assert found.value == pytest.approx(0.25, abs=1e-12)
    assert found.error == pytest.approx(math.sqrt(3 / 16), abs=1e-12)
    assert (found.patients, found.parts, found.of) == (4, 1, 1)
    assert not found.prefers_other(1.0)
    assert not found.tells(1.0)
    assert found.prefers_other(0.5)  # 0.25 > 0.5 * 0.433
    worse = preference.weigh([two([1, 1, 0, 0], [4, 3, 2, 1], [3, 1, 2, 0])])
    assert worse.value == pytest.approx(-0.25)
    assert worse.tells(0.5)
    assert not worse.prefers_other(0.5)


def test_a_tie_is_the_simple_model_s() -> None:
    tie = preference.weigh([two([1, 1, 0, 0], [4, 3, 2, 1], [9, 8, 0, 1])])
    assert (tie.value, tie.error) == (0.0, 0.0)
    assert not tie.prefers_other(0.0)
    assert not tie.tells(0.0)


def test_patients_that_define_nothing_decide_nothing() -> None:
    one_class = preference.weigh([two([1, 1], [1, 2], [2, 1])])
    lone = preference.weigh([two([1, 0, 0], [1, 2, 0], [3, 2, 0])])  # without its positive there is no AUC
    assert math.isnan(one_class.value)
    assert lone.value == pytest.approx(0.5)
    assert math.isnan(lone.error)
    for found in (one_class, lone, preference.weigh([])):
        assert not found.tells(0.0)
        assert not found.prefers_other(0.0)
        assert found.parts == 0


def test_slides_of_one_patient_are_left_out_together() -> None:
    rng = np.random.default_rng(0)
    truth, a, b = rng.integers(0, 2, 40), rng.normal(size=40), rng.normal(size=40)
    single = two(list(truth), list(a + truth), list(b + truth))
    twice = two(*(list(np.repeat(x, 3)) for x in (truth, a + truth, b + truth)), [str(i // 3) for i in range(120)])
    one, three = preference.weigh([single]), preference.weigh([twice])
    assert three.value == pytest.approx(one.value, abs=1e-12)
    assert three.error == pytest.approx(one.error, rel=1e-9)  # not smaller by the root of 3
    assert three.patients == 40


def test_pairs_of_models_are_never_compared_with_each_other() -> None:
    """Logits of the second pair are shifted by 10: pooled, they would order nothing of the first."""
    one = two([1, 1, 0, 0], [3, 1, 2, 0], [4, 3, 2, 1])
    far = two([1, 1, 0, 0], [13, 11, 12, 10], [4, 3, 2, 1])
    alone, both = preference.weigh([one]), preference.weigh([one, far])
    assert both.value == pytest.approx(alone.value)
    assert both.error == pytest.approx(alone.error / math.sqrt(2))
    lone = two([1, 1], [1, 2], [2, 1])
    told = preference.weigh([one, lone])
    assert (told.value, told.patients, told.parts, told.of) == (alone.value, 4, 1, 2)


@pytest.mark.parametrize(("n", "near"), [(60, 0.05), (900, 0.15)])  # 900 are left out in 200 groups
def test_the_error_of_an_auc_is_delong_s(n: int, near: float) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, n)
    shared = rng.normal(size=n)
    a, b = (truth + shared + 0.7 * rng.normal(size=n) for _ in range(2))
    found = preference.weigh([two(list(truth), list(a), list(b))])
    placed = []
    for x in (a, b):
        over = (x[truth == 1][:, None] > x[truth == 0][None, :]).astype(float)
        placed.append((over.mean(1), over.mean(0)))
    up, down = (placed[1][k] - placed[0][k] for k in (0, 1))
    delong = math.sqrt(up.var(ddof=1) / len(up) + down.var(ddof=1) / len(down))
    assert found.error == pytest.approx(delong, rel=near)
    probabilities = [1 / (1 + np.exp(-x)) for x in (a, b)]
    each = [metrics.auc(truth, np.stack([1 - p, p], axis=1)) for p in probabilities]
    assert found.value == pytest.approx(each[1] - each[0], abs=1e-12)


def test_the_simulation_weighs_as_the_program_does() -> None:
    rng = np.random.default_rng(5)
    positive = choice.classes(13)
    plain, student = (choice.scores(positive, np.full(4, a), rng.normal(size=(4, 13))) for a in (0.7, 0.9))
    many = choice.weigh(positive, plain, student)
    for k in range(4):
        one = preference.weigh([two(list(positive.astype(int)), list(plain[k]), list(student[k]))])
        assert many.value[k] == pytest.approx(one.value, abs=1e-6)
        assert many.error[k] == pytest.approx(one.error, abs=1e-6)
    wide = choice.scores(choice.classes(20000), np.array([0.8]), rng.normal(size=(1, 20000)))
    assert choice.areas(choice.classes(20000)[:4000], wide[:, :4000])[0][0] == pytest.approx(0.8, abs=0.02)


def outcome(kind: str, n: int, rng: np.random.Generator) -> tuple[Task, np.ndarray, Any]:
    """A task, the truth of n patients, and logits that follow it with some noise."""
    hidden = rng.normal(size=n)
    if kind == "survival":
        task: Task = tasks.cox_survival([(1.0, 1)])
        return (
            task,
            np.stack([np.exp(-hidden), (rng.random(n) < 0.7).astype(float)], 1),
            lambda s: (hidden + s)[:, None],
        )
    if kind == "regression":
        task = tasks.regression(list(hidden))
        return task, hidden, lambda s: ((hidden + s) / 2)[:, None]
    levels = np.digitize(hidden, [-0.5, 0.5])
    if kind == "ordinal":
        task = tasks.ordinal(("a", "b", "c"), list(levels), "cumulative")
        return task, levels, lambda s: np.stack([hidden + s + 0.5, hidden + s - 0.5], 1)
    task = tasks.classification(("a", "b", "c"), list(levels))
    return task, levels, lambda s: np.stack([-(hidden + s), 0 * s, hidden + s], 1)


@pytest.mark.parametrize("kind", ["classification", "ordinal", "regression", "survival"])
def test_every_outcome_is_weighed_by_its_headline(kind: str) -> None:
    rng = np.random.default_rng(1)
    task, truth, logits = outcome(kind, 60, rng)
    poor, good = logits(2.0 * rng.normal(size=60)), logits(0.1 * rng.normal(size=60))
    found = preference.weigh([Pair(task, truth, poor, good, np.arange(60))])
    assert found.prefers_other(1.0), found
    assert not preference.weigh([Pair(task, truth, good, poor, np.arange(60))]).prefers_other(0.0)
    assert not preference.weigh([Pair(task, truth, good, good, np.arange(60))]).tells(0.0)
