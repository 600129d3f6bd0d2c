"""Tissue goes out as GeoJSON and comes back through the manifest as the same tiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mhim.pipeline.store import layout, reading
from tests.extract.slides import tissue_rgb, write_svs


def test_out_and_in_again(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "s").mkdir()
    write_svs(tmp_path / "s" / "a.svs", tissue_rgb())
    first, second = layout.Work(tmp_path / "w1"), layout.Work(tmp_path / "w2")
    settings = ("--workers", 1, "--tile-px", 64, "--set", "tile.blur_probe_um=0")
    assert cli("tile", tmp_path / "s", "--work", first.root, *settings)[0] == 0
    assert cli("qupath", "--work", first.root)[0] == 0
    written = first.root / "qupath" / "a.svs.geojson"
    features = json.loads(written.read_text())["features"]
    coords = reading.read_array(first.tile_store("a.svs"), "coords")
    kinds = [f["properties"]["objectType"] for f in features]
    assert kinds.count("tile") == len(coords) > 20
    assert set(features[-1]["properties"]["measurements"]) == {"tissue", "pen", "fold", "haze", "blur"}

    manifest = tmp_path / "s" / "m.csv"
    manifest.write_text(f"slide,regions\na.svs,{written}\n")
    assert cli("tile", manifest, "--work", second.root, *settings)[0] == 0
    again = reading.read_array(second.tile_store("a.svs"), "coords")
    assert np.array_equal(coords, again)


def test_without_tiles_it_says_what_to_do(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    code, said = cli("qupath", "--work", tmp_path)
    assert code == 2
    assert "pipeline tile" in said


def test_the_corner_that_regions_count_from_enters_only_where_it_matters(
    tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "s").mkdir()
    for name in ("a", "b"):
        write_svs(tmp_path / "s" / f"{name}.svs", tissue_rgb())
    ring = [[256, 256], [1280, 256], [1280, 768], [256, 768], [256, 256]]
    region = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "s" / "r.geojson").write_text(json.dumps(region))
    manifest = tmp_path / "s" / "m.csv"
    manifest.write_text("slide,regions\na.svs,r.geojson\nb.svs,\n")
    work = layout.Work(tmp_path / "w")
    settings = ("--work", work.root, "--workers", 1, "--tile-px", 64, "--set", "tile.blur_probe_um=0")
    assert cli("tile", manifest, *settings)[0] == 0
    assert not any("regions_frame" in k for k in reading.read_attrs(work.tile_store("a.svs"))["settings"])
    code, said = cli("tile", manifest, *settings, "--set", "tile.regions_frame=full")
    assert code == 3
    assert "a.svs: input.regions_frame" in said
    assert "b.svs" not in said


def test_regions_that_cannot_be_read_fail_their_slide_only(tmp_path: Path, cli: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "s").mkdir()
    for name in ("a", "b", "c"):
        write_svs(tmp_path / "s" / f"{name}.svs", tissue_rgb(512, 512))
    (tmp_path / "s" / "r.geojson").mkdir()
    manifest = tmp_path / "s" / "m.csv"
    manifest.write_text(f"slide,regions\na.svs,r.geojson\nb.svs,{'x' * 300}.geojson\nc.svs,\n")
    code, said = cli("tile", manifest, "--work", tmp_path / "w", "--workers", 1, "--tile-px", 64)
    assert code == 1, said
    assert reading.stored(layout.Work(tmp_path / "w").tile_store("c.svs"))
    assert "tile: 1 done, 2 failed" in said
