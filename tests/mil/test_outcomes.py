"""Ordinal, regression and several targets: their losses against independent computations, and what they promise."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mhim.mil import outcome_metrics, tasks
from mhim.mil.tasks import Cells, Classification, Cox, Nll, Ordinal, Regression, Several

FOUR = tuple("abcd")
rows = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5)


def sigmoid(z):
    return 1.0 / (1.0 + math.exp(-z))


def corn_of(z):
    """P(y = k) of one row, by the conditional probabilities of the paper."""
    reach, found = 1.0, []
    for one in z:
        found.append(reach * sigmoid(-one))
        reach *= sigmoid(one)
    return [*found, reach]


def cumulative_of(z):
    cuts = [z[0] - sum(math.log1p(math.exp(v)) for v in z[1 : k + 1]) for k in range(len(z))]
    above = [1.0, *map(sigmoid, cuts), 0.0]
    return [a - b for a, b in itertools.pairwise(above)]


@pytest.mark.parametrize(("link", "of"), [("corn", corn_of), ("cumulative", cumulative_of)])
def test_the_ordinal_loss_is_the_log_likelihood_of_the_level(link, of):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (40, 3)))
    task = Ordinal(FOUR, link)
    expected = np.array([of(z) for z in logits.tolist()])
    np.testing.assert_allclose(task.probabilities(logits), expected, atol=1e-12)
    for level in range(4):
        each = task.each(logits, torch.full((40,), float(level), dtype=torch.float64))
        np.testing.assert_allclose(each, -np.log(expected[:, level]), rtol=1e-9)
    np.testing.assert_allclose(task.risk(logits), expected @ np.arange(4), atol=1e-12)
    median = (np.cumsum(expected, axis=1) <= 0.5).sum(axis=1)  # the lowest k with P(y <= k) > 1/2
    assert task.level(logits).tolist() == median.tolist()


def test_corn_is_the_sum_of_the_papers_binary_tasks():
    """Shi et al.: the k-th task is the binary cross-entropy of y > k over the cases with y >= k."""
    rng = np.random.default_rng(1)
    logits, levels = torch.from_numpy(rng.normal(size=(30, 3))), torch.from_numpy(rng.integers(0, 4, 30).astype(float))
    total = 0.0
    for k in range(3):
        reached = levels >= k
        above = (levels[reached] > k).double()
        total += torch.nn.functional.binary_cross_entropy_with_logits(logits[reached, k], above, reduction="sum").item()
    assert Ordinal(FOUR).loss(logits, levels).item() == pytest.approx(total / 30, rel=1e-12)


@given(rows, st.sampled_from(["corn", "cumulative"]))
def test_exceeding_falls_by_construction_and_gradients_are_finite(values, link):
    logits = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    task = Ordinal(FOUR, link)
    above = task.exceeding(logits)
    assert (above[:, 1:] <= above[:, :-1]).all()
    for level in range(4):
        (grad,) = torch.autograd.grad(task.loss(logits, torch.full((len(values),), float(level))), logits)
        assert torch.isfinite(grad).all()


def test_regression_is_standardised_on_the_training_part():
    values = [10.0, 20.0, 60.0, 90.0]
    task = tasks.regression(values)
    assert (task.mean, task.sd) == (pytest.approx(45.0), pytest.approx(np.std(values)))
    logits = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    np.testing.assert_allclose(task.value(logits), 45 + np.std(values) * np.array([0.5, -1.0]))
    target = task.target([60.0, 10.0])
    off = logits[:, 0].numpy() - (target.numpy() - 45) / np.std(values)
    assert task.loss(logits, target).item() == pytest.approx((off**2).mean())
    far = torch.tensor([[9.0]], dtype=torch.float64)
    robust = tasks.regression(values, "huber")
    assert robust.loss(far, task.target([45.0])).item() == pytest.approx(2 * (9 - 0.5))
    near = torch.tensor([[0.25]], dtype=torch.float64)
    assert robust.loss(near, task.target([45.0])).item() == pytest.approx(task.loss(near, task.target([45.0])).item())


def test_the_interval_is_the_conformal_quantile_or_the_whole_line():
    errors = np.arange(1.0, 20.0)  # 19 of them: ceil(20 * .9) = 18, ceil(20 * .95) = 19
    assert outcome_metrics.conformal_half_width(errors, 0.9) == 18.0
    assert outcome_metrics.conformal_half_width(errors, 0.95) == 19.0
    assert outcome_metrics.conformal_half_width(errors[:18], 0.95) == math.inf
    points = Regression(0.0, 1.0).points(errors[:9], np.zeros((9, 1)))
    assert points == {"interval": {"0.9": 9.0, "0.95": None}}


def test_the_interval_covers_as_stated():
    """Over many validation sets, the mean coverage of exchangeable new patients is at least the level, and near it."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(2000):
        width = outcome_metrics.conformal_half_width(np.abs(rng.standard_t(3, 39)), 0.9)
        covered.append(2 * stats.t.cdf(width, 3) - 1)
    assert 0.9 - 0.004 < np.mean(covered) < 0.9 + 1 / 40 + 0.004


