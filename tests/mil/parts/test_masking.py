"""Masks: the counts, the cap, what stays, for any size; and fixed shapes say the same as exact ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.mil.parts import masking

sizes = st.integers(1, 60)
ratios = st.floats(0, 0.99)
seeds = st.integers(0, 1000)


def drawn(n, seed):
    torch.manual_seed(seed)
    score, share, noise, attention = torch.rand(n), torch.rand(n), torch.rand(2, n), torch.rand(n)
    return score, share / share.sum(), noise, attention


@settings(max_examples=150)
@given(
    sizes, ratios, ratios, ratios, st.floats(0.05, 1.0), st.floats(0.01, 1.0), st.sampled_from(["ceil", "floor"]), seeds
)
def test_at_least_one_instance_stays_whatever_is_asked(n, high, low, random, part, cap, rounding, seed):
    score, share, noise, attention = drawn(n, seed)
    removed = masking.remove(score, share, high, low, random, part, cap, rounding, noise, attention)
    number = int(removed.flags.sum())
    assert removed.low == removed.high == number  # on a CPU the number is known
    assert number <= n - 1


@settings(max_examples=150)
@given(st.integers(2, 80), st.floats(0.01, 0.99), st.floats(0.02, 0.98), seeds)
def test_the_cap_stops_at_the_first_that_would_break_it(n, ratio, cap, seed):
    score, share, _, _ = drawn(n, seed)
    flags = masking.remove(score, share, ratio, share_max=cap).flags
    most = min(math.ceil(round(ratio * n, 9)), n - 1)
    order = score.argsort(descending=True)
    taken = int(flags.sum())
    assert set(flags.nonzero()[:, 0].tolist()) == set(order[:taken].tolist())
    assert share[flags].sum() <= cap + 1e-6
    if taken < most:
        assert share[order[: taken + 1]].sum() > cap - 1e-6


def test_a_single_dominant_instance_is_never_taken_under_a_cap():
    share = torch.full((100,), 0.5 / 99)
    share[40] = 0.5
    assert not masking.remove(share, share, 0.05, share_max=0.1).flags.any()
    assert masking.remove(share, share, 0.05).flags[40]


def test_high_low_and_random_do_not_overlap():
    score, share, noise, _ = drawn(100, 1)
    removed = masking.remove(score, share, 0.05, 0.2, 0.3, noise=noise, attention=score)
    assert int(removed.flags.sum()) == 5 + 20 + 30
    order = score.argsort()
    assert removed.flags[order[:20]].all()
    assert removed.flags[order[-5:]].all()


def test_what_random_masks_need_is_asked_for():
    score, share, _, _ = drawn(10, 1)
    with pytest.raises(ValueError, match="needs noise"):
        masking.remove(score, share, 0.0, ratio_random=0.5)
    with pytest.raises(ValueError, match="needs noise"):
        masking.remove(score, share, 0.2, random_share=0.5)


@settings(max_examples=150)
@given(sizes, st.floats(0, 1), st.integers(0, 3), st.booleans(), seeds)
def test_split_parts_what_is_left(n, keep, fewest, in_order, seed):
    score, share, noise, _ = drawn(n, seed)
    removed = masking.remove(score, share, 0.1)
    found = masking.split(removed, keep, noise[0], in_order, fewest)
    left = n - removed.high
    assert sorted(found.kept.tolist() + found.merged.tolist()) == (~removed.flags).nonzero()[:, 0].tolist()
    assert len(found.kept) == min(left, max(fewest, math.floor(round(keep * left, 9))))
    if in_order:
        assert found.kept.tolist() == sorted(found.kept.tolist())
    else:
        assert (noise[0][found.kept].diff() >= 0).all()
        if len(found.kept) and len(found.merged):
            assert noise[0][found.kept].max() <= noise[0][found.merged].min()


@settings(max_examples=150)
@given(st.integers(2, 60), st.floats(0, 1), st.integers(0, 20), st.integers(0, 20), st.booleans(), seeds)
def test_fixed_shapes_hold_the_same_instances(n, keep, below, above, in_order, seed):
    """With bounds around the number removed, as on a GPU, the entries that count are those of exact shapes."""
    score, share, noise, _ = drawn(n, seed)
    exact = masking.remove(score, share, 0.2)
    loose = masking.Removed(exact.flags, max(0, exact.low - below), min(n - 1, exact.high + above))
    one = masking.split(exact, keep, noise[0], in_order, 1)
    two = masking.split(loose, keep, noise[0], in_order, 1)
    for ours, counts, want in ((two.kept, two.kept_counts, one.kept), (two.merged, two.merged_counts, one.merged)):
        assert (ours if counts is None else ours[counts]).tolist() == want.tolist()


def test_votes_count_the_heads():
    attention = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.8, 0.1, 0.6, 0.0], [0.0, 0.7, 0.6, 0.1]])
    assert masking.votes(attention, 2).floor().tolist() == [2.0, 2.0, 2.0, 0.0]
    assert masking.votes(attention, 2).argsort(descending=True).tolist()[0] == 0  # the largest mean of the equal ones


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_cosine_runs_from_base_to_final(base, final):
    assert masking.cosine(base, final, 0.0) == pytest.approx(base)
    assert masking.cosine(base, final, 1.0) == pytest.approx(final, abs=1e-12)
    assert masking.cosine(base, final, 0.5) == pytest.approx((base + final) / 2)


def test_products_that_are_whole_numbers_are_not_rounded_up():
    assert masking.count(1000, 0.03) == 30
    assert masking.count(300, 0.07) == 21  # 300 * 0.07 is 21.000000000000004
    assert masking.count(301, 0.03) == 10
    assert masking.count(301, 0.03, "floor") == 9
