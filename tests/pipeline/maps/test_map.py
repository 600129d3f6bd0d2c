"""`pipeline map` as a user gives it: what it leaves, what it tells, and what happens when it is damaged or stopped."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.maps import embedding, stored
from mhim.pipeline.pictures import cohort_map, report, scatter
from mhim.pipeline.pictures.parts import Parts
from mhim.pipeline.stages import map_gallery
from mhim.pipeline.store import layout, may_differ, pages, reading
from mhim.pipeline.store.layout import StoreError
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]
SMALL = ("--method", "pca", "--clusters", "2", "--set", "cluster.workers=1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a map's pictures one is drawn, and slides are opened in this process: these take longer than all else."""
    monkeypatch.setattr(map_gallery.Cut, "untrusted", False)
    draw = scatter.save

    def save(path: Path, points: scatter.Points) -> None:
        if path.name == "tiles_pca_label.png":
            draw(path, points)
        else:
            path.write_bytes(b"a picture")

    monkeypatch.setattr(scatter, "save", save)


@pytest.fixture
def work(tiled_cohort: Path, demo_cohort: Path, tmp_path: Path) -> Path:
    """Three slides with features, two of one class and one of the other."""
    work = Path(shutil.copytree(tiled_cohort, tmp_path / "work"))
    with open(demo_cohort / "labels.csv", newline="") as file:
        label_of = {row["slide"]: row["label"] for row in csv.DictReader(file)}
    stores = {path: label_of[path.name.removesuffix(".zarr")] for path in sorted(work.glob("features/texture/*.zarr"))}
    first = [path for path, label in stores.items() if label == min(stores.values())]
    other = [path for path, label in stores.items() if label != min(stores.values())]
    for path in stores.keys() - {*first[:2], other[0]}:
        shutil.rmtree(path)
    return work