def test_metrics_equal_other_programs():
    rng = np.random.default_rng(4)
    truth, value = rng.normal(size=50), rng.normal(size=50).round(1)
    found = outcome_metrics.regression(truth, value, {"0.9": 1.0, "0.95": None})
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, value)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, value)[0])
    assert found["r2"] == pytest.approx(1 - np.mean((truth - value) ** 2) / truth.var())
    assert found["coverage_0.95"] == 1.0
    assert found["coverage_0.9"] == pytest.approx(np.mean(np.abs(truth - value) <= 1))


def test_quadratic_kappa_of_a_known_table():
    # Cohen 1968 by hand: O = [[2,1],[1,2]] over levels 0 and 2 of three: w = 4, ΣwO = 8, ΣwE = 4 * (9 + 9) / 6
    labels, called = np.array([0, 0, 0, 2, 2, 2]), np.array([0, 0, 2, 0, 2, 2])
    assert outcome_metrics.quadratic_kappa(labels, called, 3) == pytest.approx(1 - 8 / 12)
    assert outcome_metrics.quadratic_kappa(labels, labels, 3) == 1.0
    assert math.isnan(outcome_metrics.quadratic_kappa(np.zeros(3, int), np.array([0, 1, 2]), 3))


def mixed(memory=False):
    return tasks.several(
        {
            "er": Classification(("neg", "pos")),
            "grade": Ordinal(("1", "2", "3")),
            "ki67": Regression(20.0, 10.0),
            "os": Cox() if memory else Nll((12.0, 24.0)),
        }
    )


CELLS = [
    Cells((1, 2, 35.0, (10.0, 1.0))),
    Cells((None, 0, None, None)),
    Cells((0, None, 5.0, (30.0, 0.0))),
    Cells((None, None, None, (5.0, 1.0))),
]


def test_the_loss_of_several_is_the_masked_mean_of_each():
    task = mixed()
    logits = torch.from_numpy(np.random.default_rng(5).normal(size=(4, task.n_out)))
    total = 0.0
    for k, (name, one) in enumerate(task.targets):
        who = [i for i, c in enumerate(CELLS) if c.values[k] is not None]
        own = one.target([CELLS[i].values[k] for i in who])
        total += one.loss(logits[who][:, task.slices[name]], own).item()
    assert task.loss(logits, task.target(CELLS)).item() == pytest.approx(total / 4, rel=1e-12)


@pytest.mark.parametrize("cox", [False, True])
def test_an_unknown_cell_has_no_gradient_and_spoils_none(cox):
    task = mixed(cox)
    logits = torch.zeros(4, task.n_out, requires_grad=True)
    task.loss(logits, task.target(CELLS)).backward()
    assert torch.isfinite(logits.grad).all()
    for i, cells in enumerate(CELLS):
        for k, name in enumerate(task.names):
            moved = logits.grad[i, task.slices[name]].abs().sum() > 0
            known = cells.values[k] is not None
            assert moved <= known if name == "os" else moved == known


def test_cox_among_several_reaches_over_the_bags_before():
    task, alone = mixed(True), Cox()
    logits = torch.from_numpy(np.random.default_rng(6).normal(size=(4, task.n_out)))
    seen = task.remembered(logits, task.target(CELLS))
    new = torch.from_numpy(np.random.default_rng(7).normal(size=(1, task.n_out)))
    cell = Cells((None, None, None, (4.0, 1.0)))
    got = task.with_memory(seen).loss(new, task.target([cell])) * 4
    at = task.slices["os"].start
    known = torch.tensor([[logits[i, at], *CELLS[i].values[3]] for i in (0, 2, 3)], dtype=torch.float64)
    assert got.item() == pytest.approx(alone.with_memory(known).loss(new[:, at:], alone.target([(4.0, 1.0)])).item())


EVERY = [
    Classification(("a", "b"), (0.5, 1.5)),
    Nll((1.0, 2.0)),
    Cox(),
    Ordinal(FOUR, "cumulative", (1.0, 1.0, 0.5, 1.5)),
    Regression(1.5, 0.25, "huber"),
    mixed(),
]


