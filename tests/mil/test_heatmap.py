"""Tile scores land where the tile is, whatever the frame; overlaps are averaged; scales say what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhim.mil import heatmap
from mhim.mil.heatmap import Frame


def brute(values, coords, tile, frame):
    """The same by asking each pixel's centre which tiles cover it."""
    w, h = frame.size_px
    out = np.full((h, w), np.nan)
    for y in range(h):
        for x in range(w):
            px = frame.origin_l0[0] + (x + 0.5) * frame.px_l0[0]
            py = frame.origin_l0[1] + (y + 0.5) * frame.px_l0[1]
            inside = (
                (coords[:, 0] <= px) & (px < coords[:, 0] + tile) & (coords[:, 1] <= py) & (py < coords[:, 1] + tile)
            )
            if inside.any():
                out[y, x] = values[inside].mean()
    return out


@given(
    st.integers(1, 20),
    st.integers(5, 60),
    st.integers(0, 500),
    st.integers(0, 500),
    st.sampled_from([3.0, 4.001646, 7.9]),
    st.integers(0, 10_000),
)
def test_raster_equals_asking_every_pixel(n, tile, ox, oy, px_l0, seed):
    rng = np.random.default_rng(seed)
    frame = Frame((ox, oy), (px_l0, px_l0), (23, 17), px_l0 * 0.25)
    coords = np.stack([rng.integers(ox - 20, ox + 120, n), rng.integers(oy - 20, oy + 90, n)], 1)
    values = rng.random(n)
    edge = max(tile, 8)  # at least a pixel, so that no tile is widened
    found = heatmap.raster(values, coords, edge, frame)
    np.testing.assert_allclose(found, brute(values, coords, edge, frame), rtol=1e-5)


@pytest.mark.parametrize(("slide_mpp", "tile_l0"), [(0.25, 512.0), (0.499, 256.513)])
@pytest.mark.parametrize("origin", [(0, 0), (3001, 777)])
@pytest.mark.parametrize("size", [(201, 155), (640, 333)])
def test_a_planted_tile_lights_up_at_its_place(slide_mpp, tile_l0, origin, size):
    """Golden geometry: one hot tile among cold ones, odd image sizes, bounds that do not start at 0, two mpp."""
    image_mpp = 8.03
    px_l0 = image_mpp / slide_mpp
    frame = Frame(origin, (px_l0, px_l0), size, image_mpp)
    columns, rows = int(size[0] * px_l0 // tile_l0), int(size[1] * px_l0 // tile_l0)
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    coords = np.rint(at * tile_l0 + origin).astype(np.int32)
    hot = (columns // 3, rows // 2)
    scores = (at == hot).all(1).astype(float)
    layer = heatmap.draw(scores, coords, tile_l0, frame, how="raw")
    ys, xs = np.nonzero((layer[..., :3] == heatmap.palette()[255]).all(-1) & (layer[..., 3] > 0))
    tile_um = tile_l0 * slide_mpp
    expected = np.array(hot) * tile_um / image_mpp
    assert abs(xs.min() - expected[0]) <= 1
    assert abs(ys.min() - expected[1]) <= 1
    assert abs(xs.max() + 1 - expected[0] - tile_um / image_mpp) <= 1
    assert abs(ys.max() + 1 - expected[1] - tile_um / image_mpp) <= 1


def test_overlapping_tiles_are_averaged():
    frame = Frame((0, 0), (1, 1), (12, 8), 1.0)
    values = heatmap.raster(np.array([1.0, 3.0]), np.array([[0, 0], [4, 0]]), 8, frame)
    assert values[0, 0] == 1
    assert values[0, 5] == 2
    assert values[0, 11] == 3


def test_a_tile_smaller_than_a_pixel_is_seen():
    frame = Frame((0, 0), (100, 100), (5, 5), 25.0)
    values = heatmap.raster(np.array([0.7]), np.array([[210, 310]]), 10, frame)
    assert np.isfinite(values).sum() == 1


def test_where_no_tile_lies_the_layer_is_transparent():
    frame = Frame((0, 0), (1, 1), (10, 10), 1.0)
    layer = heatmap.draw(np.array([1.0]), np.array([[2, 3]]), 4, frame, opacity=0.5)
    assert set(np.unique(layer[..., 3])) == {0, 128}
    picture = np.full((10, 10, 3), 77, np.uint8)
    laid = heatmap.laid_over(picture, layer)
    assert (laid[layer[..., 3] == 0] == 77).all()
    assert (laid[layer[..., 3] > 0] != 77).any()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40))
