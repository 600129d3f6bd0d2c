"""`score --truth`: maps held against known tiles, numbers counted by hand; wrong files fail their own slide."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mhim.extract.tiles import geojson, regions
from mhim.mil import evidence
from mhim.pipeline.results import tile_truth, truth
from mhim.pipeline.store import layout, reading, seals
from tests.pipeline.bags import make_features, sets, tree, write_labels

Cli = Callable[..., tuple[int, str]]
COORDS = np.array([[100, 50], [356, 50], [612, 50], [100, 306]])


def ring(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float)


def drawn(path: Path, named: list[tuple[str, list[np.ndarray]]], origin: tuple[int, int] = (0, 0)) -> Path:
    path.write_text(geojson.dumps(geojson.region_features(named, origin), say_frame=True))
    return path


def test_shares_of_tiles_in_regions(tmp_path: Path) -> None:
    # all of tile 0 but a quarter that is cut out, half of tile 1, an eighth of tile 3; the frame is shifted
    file = drawn(
        tmp_path / "a.geojson",
        [
            ("Tumor", [ring(100, 50, 484, 306)]),
            ("Exclude", [ring(100, 50, 228, 178)]),
            ("met", [ring(100, 306, 132, 562)]),
            ("Tissue", [ring(0, 0, 9999, 9999)]),
        ],
        (30, 20),
    )
    found = regions.read(file, (30, 20), "full")
    shares = regions.covered(found, COORDS, (256.0, 256.0))
    assert shares.tolist() == pytest.approx([0.75, 0.5, 0, 0.125])
    attrs = {"tile_l0": [256.0, 256.0], "bounds_l0": [30, 20, 900, 900]}
    told = truth.of_tiles(file, COORDS, attrs)
    assert (told.true.tolist(), told.notes) == ([True, True, False, False], ())
    assert [r[0].tolist() for r in told.rings] == [[100, 50], [100, 50], [100, 306]], "all but the tissue"
    none = drawn(tmp_path / "none.geojson", [])
    assert not truth.of_tiles(none, COORDS, attrs).true.any(), "no finding is a truth too"
    only_cut = drawn(tmp_path / "cut.geojson", [("Exclude", [ring(0, 0, 50, 50)])])
    assert not truth.of_tiles(only_cut, COORDS, attrs).true.any()
    cells = {"type": "Feature", "geometry": None, "properties": {"objectType": "cell"}}
    odd = tmp_path / "odd.geojson"
    odd.write_text(json.dumps({"type": "FeatureCollection", "features": [cells]}))
    with pytest.raises(regions.BadRegions, match="no annotation with an area"):
        truth.of_tiles(odd, COORDS, attrs)  # something is there, and it says nothing of findings
    beyond = drawn(tmp_path / "beyond.geojson", [("Tumor", [ring(9000, 9000, 9100, 9100)])])
    with pytest.raises(truth.BadTruth, match=r"beyond.geojson cover none of its tiles \(1 confine it"):
        truth.of_tiles(beyond, COORDS, attrs)
    small = drawn(tmp_path / "small.geojson", [("met", [ring(100, 306, 132, 562)])])
    told = truth.of_tiles(small, COORDS, attrs)
    assert not told.true.any()
    assert "no tile by half, at most by 12%" in told.notes[0]
    bare = json.loads(file.read_text())
    del bare["counted_from"]  # as other programs write it
    file.write_text(json.dumps(bare))
    assert "tile.regions_frame=full" in truth.of_tiles(file, COORDS, attrs).notes[0]


def test_tables_of_tiles(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("x,y,truth\n100,50,1\n356,50,0.5\n612,50,0.49\n100,306,0\n")
    assert truth.of_tiles(file, COORDS, {}).true.tolist() == [True, True, False, False]
    for text, why in (
        ("x,y,truth\n100,50,1\n", "says nothing of 3 of the 4 tiles"),
        ("x,y\n1,2\n", "no columns x, y, truth"),
        ("x,y,truth\n1,2,yes\n", "is no table of tiles"),
        ("x,y,truth\n1,2,3\n", "from 0 to 1"),
        ("x,y,truth\n1,2,1\n1,2,0\n", "1 tiles twice"),
    ):
        file.write_text(text)
        with pytest.raises(truth.BadTruth, match=why):
            truth.of_tiles(file, COORDS, {})


def test_froc_is_counted_inside_each_training() -> None:
    grid = np.array([[0, 0], [2, 0], [4, 0]])
    one = truth.Known("a", np.array([True, False, True]), {"m": np.array([0.9, 0.5, 0.1])}, grid, "fold_0", 3)
    two = truth.Known("b", np.array([False, True, False]), {"m": np.array([30.0, 20.0, 10.0])}, grid, "fold_1", 3)
    found = truth.measured([one, two])["m"]
    # fold_0: of two findings .9 is met at once, .1 once a false tile is allowed; fold_1: its one with one allowed
    first, second = (0.5 + 0.5 + 1 + 1 + 1 + 1) / 6, (0 + 0 + 1 + 1 + 1 + 1) / 6
    assert found["froc"] == pytest.approx((2 * first + second) / 3)
    assert (found["findings"], found["pointing"]) == (3, 0.5)
    assert found["auc"]["mean"] == 0.5


def test_one_slide_has_an_auc_and_no_spread() -> None:
    grid, scores = np.array([[0, 0], [2, 0], [4, 0]]), {"m": np.array([0.9, 0.5, 0.1])}
    found = truth.measured([truth.Known("a", np.array([True, False, True]), scores, grid, "fold_0", 3)])
    assert found["m"]["auc"] == {"mean": 0.5, "sd": None}
    assert truth.rows({"maps": found})[0][2] == "0.500"
    none = truth.Known("b", np.zeros(3, bool), scores, grid, "fold_0", 3)
    assert truth.rows({"maps": truth.measured([none])})[0][2] == "undefined"


@pytest.mark.parametrize("name", ["attention", "contribution_yes"])
def test_attention_is_compared_in_multiples_of_its_bag_s_mean(name: str) -> None:
    grid, true = np.array([[0, 0], [5, 0]]), np.array([True, False])
    one = truth.Known("a", true, {name: np.array([0.4, 0.1])}, grid, "fold_0", 4)  # half of a patient's tiles
    two = truth.Known("b", true, {name: np.array([0.55, 0.45])}, grid, "fold_0", 2)
    # 1.6 and 1.1 times the mean, before any false one with .9; as they are .45 would come before .4
    assert truth.measured([one, two])[name]["froc"] == 1
    plain = [truth.Known(k.slide, true, {"hardness": k.maps[name]}, grid, "fold_0", k.bag_tiles) for k in (one, two)]
    assert truth.measured(plain)["hardness"]["froc"] == pytest.approx((0.5 + 5) / 6)


def test_tiles_have_a_place_of_their_own_wherever_the_grid_begins() -> None:
    coords = np.array([[128 + 256 * k, 384] for k in range(6)], np.int32)
    assert truth.grid_of(coords, {"tile_l0": [256.0, 256.0]}).tolist() == [[k, 0] for k in range(6)]
    assert truth.grid_of(coords[:0], {}).shape == (0, 2)
    halves = truth.grid_of(coords // 2, {"tile_l0": [256.0, 256.0]})  # overlapping by half: two share a place
    true = np.array([True, True, False, False, False, True])
    for order in (np.arange(6), np.arange(6)[::-1]):
        found = evidence.found_in(true[order], halves[order])
        assert (found > 0).tolist() == true[order].tolist()
        assert len(np.unique(found[found > 0])) == 2


def test_score_with_truth(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12))
    small = sets("train.folds=2", "train.epochs=4", 'train.model_params={"width": 8}', "score.bootstrap=0")
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "abmil", *small, "--workers", 1)[0] == 0
    run, folder = work.run("abmil"), tmp_path / "truth"
    score = ("score", "--work", work.root, *sets("score.bootstrap=0", "score.heatmaps=none"), "--workers", 1)
    assert cli(*score, "--truth", folder)[0] == 2, "no such folder"
    folder.mkdir()
    assert cli(*score, "--truth", folder)[0] == 2, "no file fits"
    before = tree(run)
    wanted = []
    for k in range(1, 10, 2):  # the odd ones are positive in their first tiles
        slide = f"s{k:02d}_0.svs"
        coords = np.asarray(reading.read_array(work.feature_store("texture", slide), "coords"))
        true = np.arange(len(coords)) < 1 + len(coords) // 3
        rows = "".join(f"{x},{y},{int(t)}\n" for (x, y), t in zip(coords.tolist(), true, strict=True))
        if k == 1:  # the same by regions
            boxes = [("Fold", [ring(x, y, x + 256, y + 256)]) for x, y in coords[true].tolist()]
            drawn(folder / f"{slide}.geojson", boxes)
        else:
            (folder / f"{slide}.csv").write_text("x,y,truth\n" + rows)
        attention = np.asarray(reading.read_array(run / "scores" / f"{slide}.zarr", "attention"))
        wanted.append(roc_auc_score(true, attention))
    none = drawn(folder / "s00_0.svs.geojson", [])
    (folder / "s00_0.svs.geojson.gz").write_bytes(gzip.compress(none.read_bytes()))  # as QuPath exports it too
    none.unlink()
    (folder / "more").mkdir()
    drawn(folder / "more" / "s03_0.svs.geojson", [])  # one too many folders
    code, text = cli(*score, "--truth", folder)
    assert code == 0, text
    assert "truth not used, called as no slide of abmil: more/s03_0.svs.geojson" in " ".join(text.split())
    assert "truth of s01_0.svs: regions of class Fold confine" in " ".join(text.split())
    found = json.loads((run / "truth.json").read_text())
    assert (found["slides"], found["with_findings"], found["without_truth"]) == (6, 5, 6)
    assert found["maps"]["attention"]["auc"]["mean"] == pytest.approx(np.mean(wanted))
    assert "probability_yes" in found["maps"]
    assert {k: v for k, v in tree(run).items() if k in before and not k.endswith(".jsonl")} == {
        k: v for k, v in before.items() if not k.endswith(".jsonl")
    }
    marks = {s: seals.look(run / "scores" / f"{s}.zarr").fingerprint for s in ("s00_0.svs", "s01_0.svs", "s03_0.svs")}
    kept = {s: tile_truth.read(run, s, mark) for s, mark in marks.items()}
    assert [len(one.told.rings) for one in kept.values()] == [0, 1 + len(coords) // 3, 0]
    assert kept["s01_0.svs"].told.true.sum() == 1 + len(coords) // 3
    assert kept["s01_0.svs"].file == "s01_0.svs.geojson"
    assert tile_truth.read(run, "s01_0.svs", "other") is None, "the truth of other tiles"
    assert tile_truth.read(run, "s02_0.svs", "") is None, "of this slide nothing is told"
    (folder / "s03_0.svs.csv").write_text("x,y\n")
    (folder / "s05_0.svs.geojson").write_text("{}")
    code, text = cli(*score, "--truth", folder)
    assert code == 1
    assert json.loads((run / "truth.json").read_text())["slides"] == 4
    assert tile_truth.read(run, "s03_0.svs", marks["s03_0.svs"]) is None, "its truth cannot be read any more"
    assert "s05_0.svs.geojson and s05_0.svs.csv both tell of it" in " ".join(text.split())
    assert cli("report", "--work", work.root)[0] == 0
    assert "Do the maps point at the truth?" in (run / "report.html").read_text()
    whole = tmp_path / "whole"  # more is told than of the slides of this run: none was meant for one of them
    whole.mkdir()
    for k in range(12):
        drawn(whole / f"s{k:02d}_0.svs.geojson", [])
    drawn(whole / "of_another_run.svs.geojson", [])
    code, text = cli(*score, "--truth", whole)
    assert code == 0, text
    assert "called as no slide" not in text
    (run / "scores" / "s01_0.svs.zarr").rename(tmp_path / "away")
    assert truth.read(run) == {}, "of other scores"
    assert cli("report", "--work", work.root)[0] == 0
    assert "Not shown: truth.json (of other scores than there are now)" in (run / "report.html").read_text()
