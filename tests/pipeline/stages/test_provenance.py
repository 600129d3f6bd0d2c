"""A run tells how its slides were made from their own records, and new slides are made exactly so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import yaml

from mhim.pipeline.cohort import provenance
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.training import bundle
from tests.pipeline.bags import make_features, sets, tree, write_labels

Cli = Callable[..., tuple[int, str]]
QUICK = [
    *sets("train.folds=2", "train.val_fraction=0.4", "train.epochs=2", "train.lr=0.01", "score.bootstrap=20"),
    "--workers",
    "1",
]
TILED = ["--mpp", "1", "--tile-px", "128", "--set", "tile.min_tissue=0.6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path) -> Path:
    """A work folder whose slides were tiled with other settings than the commands after `tile` were told."""
    from mhim.pipeline.cli.main import _main

    work = tmp_path_factory.mktemp("made") / "work"
    shared = ["--work", str(work), *QUICK]
    assert _main(["tile", str(demo_cohort / "slides"), *shared, *TILED]) == 1
    assert _main(["extract", *shared]) == 0
    assert _main(["train", *shared, "--labels", str(demo_cohort / "labels.csv"), "--model", "abmil"]) == 0
    assert _main(["score", *shared, "--name", "abmil", "--heatmaps", "none"]) == 0  # no test here looks at pictures
    return work


def test_the_run_records_what_its_features_were_made_with(made: Path) -> None:
    run = layout.Work(made).run("abmil")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["tile"]["mpp"], settings["tile"]["tile_px"], settings["tile"]["min_tissue"]) == ([1.0], 128, 0.6)
    assert settings["extract"]["encoder"] == "texture"
    card = json.loads((bundle.find(run)[0] / bundle.CARD).read_text())
    assert card["made"]["tile.min_tissue"] == 0.6
    assert card["made"]["encoder.weights_id"] == card["features"]["weights_id"]


def test_new_slides_are_made_as_the_run_s_were(made: Path, demo_cohort: Path, cli: Cli, tmp_path: Path) -> None:
    slide = sorted((demo_cohort / "slides").glob("case_*.svs"))[0]
    shutil.copy(slide, tmp_path / "stranger.svs")
    work = layout.Work(made)
    code, text = cli(
        "score",
        tmp_path / "stranger.svs",
        "--work",
        made,
        "--name",
        "abmil",
        *QUICK,
        "--set",
        "tile.min_tissue=0.95",
        "--heatmaps",
        "none",
    )
    assert code == 0, text
    assert "tile.min_tissue=0.95 is not used" in " ".join(text.split())
    new = layout.Work(work.run("abmil") / "new" / "stranger")
    theirs, ours = (reading.read_attrs(w.tile_store(name)) for w, name in ((work, slide.name), (new, "stranger.svs")))
    assert provenance.tiling_of(theirs, Path("theirs")) == provenance.tiling_of(ours, Path("ours"))
    for array in ("features", "coords"):
        assert (
            reading.read_array(work.feature_store("texture", slide.name), array)
            == reading.read_array(new.feature_store("texture", "stranger.svs"), array)
        ).all()


def test_weights_that_differ_are_refused_before_work() -> None:
    made = {"tile.mpp": [0.5], "encoder.weights_id": "abc", "tile.overlay": True}
    with pytest.raises(provenance.CohortError, match=r"encoder\.weights_id was 'abc', would be 'xyz'"):
        provenance.demand_same(made, {"tile.mpp": [0.5], "encoder.weights_id": "xyz"}, "run")
    provenance.demand_same(made, {**made, "tile.overlay": False, "extract.dtype": "float16"}, "run")


def test_parameters_of_another_segmenter_are_not_told_one_by_one() -> None:
    made = {"tile.segmenter": "stain", "tile.segmenter_defaults": {"dark_od": 0.35}}
    (line,) = provenance.differences(made, {"tile.segmenter": "otsu", "tile.segmenter_defaults": {}}, "r")
    assert line == "these features were made with tile.segmenter 'otsu', those of r with 'stain'"
    assert len(provenance.differences(made, {**made, "tile.segmenter_defaults": {"dark_od": 0.4}}, "r")) == 1


def test_slides_made_with_several_settings_are_told_and_not_recorded_as_one() -> None:
    common, lines = provenance.shared(
        {
            "a": {"tile.mpp": [0.5], "tile.min_tissue": 0.3},
            "b": {"tile.mpp": [0.5], "tile.min_tissue": 0.9},
            "c": {"tile.mpp": [0.5]},
        }
    )
    assert common == {"tile.mpp": [0.5]}
    assert lines == [
        "the slides were made with several settings: tile.min_tissue is 0.3 (1 slides), 0.9 (1 slides), "
        "unknown (1 slides)"
    ]


def test_features_that_tell_nothing_get_no_settings_made_up(tmp_path: Path, cli: Cli) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12))
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "mean", *QUICK)[0] == 0
    settings = yaml.safe_load((work.run("mean") / "config.yaml").read_text())
    assert "tile" not in settings
    assert settings["extract"] == {"encoder": "texture"}


def test_features_made_otherwise_than_the_run_s_are_told(tmp_path: Path, cli: Cli) -> None:
    def record(min_tissue: float, overlay: bool) -> dict[str, object]:
        return {
            provenance.TILING: {"tile.mpp": [0.5], "tile.min_tissue": min_tissue, "tile.overlay": overlay},
            "settings": {"extract.precision": "auto", "encoder.precision": "float32"},
        }

    work, other = layout.Work(tmp_path / "work"), layout.Work(tmp_path / "other")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12, **record(0.3, True)))
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "mean", *QUICK)[0] == 0
    theirs = write_labels(tmp_path / "theirs.csv", make_features(other, 6, seed=3, prefix="x", **record(0.9, False)))
    shared = ["score", "--work", work.root, "--name", "mean", "--heatmaps", "none", *QUICK]
    code, text = cli(*shared, "--features", other.features("texture"), "--labels", theirs)
    assert code == 0, text
    told = "these features were made with tile.min_tissue 0.9, those of mean with 0.3"
    assert told in " ".join(text.split())
    assert "overlay" not in text
    found = json.loads((work.run("mean") / "new" / "texture" / "metrics.json").read_text())
    assert found["warnings"][0] == told
    assert "were made with" not in cli(*shared, "--features", work.features("texture"), "--as", "own")[1]


def test_a_run_of_the_first_version_is_read_from_its_settings_and_corrected_by_its_models() -> None:
    facts = {"encoder": "texture", "mpp": 0.35, "tile_px": 128, "weights_id": "w"}
    config = {"tile": {"mpp": [0.5], "tile_px": 256, "min_tissue": 0.4}, "extract": {"encoder": "texture"}}
    assert provenance.of_run(None, facts, config) == {
        "tile.mpp": [0.35],
        "tile.tile_px": 128,
        "tile.min_tissue": 0.4,
        "extract.encoder": "texture",
    }


def test_settings_that_contradict_the_models_are_refused(made: Path, cli: Cli, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(made, work)
    file = layout.Work(work).run("abmil") / "config.yaml"
    file.write_text(file.read_text().replace("min_tissue: 0.6", "min_tissue: 0.1"))
    code, text = cli("score", tmp_path, "--work", work, "--name", "abmil", *QUICK)
    assert code == 2
    assert "says tile.min_tissue=0.1" in text
    assert "made with 0.6" in " ".join(text.split())


def test_a_run_on_imported_features_says_how_new_slides_can_be_scored(tmp_path: Path, cli: Cli) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12))
    assert cli("train", "--work", work.root, "--labels", labels, "--model", "mean", *QUICK)[0] == 0
    code, text = cli("score", tmp_path, "--work", work.root, "--name", "mean", *QUICK)
    assert code == 2
    assert "--features" in text


def test_the_report_s_commands_do_it_again(
    made: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that the report prints, run as printed but for the folder, give the same bytes."""
    assert cli("report", "--work", made, "--name", "abmil")[0] == 0
    html = (layout.Work(made).run("abmil") / "report.html").read_text()
    block = re.search(r"Do it again</h2>.*?<pre[^>]*>(.*?)</pre>", html, re.S)
    assert block
    monkeypatch.chdir(tmp_path)
    commands = [line for line in unescape(block.group(1)).splitlines() if line.startswith("pipeline ")]
    assert len(commands) >= 4
    for line in commands:
        code, text = cli(*shlex.split(line)[1:])
        assert code == (1 if " tile " in line else 0), text  # the cohort's broken slides fail again
    before, after = (tree(layout.Work(w).run("abmil")) for w in (made, tmp_path / "again"))
    files = ("config.yaml", "splits.csv", "patients.csv", "predictions.csv", "metrics.json")
    same = [name for name in before if name.startswith("fold_") or name in files]
    assert len(same) > 8
    assert [name for name in same if before[name] != after.get(name)] == []


@pytest.mark.parametrize("damaged", [False, True])
def test_tiles_beside_features_of_the_first_version_tell_unless_they_are_damaged(tmp_path: Path, damaged: bool) -> None:
    work = layout.Work(tmp_path)
    path = work.feature_store("texture", "a.svs")
    made = {"extract.encoder": "texture"}
    writing.StoreWriter(path, {"settings": {**made, "input.tiles": "f1"}})
    tiles = work.tile_store("a.svs")
    writing.StoreWriter(tiles, {"fingerprint": "f1", "settings": {"tile.mpp": [1.0]}})
    if damaged:
        (tiles / "zarr.json").write_text("{")
    told = {} if damaged else {"tile.mpp": [1.0]}
    assert provenance.of_features("a.svs", path, work.features("texture")) == made | told