def test_percentiles_keep_the_order_and_ties_stay_ties(scores):
    s = np.array(scores)
    v = heatmap.scaled(s, "percentile").values
    assert v.min() >= 0
    assert v.max() <= 1
    for i in range(len(s)):
        assert (v[s > s[i]] > v[i]).all()
        assert (v[s == s[i]] == v[i]).all()


def test_signed_scale_keeps_zero_in_the_middle():
    v = heatmap.scaled(np.array([-1.0, 0.0, 4.0]), "raw", signed=True)
    assert v.values[1] == pytest.approx(0.5)
    assert (v.low, v.high) == ("-4", "4")


def test_signed_percentiles_never_change_sides():
    v = heatmap.scaled(np.array([-3.0, -1.0, -2.0, 0.0, 1e-9, 5.0, 5.0]), "percentile", signed=True).values
    np.testing.assert_allclose(v - 0.5, [-3 / 6, -1 / 6, -2 / 6, 0, 1 / 6, 2.5 / 6, 2.5 / 6], atol=1e-6)
    against = heatmap.scaled(np.array([-1.0, -2.0]), "percentile", signed=True).values
    assert (against < 0.5).all()  # nothing here speaks for the class, and no colour says so


def test_a_share_is_drawn_as_it_is():
    assert heatmap.scaled(np.array([0.0, 0.0, 0.25, 1.0]), "share").values.tolist() == [0, 0, 0.25, 1]


@given(st.integers(1, 7), st.integers(1, 6), st.sampled_from([256.0, 256.513]), st.integers(0, 1000))
def test_grids_are_looked_up_with_the_same_result(columns, rows, edge, seed):
    rng = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    at = at[rng.random(len(at)) < 0.8]
    coords = np.rint(at * edge + rng.integers(0, 900, 2)).astype(np.int32)
    values = rng.random(len(at)).astype(np.float32)
    frame = Frame(tuple(rng.integers(0, 500, 2)), (31.7, 32.3), (61, 47), 8.0)
    found = heatmap.raster(values, coords, edge, frame)
    looked_up, heatmap._grid = heatmap._grid, lambda *_: None
    try:
        np.testing.assert_allclose(found, heatmap.raster(values, coords, edge, frame), rtol=1e-6)
    finally:
        heatmap._grid = looked_up


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 2 tile scores"):
        heatmap.scaled(np.array([1.0, np.nan]), "raw")


def test_no_tiles_give_an_empty_layer():
    layer = heatmap.draw(np.zeros(0), np.zeros((0, 2)), 256, Frame((0, 0), (1, 1), (3, 2), 1.0))
    assert layer.shape == (2, 3, 4)
    assert not layer[..., 3].any()


@pytest.mark.parametrize(("width_um", "length"), [(100, 20), (8000, 2000), (39, 5), (4, 1)])
def test_scale_bar_has_a_round_length(width_um, length):
    assert heatmap.nice_length_um(width_um) == length


def test_the_scale_bar_is_as_long_as_it_says():
    picture = np.zeros((50, 1000, 3), np.uint8)
    out = heatmap.legend(picture, 4.0, "attention", "0 %", "100 %")
    bar = (out[50 + 37] == 20).all(-1)
    assert bar.sum() * 4.0 == heatmap.nice_length_um(4000)
