"""Bags of the same kind are near, strange ones far, whatever the number of tiles or features."""

import numpy as np
import pytest

from mhim.mil import novelty


def bags(n, seed=0, width=40, shift=0.0, tiles=(1, 900)):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n, width))  # patients differ
    return [(c + shift + rng.normal(size=(rng.integers(*tiles), width))).astype(np.float16) for c in centres]


def test_the_same_kind_is_about_one_away_and_another_kind_far():
    known = novelty.profile(bags(40))
    near = [known.distance(x) for x in bags(30, 1)]
    assert 0.5 < np.median(near) < 1.5
    far = novelty.limit(near)
    assert max(near) < far
    assert all(known.distance(x) > far for x in bags(30, 2, shift=5.0))
    assert not any(known.distance(x) > far for x in bags(30, 3, tiles=(600, 5000)))


def test_a_feature_that_never_varied_does_not_decide_alone():
    known = bags(20)
    for x in known:
        x[:, 0] = 3.0
    other = bags(1, 5)[0]
    other[:, 0] = 3.1
    assert novelty.profile(known).distance(other) < 3


def test_what_cannot_be_told_is_not_told():
    assert novelty.profile(bags(3)) is None
    empty = np.zeros((0, 40), np.float16)
    assert novelty.profile([empty] * 9) is None
    known = novelty.profile([*bags(9), empty])
    assert np.isnan(known.distance(empty))
    assert novelty.limit([np.nan]) is None
    assert novelty.limit([]) is None
    assert novelty.limit([0.0, 0.0]) is None  # features that never vary: nothing to divide by
    assert novelty.limit([np.nan, 1.5]) == pytest.approx(novelty.BEYOND * 1.5)