def test_map_is_made_resumed_verified_and_tells_a_damaged_slide(cli: Cli, work: Path, demo_cohort: Path) -> None:
    given = ["map", "--work", work, "--labels", demo_cohort / "labels.csv", *SMALL, "--gallery", 1, "--tiles", 50]
    code, told = cli(*given, "--set", "map.seed=5")
    assert code == 0, told
    made = stored.read(work / "maps" / "texture")
    card, tiles = made.card, made.tiles
    assert card["slides"] == len(made.slides) == 3
    assert np.bincount(tiles["slide"]).max() == 50 // 3
    assert card["methods"]["tiles"] == ["pca"]
    of = {row["slide"]: row for row in made.slides}
    for name, row in of.items():
        coords = reading.read_array(layout.Work(work).feature_store("texture", name), "coords")
        own = tiles["slide"] == list(of).index(name)
        assert np.array_equal(coords[tiles["tile"][own].astype(int)][:, 0], tiles["x_l0"][own])
        assert int(row["tiles"]) == len(coords)
    shares = [r for r in made.rows("clusters") if not r["class"]]
    assert sum(float(r["share"]) for r in shares) == pytest.approx(1)
    patients = {r["patient"] for r in made.slides}
    assert {r["patients"] for r in shares} == {str(len(patients))}
    assert {r["of"] for r in made.rows("prototypes")} == {"cluster", "label"}
    crops = [made.folder / "gallery" / r["slide"] / f"{r['tile']}.jpg" for r in made.rows("prototypes")]
    assert min(crop.stat().st_size for crop in crops) > 500
    assert (made.folder / "tiles_pca_label.png").read_bytes().startswith(b"\x89PNG")
    there = {p.name for p in made.folder.iterdir()}
    assert {"tiles_pca_cluster.png", "patients_pca_label.png"} <= there
    assert not any("_umap" in name for name in there)
    assert list(card["versions"]) == ["mhim-pipeline", "numpy", "scikit-learn"]
    parts = Parts()
    here = layout.Work(work)
    (shown,), more = cohort_map.sections(here, here.run("run"), {"encoder": "texture"}, parts)
    titles = [title for title, _ in shown["pictures"]]
    assert titles[:3] == [f"tiles, PCA, by {name}" for name in ("cluster", "slide", "label")]
    assert [len(g["tiles"]) for g in shown["gallery"]][:2] == [1, 1]
    assert cohort_map.sections(here, here.run("run"), {"encoder": "other"}, parts) == ([], [])
    assert cohort_map.sections(here, here.run("run"), card["features"] | {"mpp": 9.0}, parts) == ([], [])
    assert more == []
    with pytest.MonkeyPatch.context() as small:
        small.setattr(cohort_map, "MOST", 0)
        assert cohort_map.sections(here, here.run("run"), {"encoder": "texture"}, parts) == ([], ["texture"])
    text = pages.page(report.ASSETS / "map.html", cohort_maps=[shown], more_maps=["third"])
    assert "Not shown here: third" in text
    assert text.count("<img") == len(shown["pictures"]) + sum(len(g["tiles"]) for g in shown["gallery"])
    kept = crops[0].read_bytes()
    crops[0].write_bytes(b"no picture")
    ((shown,), _) = cohort_map.sections(here, here.run("run"), {"encoder": "texture"}, parts)  # and the report goes on
    assert f"{crops[0].name} is damaged" in parts.wrong[0]
    tiles = [told for group in shown["gallery"] for told, _ in group["tiles"]]
    lost = [r for r, crop in zip(made.rows("prototypes"), crops, strict=True) if crop == crops[0]]
    assert len(tiles) == len(crops) - len(lost) > 0, "the rest of the map is shown"
    crops[0].write_bytes(kept)

    before = may_differ.results(work)
    assert cli(*given, "--set", "map.seed=5")[0] == 0
    assert may_differ.results(work) == before  # nothing is made again
    code, told = cli(*given, "--set", "map.seed=6")
    assert code == 3
    assert "map.seed: 5 there, 6 now" in told
    assert cli("verify", "--work", work)[0] == 0
    assert "map " in cli("status", "--work", work)[1]

    (work / "maps" / "texture" / "clusters.csv").write_text("cut")
    assert cli("verify", "--work", work, "--repair")[0] == 1
    lost = next(iter(of))
    chunk = next((here.feature_store("texture", lost) / "features" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    chunk.write_bytes(b"short")
    code, told = cli(*given, "--set", "map.seed=5")
    assert code == 1
    assert f"left out, {lost}" in told
    assert {r["slide"] for r in stored.read(work / "maps" / "texture").slides} == of.keys() - {lost}


def test_a_map_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    labels = write_labels(tmp_path / "labels.csv", make_features(layout.Work(work), 4))
    given = ("map", "--work", work, "--labels", labels, "--clusters", "2", "--gallery", "0")
    asked: list[int] = []

    def flat(z: np.ndarray, config: object) -> np.ndarray:  # stands for UMAP, which takes long to start
        asked.append(len(z))
        return z[:, :2] * 2

    def stopped(*args: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(embedding, "methods", lambda config: ("pca", "umap"))
    monkeypatch.setattr(embedding, "spread_out", flat)
    monkeypatch.setattr(embedding, "versions", lambda made: {"of": "+".join(made)})
    with monkeypatch.context() as once:
        once.setattr(stored, "write", stopped)
        with pytest.raises(SystemExit):
            cli(*given)
    assert len(asked) == 2
    assert not (work / "maps" / "texture").exists()
    assert cli(*given)[0] == 0
    assert len(asked) == 2  # what the stopped command had made was taken
    assert may_differ.unfinished(work) == []
    first = {k: v for k, v in may_differ.results(work).items() if k.startswith("maps/")}
    assert cli(*given, "--name", "again", "--replace")[0] == 0
    again = {k: v for k, v in may_differ.results(work).items() if k.startswith("maps/again/")}
    assert len(asked) == 4
    for name, data in again.items():
        if name.rpartition("/")[2] not in ("map.json", "manifest.json"):  # the card holds the map's name
            assert first[name.replace("maps/again/", "maps/texture/")] == data, name
    card = json.loads(again["maps/again/map.json"]) | {"name": "texture"}
    assert card == json.loads(first["maps/texture/map.json"])
    assert card["versions"] == {"of": "pca+umap"}

    def failing(*args: object) -> None:
        raise StoreError("no room")

    with monkeypatch.context() as once:
        once.setattr(stored, "write", failing)
        assert cli(*given, "--name", "third")[0] == 1
    assert "map: failed third: no room" in cli("status", "--work", work)[1]
    code, told = cli("retry", "--failed", "--work", work)
    assert code == 3
    assert "type --labels" in " ".join(told.split())
    assert cli("retry", "--failed", "--work", work, "--labels", labels)[0] == 0
    assert {r["class"] for r in stored.read(work / "maps" / "third").rows("clusters")} == {"", "no", "yes"}
    assert "nothing failed" in cli("retry", "--failed", "--work", work)[1]


def test_the_only_run_of_these_features_colours_the_map_and_no_other(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    labels = write_labels(tmp_path / "labels.csv", make_features(work, 12))
    make_features(work, 12, encoder="other")
    few = sets("train.folds=2", "train.epochs=2", 'train.model_params={"width": 8}', "score.bootstrap=0")
    few += sets("score.heatmaps=none")
    shared = ("--work", work.root, "--workers", 1, *few, "--set", "extract.encoder=texture")
    assert cli("train", *shared, "--labels", labels, "--model", "abmil")[0] == 0
    assert cli("score", *shared)[0] == 0
    code, told = cli("map", "--work", work.root, *SMALL, "--gallery", 0, "--set", "extract.encoder=texture")
    assert code == 0, told
    assert "labels as abmil was trained with; scores of the run abmil" in " ".join(told.split())
    made = stored.read(work.maps / "texture")
    assert made.card["run"] == "abmil"
    ranks = [float(r["by_score yes"]) for r in made.slides]
    assert (min(ranks), max(ranks)) == (0, 1)
    assert np.isfinite(made.tiles["attention"]).all()
    assert {r["class"] for r in made.rows("clusters")} == {"", "no", "yes"}
    chunk = next((work.run("abmil") / "scores" / f"{made.slides[0]['slide']}.zarr" / "attention" / "c").rglob("0"))
    chunk.write_bytes(b"short")
    blind = ("--name", "blind", "--gallery", 0, "--set", "extract.encoder=texture")
    code, told = cli("map", "--work", work.root, *SMALL, *blind)
    assert code == 0, told
    assert f"no attention of 1 slide ({made.slides[0]['slide']})" in " ".join(told.split())
    code, told = cli("map", "--work", work.root, *SMALL, "--gallery", 0, "--set", "extract.encoder=other")
    assert code == 0, told
    assert "abmil" not in told, "it is of other features"
    assert stored.read(work.maps / "other").card["run"] is None
    code, told = cli("map", "--work", work.root, *SMALL, "--gallery", 0, "--set", "extract.encoder=other",
                     "--run", "abmil")  # fmt: skip
    assert code == 0, told
    assert stored.read(work.maps / "other").card["run"] == "abmil", "who names it gets it"
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("slide,label\nelsewhere.svs,yes\n")
    given = ("map", "--work", work.root, *SMALL, "--gallery", 0, "--set", "extract.encoder=texture")
    code, told = cli(*given, "--labels", foreign)
    assert code == 2
    assert "no row of" in told
    assert "elsewhere.svs there" in told
    assert stored.read(work.maps / "texture").card["colours"] == made.card["colours"], "the map stays as it was"
    (work.run("abmil") / "predictions.csv").write_text("patient")
    code, told = cli(*given, "--labels", labels)
    assert code == 0
    assert "not coloured by the run abmil" in told
    assert "predictions.csv" in told
    work.cohort.write_text("damaged")
    code, told = cli("map", "--work", work.root, *SMALL, "--gallery", 0, "--set", "extract.encoder=texture")
    assert code == 2
    assert "cohort.csv is damaged" in " ".join(told.split())


def test_patients_with_slides_of_two_classes_count_in_neither(cli: Cli, tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    rows = [replace(row, patient=("P0", "P0", "P2", "P3")[k]) for k, row in enumerate(make_features(work, 4))]
    labels = write_labels(tmp_path / "labels.csv", rows)
    given = ("map", "--work", work.root, "--labels", labels, *SMALL, "--gallery", 0)
    code, told = cli(*given)
    assert code == 2
    assert "--set train.bag=slide" in told
    code, told = cli(*given, "--set", "train.bag=slide")
    assert code == 0, told
    assert "1 patient has slides of different label: counted in no class of it" in " ".join(told.split())
    made = stored.read(work.maps / "texture")
    assert {r["class"]: r["patients"] for r in made.rows("clusters")} == {"": "3", "no": "1", "yes": "1"}
    assert [r["by_label"] for r in made.slides] == ["no", "yes", "no", "yes"]
    assert [(r["patient"], r["by_label"]) for r in made.rows("patients")] == [("P0", ""), ("P2", "no"), ("P3", "yes")]
