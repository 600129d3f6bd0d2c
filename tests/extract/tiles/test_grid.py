"""The grid's arithmetic against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.extract.tiles.grid import Grid, box_means, positions


@given(st.integers(0, 500), st.integers(1, 20000), st.floats(10, 700), st.floats(0.3, 1))
def test_tiles_lie_inside_and_nothing_that_fits_is_left_out(start: int, extent: int, tile: float, part: float) -> None:
    step = tile * part
    at = positions(start, extent, tile, step)
    assert np.all(at >= start)
    assert np.all(at + tile <= start + extent + 1.01)
    assert np.all(np.abs(np.diff(at) - step) <= 1)
    if len(at):
        assert abs(at[-1] - start - step * (len(at) - 1)) <= 0.5, "rounding must not add up"
        assert start + step * len(at) + tile > start + extent + 0.49, "one more would stick out"
    else:
        assert tile > extent


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.7, 9.3), st.floats(0.7, 9.3))
def test_box_means_are_the_area_weighted_means(seed: int, w: float, h: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(2, 20), rng.integers(2, 20))) > 0.5
    x, y = np.sort(rng.uniform(-3, mask.shape[1], 4)), np.sort(rng.uniform(-3, mask.shape[0], 3))
    got = box_means(mask, x, y, (w, h))

    def overlap(a: float, b: float, n: int) -> np.ndarray:
        k = np.arange(n)
        return np.clip(np.minimum(b, k + 1) - np.maximum(a, k), 0, None)

    for i, top in enumerate(y):
        for j, left in enumerate(x):
            weight = np.outer(overlap(top, top + h, mask.shape[0]), overlap(left, left + w, mask.shape[1]))
            assert got[i, j] == pytest.approx((weight * mask).sum() / (w * h), abs=1e-5)


def test_box_means_do_not_depend_on_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(1).random((700, 90)) > 0.5
    x, y = np.arange(0, 80, 7.3), np.arange(0, 690, 11.1)
    one = box_means(mask, x, y, (9.1, 10.7))
    monkeypatch.setattr("mhim.extract.tiles.grid._BAND_ROWS", 13)
    assert np.array_equal(one, box_means(mask, x, y, (9.1, 10.7)))


@pytest.mark.parametrize("slide_mpp", [0.25, 0.265, 0.4990, 0.2277])
def test_a_tile_is_as_many_µm_on_any_slide(slide_mpp: float) -> None:
    grid = Grid((0, 0, 100_000, 80_000), (slide_mpp, slide_mpp), 256)
    w, _ = grid.tile_l0(0.5)
    assert w * slide_mpp == pytest.approx(128.0)
    x, _ = grid.axes(0.5)
    assert x[-1] * slide_mpp == pytest.approx(128.0 * (len(x) - 1), abs=slide_mpp)


def test_parents_hold_their_children() -> None:
    grid = Grid((100, 200, 9_000, 7_000), (0.25, 0.25), 256)
    fine, coarse = (np.array([(x, y) for y in ys for x in xs]) for xs, ys in (grid.axes(0.5), grid.axes(2.0)))
    kept = coarse[::2]
    parent = grid.parents(fine, 0.5, kept, 2.0)
    assert parent.max() < len(kept)
    centre = fine + 256
    held = parent >= 0
    inside = (centre[held] >= kept[parent[held]]) & (centre[held] < kept[parent[held]] + 2048)
    assert inside.all()
    for c, orphan in zip(centre[~held], fine[~held], strict=True):
        assert not ((c >= kept) & (c < kept + 2048)).all(axis=1).any(), f"{orphan} has a parent"
    assert np.bincount(parent[held]).max() == 16


def test_overlap_moves_the_tiles_closer() -> None:
    plain, closer = Grid((0, 0, 10_000, 10_000), (0.5, 0.5), 256), Grid((0, 0, 10_000, 10_000), (0.5, 0.5), 256, 64.0)
    assert np.diff(plain.axes(0.5)[0]).tolist() == [256] * 38
    assert set(np.diff(closer.axes(0.5)[0]).tolist()) == {128}
