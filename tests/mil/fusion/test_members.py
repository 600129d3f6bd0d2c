"""Tables alone: the members against independent optimisers and libraries, and what may never be seen."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge

from mhim.mil.fusion import cox, linear, member


def _survival(n=80, p=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    time = np.round(rng.exponential(5, n) * np.exp(-x[:, 0]), 1) + 0.1  # rounded: there are ties
    return x, time, (rng.random(n) < 0.7).astype(float)


def _independent(x, time, event, penalty):
    """Breslow's ridge Cox by another optimiser and another way to write the loss, (p,)."""
    xs, ts, es = (torch.from_numpy(v) for v in (x, time, event))

    def loss(b):
        b = torch.tensor(b, requires_grad=True)
        eta = xs @ b
        sums = torch.where(ts[None] >= ts[:, None], eta[None], -torch.inf).logsumexp(1)
        value = -(es * (eta - sums)).sum() / len(xs) + penalty / 2 * (b * b).sum()
        value.backward()
        return value.item(), b.grad.numpy()

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-13, "maxiter": 5000})
    return found.x, loss


@pytest.mark.parametrize("penalty", [0.003, 0.03, 0.3])
def test_ridge_cox_equals_an_independent_optimiser(penalty):
    x, time, event = _survival()
    ours = cox.fit(x, time, event, penalty)
    theirs, loss = _independent(x, time, event, penalty)
    assert np.abs(loss(ours)[1]).max() < 1e-10  # the gradient, written independently
    assert ours == pytest.approx(theirs, abs=1e-8)


def test_likelihood_equals_lifelines():
    import pandas as pd
    from lifelines import CoxPHFitter

    x, time, event = _survival()
    time = time + np.arange(len(time)) * 1e-3  # lifelines breaks ties after Efron
    table = pd.DataFrame(x).assign(time=time, event=event)
    fitted = CoxPHFitter().fit(table, "time", "event", fit_options={"precision": 1e-12})
    ours = cox.fit(x, time, event, 0.0)
    assert ours == pytest.approx(fitted.params_.to_numpy(), abs=1e-8)
    assert cox.likelihood(x @ ours, cox.RiskSets.of(time, event)) == pytest.approx(fitted.log_likelihood_, abs=1e-8)


@pytest.mark.parametrize("form", ["survival", "classes", "number", "grades"])
def test_a_wide_table_is_reduced_without_loss(form):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 200))
    target = {
        "survival": np.stack([rng.exponential(size=30), rng.integers(0, 2, 30)], axis=1),
        "classes": np.arange(30) % 3,
        "grades": np.arange(30) % 3,
        "number": rng.normal(size=30),
    }[form]
    of = linear.reduced(x)
    assert of.z.shape[1] <= 30
    assert of.z @ of.basis.T == pytest.approx(x, abs=1e-9)
    found = linear.whole(of, linear.fit(of, target, form, 0.01, 3))
    direct = linear.Reduced(x, np.eye(200), float((x * x).sum() / 30))
    whole = linear.whole(direct, linear.fit(direct, target, form, 0.01, 3))
    assert found.scores(x) == pytest.approx(whole.scores(x), abs=1e-6)


def test_logistic_and_ridge_equal_scikit_learn():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(60, 5)), rng.integers(0, 2, 60)
    of = linear.reduced(x)
    found = linear.whole(of, linear.fit(of, y, "classes", 0.1, 2)).scores(x)
    theirs = LogisticRegression(C=1 / (60 * 0.1 * of.scale), tol=1e-10).fit(x, y)
    assert found[:, 1] - found[:, 0] == pytest.approx(theirs.decision_function(x), abs=1e-8)
    number = x[:, 0] * 3 + rng.normal(size=60) + 7
    found = linear.whole(of, linear.fit(of, number, "number", 0.1)).scores(x)[:, 0]
    assert found == pytest.approx(Ridge(alpha=60 * 0.1 * of.scale).fit(x, number).predict(x), abs=1e-9)


