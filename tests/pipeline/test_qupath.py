"""Tissue goes out as GeoJSON and comes back through the manifest as the same tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline import store
from tests.extract.slides import tissue_rgb, write_svs


def test_out_and_in_again(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "s").mkdir()
    write_svs(tmp_path / "s" / "a.svs", tissue_rgb())
    first, second = store.Work(tmp_path / "w1"), store.Work(tmp_path / "w2")
    settings = ("--workers", 1, "--tile-px", 64, "--set", "tile.blur_probe_um=0")
    assert cli("tile", tmp_path / "s", "--work", first.root, *settings)[0] == 0
    assert cli("qupath", "--work", first.root)[0] == 0
    written = first.root / "qupath" / "a.svs.geojson"
    features = json.loads(written.read_text())["features"]
    coords = store.read_array(first.tile_store("a.svs"), "coords")
    kinds = [f["properties"]["objectType"] for f in features]
    assert kinds.count("tile") == len(coords) > 20
    assert set(features[-1]["properties"]["measurements"]) == {"tissue", "pen", "fold", "haze", "blur"}

    manifest = tmp_path / "s" / "m.csv"
    manifest.write_text(f"slide,regions\na.svs,{written}\n")
    assert cli("tile", manifest, "--work", second.root, *settings)[0] == 0
    again = store.read_array(second.tile_store("a.svs"), "coords")
    assert np.array_equal(coords, again)


def test_without_tiles_it_says_what_to_do(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    code, said = cli("qupath", "--work", tmp_path)
    assert code == 2
    assert "pipeline tile" in said
