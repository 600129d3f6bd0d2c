"""Losses and probabilities of the tasks: against the recorded numbers, and by what the mathematics promises."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mhim.mil import tasks
from mhim.mil.tasks import TaskError
from tests.mil import recorded


@pytest.fixture(scope="module")
def golden():
    return recorded.arrays(recorded.PUBLISHED, "survival")


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_nll_equals_the_recorded_values(golden, alpha):
    logits = torch.from_numpy(golden["surv_logits"])
    bins, censored = torch.from_numpy(golden["surv_bin"]), torch.from_numpy(golden["surv_censor"])
    each = tasks.nll_each(logits, bins, censored.double(), alpha)
    np.testing.assert_allclose(each, golden[f"nll_each_alpha{alpha}"], rtol=1e-12)
    np.testing.assert_allclose(each.mean(), golden[f"nll_mean_alpha{alpha}"], rtol=1e-12)


def test_nll_of_saturated_hazards_is_clamped_as_recorded(golden):
    # recorded in float64; rows are (logit row, censored)
    logits = torch.from_numpy(golden["nll_extreme_logits"])
    rows = [tasks.nll_each(logits[[r] * 4], torch.arange(4), torch.full((4,), c)) for r in (0, 1) for c in (0.0, 1.0)]
    np.testing.assert_allclose(torch.stack(rows), golden["nll_extreme"], atol=1e-9)


def test_risk_and_curve_equal_the_recorded_values(golden):
    task = tasks.Nll(edges=(1.0, 2.0, 3.0))
    logits = torch.from_numpy(golden["surv_logits"])
    np.testing.assert_allclose(task.survival_curve(logits), golden["survival"], rtol=1e-12)
    np.testing.assert_allclose(task.risk(logits), golden["risk"], rtol=1e-12)


@pytest.mark.parametrize("cohort", ["luad", "lusc", "blca"])
def test_bin_edges_are_quantiles_of_the_events(golden, cohort):
    """The recorded edges come from event times we do not have; times with those quantiles give them again, and
    bins closed on the left count an edge into the upper bin."""
    edges = recorded.facts(recorded.PUBLISHED, "survival")[cohort]["bin_edges"]
    events = [(t, 1.0) for t in (edges[0], *edges[1:-1], edges[-1])]
    task = tasks.discrete_survival(events, bins=4)
    np.testing.assert_allclose(task.edges, edges[1:-1])
    assert task.bins(torch.tensor(edges[1:-1], dtype=torch.float64)).tolist() == [1, 2, 3]
    assert task.bins(torch.tensor([0.0, 1e9])).tolist() == [0, 3]


def test_bins_come_from_events_only():
    events = [(float(t), 1.0) for t in range(1, 9)]
    censored = [(1000.0 + t, 0.0) for t in range(50)]
    assert tasks.discrete_survival(events + censored).edges == tasks.discrete_survival(events).edges


@given(st.lists(st.lists(st.floats(-8, 8), min_size=4, max_size=4), min_size=1, max_size=6))
def test_probabilities_sum_to_one_and_nll_is_their_logarithm(rows):
    logits = torch.tensor(rows, dtype=torch.float64)
    task = tasks.Nll(edges=(1.0, 2.0, 3.0))
    p = task.probabilities(logits)
    torch.testing.assert_close(p.sum(1), torch.ones(len(rows), dtype=torch.float64))
    for y in range(4):
        bins = torch.full((len(rows),), y)
        seen = tasks.nll_each(logits, bins, torch.zeros(len(rows)))
        censored = tasks.nll_each(logits, bins, torch.ones(len(rows)))
        inside = (p[:, y] > 1e-4) & (p[:, y + 1 :].sum(1) > 1e-4)  # away from the clamp
        torch.testing.assert_close(seen[inside], -p[:, y].log()[inside])
        torch.testing.assert_close(censored[inside], -p[:, y + 1 :].sum(1).log()[inside])


def test_class_weights_survive_a_batch_of_one():
    targets = [0] * 8 + [1] * 2
    task = tasks.classification(("no", "yes"), targets, weighted=True)
    logits = torch.zeros(1, 2)
    rare, common = (float(task.loss(logits, torch.tensor([c]))) for c in (1, 0))
    assert rare == pytest.approx(4 * common)
    assert np.mean([task.weights[t] for t in targets]) == pytest.approx(1.0)


def test_cox_is_the_partial_likelihood():
    """Against the definition, written out event by event."""
    rng = np.random.default_rng(0)
    risk, time, event = rng.normal(size=7), rng.uniform(1, 9, 7), np.array([1, 0, 1, 1, 0, 1, 0])
    expected = np.mean([np.log(np.exp(risk[time >= time[i]]).sum()) - risk[i] for i in range(7) if event[i]])
    target = torch.tensor(np.stack([time, event], 1))
    loss = tasks.Cox().loss(torch.tensor(risk)[:, None], target)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


def test_cox_of_one_bag_learns_through_its_memory():
    target = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    logit = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    tasks.Cox().loss(logit, target).backward()
    assert float(logit.grad.abs().sum()) == 0.0  # alone, a bag has no risk set to compare with
    memory = torch.tensor([[0.5, 5.0, 0.0], [0.1, 1.0, 1.0]], dtype=torch.float64)
    logit.grad = None
    tasks.Cox().with_memory(memory).loss(logit, target).backward()
    # died at 2: outlived by the first (push up); at risk when the second died at 1 (push down)
    up = 1 / (1 + np.exp(0.5)) - 1
    down = 1 / (1 + np.exp(0.5) + np.exp(0.1))
    assert float(logit.grad) == pytest.approx((up + down) / 2, rel=1e-9)


def test_divergence_is_zero_at_the_teacher_and_positive_elsewhere():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    for task in (tasks.Classification(classes=tuple("abcd")), tasks.Nll(edges=(1.0, 2.0, 3.0))):
        assert float(task.divergence(a, a)) == pytest.approx(0.0, abs=1e-12)
        assert float(task.divergence(a, b)) > 0
    assert float(tasks.Cox().divergence(a[:, :1], a[:, :1])) == 0.0
    a.requires_grad_(), b.requires_grad_()
    tasks.Classification(classes=tuple("abcd")).divergence(a, b).backward()
    assert a.grad is None
    assert b.grad is not None


@pytest.mark.parametrize(
    "task",
    [
        tasks.classification(("a", "b", "c"), [0, 1, 2, 2], weighted=True),
        tasks.discrete_survival([(float(t), 1.0) for t in range(9)], bins=3, alpha=0.2),
        tasks.cox_survival([(1.0, 1.0), (2.0, 0.0)]),
    ],
)
def test_a_task_survives_json(task):
    assert tasks.from_json(json.loads(json.dumps(task.to_json()))) == task


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tasks.classification(("a", "b"), [0, 0]), "class b"),
        (lambda: tasks.classification(("a",), [0, 0]), "only one class"),
        (lambda: tasks.cox_survival([(1.0, 0.0), (2.0, 0.0)]), "no event"),
        (lambda: tasks.cox_survival([(-1.0, 1.0)]), "negative"),
        (lambda: tasks.cox_survival([(float("nan"), 1.0)]), "not a number"),
        (lambda: tasks.cox_survival([(1.0, 2.0)]), "event must be"),
        (lambda: tasks.discrete_survival([(1.0, 1.0), (1.0, 1.0), (2.0, 0.0)]), "survival_bins"),
        (lambda: tasks.Cox().probabilities(torch.zeros(1, 1)), "survival_loss=nll"),
    ],
)
def test_bad_labels_are_refused_with_the_reason(make, says):
    with pytest.raises(TaskError, match=says):
        make()
