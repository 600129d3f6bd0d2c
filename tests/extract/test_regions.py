"""QuPath GeoJSON: what is written is read back as the same mask, and the roles of classes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extract import regions


def blobs(seed: int) -> np.ndarray:
    """bool (60, 80): a few random pieces with holes, thicker than a pixel."""
    noise = np.random.default_rng(seed).standard_normal((60, 80)).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 3) > 0.02)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), origin=st.tuples(st.integers(0, 5000), st.integers(0, 5000)))
def test_the_round_trip_gives_the_mask_back(
    seed: int, origin: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    mask = blobs(seed)
    bounds, per_px = (*origin, 80 * 16, 60 * 16), (16.0, 16.0)
    path = tmp_path_factory.mktemp("g") / "t.geojson"
    path.write_text(regions.dumps(regions.tissue_features(mask, bounds, per_px)))
    back = regions.apply(np.zeros_like(mask), regions.read(path, origin), bounds, per_px)
    assert (mask ^ back).sum() <= 0.01 * mask.sum(), "a QuPath file shifts no border"


def test_tiles_carry_their_numbers() -> None:
    features = regions.tile_features(
        np.array([[512, 256], [768, 256]]), (256.5, 256.5), {"tissue": np.array([0.5, 1.0])}, (512, 0)
    )
    parsed = json.loads(regions.dumps(features))["features"]
    assert [f["properties"]["objectType"] for f in parsed] == ["tile", "tile"]
    assert parsed[0]["geometry"]["coordinates"][0][0] == [0, 256]
    assert parsed[0]["geometry"]["coordinates"][0][2] == [256.5, 512.5]
    assert parsed[1]["properties"]["measurements"] == {"tissue": 1.0}
    for f in parsed:
        ring = f["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1], "closed, as GeoJSON demands"


@pytest.mark.parametrize(
    ("name", "role"),
    [("Tissue", "tissue"), ("tissue edited", "tissue"), ("Ignore*", "exclude"), ("Exclude", "exclude"),
     ("Artifact", "exclude"), ("Tumor", "include"), ("", "include")],
)  # fmt: skip
def test_roles(name: str, role: str, tmp_path: Path) -> None:
    polygon = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]}
    properties = {"classification": {"name": name}} if name else {}
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps({"type": "Feature", "geometry": polygon, "properties": properties}))
    assert [r.role for r in regions.read(path)] == [role]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"features": 3}', '{"features": [3]}', '{"features": [{"geometry": null}]}',
     '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[0, 0]]]}}]}',
     '{"features": [{"geometry": {"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 2]]]}}]}',
     '{"features": [{"geometry": {"type": "Circle"}}]}'],
)  # fmt: skip
def test_what_is_no_region_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.geojson"
    path.write_text(text)
    with pytest.raises(regions.BadRegions, match=r"odd\.geojson"):
        regions.read(path)
