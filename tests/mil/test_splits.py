"""Folds: every patient once in a test side, never on two sides, stratified, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.mil import splits
from mhim.mil.splits import Fold, SplitError


def cohort(n, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes).repeat(6), rng.integers(classes, size=n)])
    return {f"P{i:03d}": int(c) for i, c in enumerate(labels)}


@settings(max_examples=30)
@given(n=st.integers(0, 60), classes=st.integers(2, 4), folds=st.integers(2, 6), seed=st.integers(0, 99))
def test_folds_partition_the_patients_and_keep_the_classes(n, classes, folds, seed):
    strata = cohort(n, classes, seed)
    made = splits.k_fold(strata, folds, 0.2, seed)
    assert sorted(p for f in made for p in f.test) == sorted(strata)
    for f in made:
        assert sorted((*f.train, *f.val, *f.test)) == sorted(strata)
        for c in range(classes):
            total = sum(v == c for v in strata.values())
            here = sum(strata[p] == c for p in f.test)
            assert total // folds <= here <= -(-total // folds)
            assert any(strata[p] == c for p in f.train)
            assert any(strata[p] == c for p in f.val)
    sizes = [len(f.test) for f in made]
    assert max(sizes) - min(sizes) <= 1


def test_same_seed_same_folds_whatever_the_order_of_the_labels():
    strata = cohort(20)
    turned = dict(reversed(strata.items()))
    one, two = splits.k_fold(strata, 4, 0.2, 7, repeats=2), splits.k_fold(turned, 4, 0.2, 7, repeats=2)
    assert one == two
    assert splits.digest(one) == splits.digest(two)
    assert splits.digest(one) != splits.digest(splits.k_fold(strata, 4, 0.2, 8, repeats=2))
    assert one[0].test != one[4].test  # the second repetition is another split
    assert [f.name for f in one[3:5]] == ["fold_3", "rep_1_fold_0"]


@settings(max_examples=30)
@given(sites=st.integers(4, 12), folds=st.integers(2, 4), seed=st.integers(0, 50))
def test_a_site_is_wholly_in_one_fold(sites, folds, seed):
    strata = cohort(60, 2, seed)
    rng = np.random.default_rng(seed)
    site = {p: f"S{rng.integers(sites)}" for p in strata}
    site.update({p: f"S{i}" for i, p in enumerate(list(strata)[:sites])})
    made = splits.k_fold(strata, folds, 0.2, seed, sites=site)
    homes = {}
    for f in made:
        for p in f.test:
            assert homes.setdefault(site[p], f.fold) == f.fold
    assert sorted(p for f in made for p in f.test) == sorted(strata)


def test_columns_of_the_labels_are_obeyed():
    strata = cohort(8)
    column = {p: str(i % 3 + 8) for i, p in enumerate(strata)}
    made = splits.from_fold_column(column, strata, 0.2, 1)
    assert [set(f.test) for f in made] == [{p for p, v in column.items() if v == name} for name in ("8", "9", "10")]
    side = {p: ("test" if i % 4 == 0 else "train") for i, p in enumerate(strata)}
    (only,) = splits.from_split_column(side, strata, 0.2, 1)
    assert set(only.test) == {p for p, v in side.items() if v == "test"}
    assert only.val
    side |= dict.fromkeys(list(strata)[1:3], "val")
    (only,) = splits.from_split_column(side, strata, 0.2, 1)
    assert set(only.val) == set(list(strata)[1:3])


def test_the_published_protocol_trains_on_the_validation_part_too():
    made = splits.k_fold(cohort(10), 3, 0.2, 1)
    for honest, paper in zip(made, splits.select_on_test(made), strict=True):
        assert set(paper.train) == {*honest.train, *honest.val}
        assert paper.test == honest.test
        assert not paper.val


def test_survival_strata_spread_events_and_times():
    time = {f"P{i}": float(i) for i in range(40)}
    event = {p: int(i % 4 == 0) for i, p in enumerate(time)}
    strata = splits.survival_strata(time, event)
    assert set(strata.values()) == {0, 1, 2, 3}
    assert all((strata[p] >= 2) == bool(event[p]) for p in time)
    for f in splits.k_fold(strata, 4, 0.2, 0):
        assert sum(event[p] for p in f.test) in (2, 3)


@pytest.mark.parametrize(("events", "censored"), [(5, 40), (7, 3), (40, 1), (9, 0)])
def test_survival_folds_need_an_event_each_and_no_more(events, censored):
    names = [f"P{i}" for i in range(events + censored)]
    event = {p: int(i < events) for i, p in enumerate(names)}
    strata = splits.survival_strata({p: float(i % 7) for i, p in enumerate(names)}, event)
    for seed in range(5):
        made = splits.k_fold(strata, 5, 0.2, seed, survival=True)
        held_out = [sum(event[p] for p in f.test) for f in made]
        assert min(held_out) >= 1
        assert max(held_out) - min(held_out) <= 1
    with pytest.raises(SplitError, match=f"only {events} patients have an event, for {events + 1} folds"):
        splits.k_fold(strata | {f"Q{i}": 0 for i in range(9)}, events + 1, 0.2, 0, survival=True)


def test_rows_list_every_patient_of_every_fold():
    made = splits.k_fold(cohort(5), 3, 0.2, 1)
    found = splits.rows(made)
    assert len(found) == 3 * 17
    assert {r["split"] for r in found} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: splits.k_fold({"A": 0, "B": 1}, 3, 0.2, 0), "only 2 patients: set train.folds to 2 or less"),
        (lambda: splits.k_fold({**{f"P{i}": 0 for i in range(9)}, "Q": 1}, 3, 0.2, 0), "has 1 .*lack it: merge it"),
        (lambda: splits.k_fold(cohort(9), 3, 0.2, 0, sites=dict.fromkeys(cohort(9), "S")), "only 1 sites: use"),
        (lambda: splits.k_fold(cohort(9), 3, 0.2, 0, sites={}), "has no site"),
        (lambda: splits.from_split_column({"A": "train", "B": "tset"}, {"A": 0, "B": 1}, 0.2, 0), "B: split 'tset'"),
        (lambda: splits.from_split_column({"A": "train", "B": "train"}, {"A": 0, "B": 0}, 0.2, 0), "no test"),
        (lambda: splits.from_fold_column({"A": "1", "B": "1"}, {"A": 0, "B": 0}, 0.2, 0), "only '1'"),
        (lambda: Fold(0, 2, ("A", "B"), ("B",), ("C",)), "patient B is on two sides of fold 2"),
    ],
)
def test_impossible_splits_are_refused_with_the_reason(make, says):
    with pytest.raises(SplitError, match=says):
        make()


def test_validation_holds_whole_sites_where_every_class_stays_on_both_sides():
    """Under split_by=site a site is of training, of validation or of test, and never of two of them."""
    strata = {f"P{i:03d}": i % 2 for i in range(80)}
    site = {p: f"S{i % 10}" for i, p in enumerate(sorted(strata, key=lambda p: (strata[p], p)))}
    for f in splits.k_fold(strata, 4, 0.2, 3, sites=site):
        of = [{site[p] for p in side} for side in (f.train, f.val, f.test)]
        assert all(of)
        assert sum(map(len, of)) == len(set().union(*of)) == 10
        assert {strata[p] for p in f.val} == {strata[p] for p in f.train} == {0, 1}
        assert 0.1 <= len(f.val) / len(strata) <= 0.3
    assert splits.k_fold(strata, 4, 0.2, 3, sites=site) == splits.k_fold(
        strata, 4, 0.2, 3, sites=dict(reversed(site.items()))
    )
    # each class at a site of its own: no choice of whole sites has both classes, so patients are drawn as before
    apart = {p: f"{c}{i % 2}" for i, (p, c) in enumerate(sorted(strata.items(), key=lambda kv: (kv[1], kv[0])))}
    made = splits.k_fold(strata, 2, 0.2, 3, sites=apart)
    assert all({strata[p] for p in f.val} == {0, 1} for f in made if {strata[p] for p in f.train} == {0, 1})


def test_sites_that_validation_shares_with_training_are_told() -> None:
    """All patients of one class are of one site: validation cannot have it whole, and training too."""
    strata = {f"p{i}": i % 2 for i in range(24)}
    apart = {p: f"s{int(p[1:]) // 2 % 8}" for p in strata}
    folds = splits.k_fold(strata, 3, 0.25, 1, sites=apart)
    assert splits.shared_sites(folds, apart) == []
    lone = {p: "all" if strata[p] else f"s{int(p[1:]) % 4}" for p in strata}
    folds = splits.k_fold(strata, 2, 0.25, 1, sites=lone)
    (line,) = splits.shared_sites(folds, lone)
    assert "drawn by patient there and shares sites with training" in line


def test_a_few_numbers_leave_a_patient_of_every_stratum_to_validate_on() -> None:
    """Eight patients in two folds: strata of two would leave one each in the training part, none to validate on."""
    values = {f"p{i}": float(i) for i in range(8)}
    strata = splits.number_strata(values, 2)
    assert sorted(strata.values()) == [0] * 4 + [1] * 4
    for fold in splits.k_fold(strata, 2, 0.2, 0):
        assert {strata[p] for p in fold.val} == {0, 1}
        assert {strata[p] for p in fold.train} == {0, 1}