@pytest.mark.parametrize("task", EVERY, ids=lambda t: t.kind)
def test_json_carries_a_task(task):
    assert tasks.from_json(json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize("task", EVERY, ids=lambda t: t.kind)
def test_divergence_of_equals_is_zero_and_the_teacher_is_left_alone(task):
    a, b = (torch.randn(3, task.n_out, requires_grad=True) for _ in range(2))
    assert task.divergence(a, a).item() == pytest.approx(0.0, abs=1e-6)
    task.divergence(a, b).backward()
    assert a.grad is None
    assert torch.isfinite(b.grad).all()


def test_a_prediction_row_gives_the_targets_back():
    task = mixed()
    logits = {f"logit_{k}": str(k) for k in range(task.n_out)}
    table = [
        {"patient": str(i), **{k: str(v) for k, v in task.columns(c).items()}, **logits} for i, c in enumerate(CELLS)
    ]
    np.testing.assert_array_equal(task.truth(table), task.target(CELLS).numpy())
    (one,) = [r for r in task.view("grade", table) if r["patient"] == "0"]
    assert one == {"patient": "0", "target": "2", "logit_0": "2", "logit_1": "3"}
    assert [r["patient"] for r in task.view("os", table)] == ["0", "2", "3"]
    assert task.view("os", table)[0]["time"] == "10.0"


def test_hardness_of_the_grade_is_what_raises_the_bag_to_it():
    task = Ordinal(FOUR)
    c = torch.tensor([[3.0, 0.0, 9.0], [0.0, 2.0, 0.0], [1.0, 2.5, 0.0]])
    second = torch.tensor([5.0, 5.0, -5.0])  # P(y > 1) is high, P(y > 2) is not: the level is 2
    assert task.hardness(c, second).tolist() == [3.0, 2.0, 3.5]
    assert task.hardness(c, torch.tensor([-5.0, 0.0, 0.0])).tolist() == [-3.0, 0.0, -1.0]


def test_hardness_of_several_leaves_no_target_without_its_hardest():
    task = tasks.several({"a": Regression(), "b": Regression()})
    c = torch.zeros(10, 2)
    c[3, 0], c[7, 1], c[5] = 1e-3, 50.0, torch.tensor([1e-4, 1.0])
    order = task.hardness(c, torch.zeros(2)).argsort(descending=True).tolist()
    assert set(order[:2]) == {3, 7}
    assert order[2] == 5


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: tasks.regression([3.0, 3.0, 3.0]), "all 3 training targets of this fold are 3"),
        (lambda: tasks.regression([1.0, math.inf]), "infinite"),
        (lambda: tasks.ordinal(("1", "2", "3"), [0, 0, 2], "corn"), "no training case of level 2"),
        (lambda: tasks.several({"a": Cox()}), "two or more"),
        (lambda: Regression().probabilities(torch.zeros(1, 1)), "no probabilities"),
        (lambda: Regression().stratum(1.0), "train.balance=none"),
    ],
)
def test_what_cannot_be_trained_is_told(make, told):
    with pytest.raises(tasks.TaskError, match=told):
        make()


def test_metrics_of_several_are_those_of_each_alone():
    task = mixed()
    rng = np.random.default_rng(8)
    cells = [
        Cells((int(i % 2) if i % 3 else None, int(i % 3), float(rng.normal(20, 9)), (float(i + 1), float(i % 4 > 0))))
        for i in range(40)
    ]
    truth, logits = task.target(cells).numpy(), rng.normal(size=(40, task.n_out))
    points = task.points(truth, logits) | {}
    found = task.metrics_of(truth, logits, points)
    known = [i for i, c in enumerate(cells) if c.values[0] is not None]
    er = task.of("er")
    own = er.target([cells[i].values[0] for i in known]).numpy()
    assert found["er"] == er.metrics(own, logits[known][:, :2], points["targets"]["er"])
    assert set(found["ki67"]) >= {"r2", "mae", "coverage_0.9"}
    heads = task.headline_of(truth, torch.from_numpy(logits))
    each = [heads["er.auc"], heads["grade.quadratic_kappa"], heads["ki67.r2"], heads["os.c_index"]]
    assert heads["headline"] == pytest.approx(np.mean(np.maximum(each, -1)))
    assert isinstance(task, Several)
    far = logits.copy()
    far[:, task.slices["ki67"]] += 1e3
    badly = task.headline_of(truth, torch.from_numpy(far))
    assert badly["ki67.r2"] < -1e3
    assert badly["headline"] == pytest.approx(np.mean([*each[:2], -1, each[3]])), "one number does not decide alone"
