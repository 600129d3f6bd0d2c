"""Attributes of stores as values: what a stranger's store says in another type is one error naming store and key."""

from __future__ import annotations

from typing import Any

import pytest

from mhim.pipeline.store.attributes import Geometry, MaskPlace, settings_of
from mhim.pipeline.store.layout import StoreError

ATTRS: dict[str, Any] = {
    "slide_mpp": [0.25, 0.26],
    "size_l0": [4000, 3000],
    "bounds_l0": [10, 20, 3000, 2000],
    "tile_l0": [512.0, 492.3],
    "tile_px": 256,
    "mpp": 0.5,
    "mask_px": [100, 80],
    "mask_mpp": [8, 8.2],
    "settings": {"tile.mpp": [0.5]},
}


def test_a_store_tells_where_its_tiles_lie() -> None:
    assert Geometry.of(ATTRS, "a.zarr") == Geometry(
        (0.25, 0.26), (4000, 3000), (10, 20, 3000, 2000), (512.0, 492.3), 256, 0.5
    )
    bare = {k: v for k, v in ATTRS.items() if k != "bounds_l0"}
    assert Geometry.of(bare, "a.zarr").bounds_l0 == (0, 0, 4000, 3000)
    assert MaskPlace.of(ATTRS, "a.zarr") == MaskPlace((100, 80), (8, 8.2))
    assert settings_of(ATTRS, "a.zarr") == {"tile.mpp": [0.5]}
    assert settings_of({}, "a.zarr") == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("slide_mpp", None),
        ("slide_mpp", 0.25),
        ("size_l0", [1]),
        ("tile_l0", ["512", "512"]),
        ("bounds_l0", [True, False, 1, 2]),
        ("tile_px", "256"),
        ("mpp", [0.5]),
        ("mpp", "x" * 1000),
    ],
)
def test_another_type_is_one_short_error(key: str, value: object) -> None:
    with pytest.raises(StoreError, match=f"a.zarr .*: {key} is ") as error:
        Geometry.of(ATTRS | {key: value}, "a.zarr")
    assert len(str(error.value)) < 300
    with pytest.raises(StoreError, match="settings is"):
        settings_of({"settings": [1]}, "a.zarr")
