"""Maps of the cohort by the library: made and read as by the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mhim.configs.errors import UserError
from mhim.pipeline import Work
from mhim.pipeline.api import Map
from mhim.pipeline.pictures import scatter
from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, write_labels

SETTINGS = {"map.method": "pca", "map.clusters": 2, "map.gallery": 0}


def test_a_map_is_made_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "save", lambda path, points: path.write_bytes(b"a picture"))
    paths = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(paths, 4, slides_each=2))
    work = Work(paths.root)
    with pytest.raises(UserError, match=r"no single map in .*; `make_map` or `pipeline map` makes one"):
        work.map()
    made: Map = work.make_map(labels, settings=SETTINGS)
    assert (made.name, work.maps) == ("texture", ["texture"])
    assert {k: v.dtype.kind for k, v in made.tiles.items()} == {
        "slide": "U", "tile": "i", "x_l0": "i", "y_l0": "i", "pca_1": "f", "pca_2": "f", "cluster": "i",
    }  # fmt: skip
    own = made.tiles["slide"] == "s01_1.svs"
    np.testing.assert_array_equal(made.tiles["tile"][own], np.arange(own.sum()))
    coords = work.slide("s01_1.svs").bag().coords
    assert coords is not None
    np.testing.assert_array_equal(made.tiles["x_l0"][own], coords[:, 0])
    assert [(p["patient"], p["slides"], p["by_label"]) for p in made.patients[:2]] == [
        ("p00", "s00_0.svs;s00_1.svs", "no"),
        ("p01", "s01_0.svs;s01_1.svs", "yes"),
    ]
    assert work.map("texture").clusters == made.clusters
    with pytest.raises(UserError, match=r"no map 'other' in .*; there is: texture"):
        work.map("other")
    (paths.feature_store("texture", "s00_0.svs") / "features/c/0/0").write_bytes(b"short")
    with pytest.raises(UserError, match="the map texture lacks slides"):
        work.make_map(labels, settings=SETTINGS)
    assert "s00_0.svs" not in {row["slide"] for row in work.map().slides}