def test_grades_are_probabilities_in_order():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 3))
    y = np.digitize(x[:, 0] + 0.3 * rng.normal(size=200), [-0.7, 0.7])
    of = linear.reduced(x)
    scores = linear.whole(of, linear.fit(of, y, "grades", 0.001, 3)).scores(x)
    above = np.cumprod(1 / (1 + np.exp(-scores)), axis=1)
    assert (above[:, 1] <= above[:, 0]).all()
    assert np.corrcoef(above.sum(axis=1), y)[0, 1] > 0.85


def test_twenty_thousand_columns_of_thirty_patients():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(30, 20_000))
    time, event = rng.exponential(size=30), np.ones(30)
    made = member.fit(_design(x), np.stack([time, event], axis=1), "survival", _inner(30))
    assert made.outside.shape == (30, 1)
    assert np.isfinite(made.linear.weights).all()


def test_a_class_or_event_that_an_inner_fold_lacks():
    x = np.random.default_rng(5).normal(size=(20, 3))
    classes = np.array([0] * 10 + [1] * 9 + [2])
    assert np.isfinite(member.fit(_design(x), classes, "classes", _inner(20), 3).outside).all()
    grades = np.array([0] * 10 + [1] * 9 + [2])
    assert np.isfinite(member.fit(_design(x), grades, "grades", _inner(20), 3).outside).all()
    target = np.stack([np.arange(20.0) + 1, (np.arange(20) == 3).astype(float)], axis=1)
    assert np.isfinite(member.fit(_design(x), target, "survival", _inner(20)).outside).all()


def test_a_table_without_a_column_says_the_rate():
    y = np.array([0] * 15 + [1] * 5)
    made = member.fit(lambda _: np.empty((20, 0)), y, "classes", _inner(20), 2)
    scores = made.linear.scores(np.empty((1, 0)))[0]
    assert 1 / (1 + np.exp(scores[0] - scores[1])) == pytest.approx(0.25, abs=1e-6)


def test_out_of_fold_scores_never_saw_their_patient():
    """Poisoned rows: a patient's own row and outcome change nothing of the fit that it is scored with."""
    x, time, event = _survival(60, 10)
    target = np.stack([time, event], axis=1)
    inner = _inner(60)
    made = member.fit(_design(x), target, "survival", inner)
    asked: list[tuple[int, ...]] = []

    def design(learn):
        asked.append(tuple(learn))
        return _design(x)(learn)

    again = member.fit(design, target, "survival", inner)
    assert (again.outside == made.outside).all()
    assert asked[:-1] == [tuple(np.setdiff1d(np.arange(60), left)) for left in inner]


def test_a_score_does_not_depend_on_who_else_is_scored():
    x, time, event = _survival(60, 10)
    made = member.fit(_design(x), np.stack([time, event], axis=1), "survival", _inner(60)).linear
    together = made.scores(x)
    assert all((made.scores(x[i : i + 1])[0] == together[i]).all() for i in range(60))


def _design(x):
    def design(learn):
        mean, sd = x[learn].mean(axis=0), x[learn].std(axis=0)
        return (x - mean) / np.where(sd > 0, sd, 1.0)

    return design


def _inner(n, k=4):
    return [np.arange(n)[i::k] for i in range(k)]


def test_a_weight_is_told_with_the_sign_of_the_outcome() -> None:
    """Of two classes towards the last, of grades upwards, of more classes without a sign."""
    two, steps, three = np.array([[-0.5, 0.5], [1.0, -1.0]]), np.array([[0.2, 0.4]]), np.array([[1.0, 0.0, -1.0]])
    np.testing.assert_allclose(linear.one_number(two, "classes"), [1.0, -2.0])
    np.testing.assert_allclose(linear.one_number(steps, "grades"), [0.3])
    np.testing.assert_allclose(linear.one_number(three, "classes"), [np.sqrt(2 / 3)])
    np.testing.assert_allclose(linear.one_number(np.array([[-2.0]]), "survival"), [-2.0])
