"""Ranks over sets, against worked examples."""

from __future__ import annotations

import numpy as np
import pytest

from mhim.mil import ranks


def test_ranks_are_from_the_best_down_with_ties_at_their_mean_and_the_undefined_last() -> None:
    values = np.array([[0.9, 0.7, 0.9, np.nan], [0.1, 0.2, 0.3, 0.4]])
    assert ranks.ranks(values).tolist() == [[1.5, 3.0, 1.5, 4.0], [4.0, 3.0, 2.0, 1.0]]


def test_the_critical_difference_is_that_of_the_published_tables() -> None:
    # Demšar 2006, section 3.2.4: 4 classifiers on 14 sets, alpha .05, q = 2.569: CD = 1.25; table 5(a) for 10 models
    assert ranks.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert ranks.critical_difference(10, 1) == pytest.approx(3.164 * np.sqrt(110 / 6), abs=0.01)


def test_friedman_tells_models_apart_or_not() -> None:
    same = np.tile([0.9, 0.8, 0.7], (8, 1))
    assert ranks.friedman(same) < 0.001
    turning = np.array([np.roll([0.9, 0.8, 0.7], k) for k in range(9)])
    assert ranks.friedman(turning) == pytest.approx(1.0)
    assert np.isnan(ranks.friedman(same[:1]))
    assert np.isnan(ranks.friedman(np.ones((5, 3))))
