"""`pipeline map` as a user gives it: what it leaves, what it tells, and what happens when it is damaged or stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.maps import embedding, stored
from mhim.pipeline.pictures import cohort_map, report
from mhim.pipeline.store import layout, may_differ, pages, reading

Cli = Callable[..., tuple[int, str]]
SMALL = ("--method", "pca", "--clusters", "3", "--gallery", "2", "--set", "cluster.workers=1")


@pytest.fixture
def work(tiled_cohort: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiled_cohort, tmp_path / "work"))


def test_map_is_made_resumed_verified_and_tells_a_damaged_slide(cli: Cli, work: Path, demo_cohort: Path) -> None:
    labels = demo_cohort / "labels.csv"
    given = ("map", "--work", work, "--labels", labels, *SMALL, "--set", "map.components=4", "--tiles", "90")
    code, told = cli(*given, "--set", "map.seed=5")
    assert code == 0, told
    made = stored.read(work / "maps" / "texture")
    card, tiles = made.card, made.tiles
    assert card["slides"] == len(made.slides) == 8
    assert np.bincount(tiles["slide"]).max() == 90 // 8
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
    for r in made.rows("prototypes"):
        assert (made.folder / "gallery" / r["slide"] / f"{r['tile']}.jpg").stat().st_size > 500
    there = {p.name for p in made.folder.iterdir()}
    assert {"tiles_pca_cluster.png", "tiles_pca_label.png", "patients_pca_label.png"} <= there
    (shown,) = cohort_map.sections(layout.Work(work), "run", {"encoder": "texture"})
    titles = [title for title, _ in shown["pictures"]]
    assert titles[:3] == [f"tiles, PCA, by {name}" for name in ("cluster", "slide", "label")]
    assert [len(g["tiles"]) for g in shown["gallery"]][:3] == [2, 2, 2]
    assert cohort_map.sections(layout.Work(work), "run", {"encoder": "other"}) == []
    text = pages.page(report.ASSETS / "map.html", cohort_maps=[shown])
    assert text.count("<img") == len(shown["pictures"]) + sum(len(g["tiles"]) for g in shown["gallery"])
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
    assert cli(*given, "--set", "map.seed=5")[0] == 0
    assert {k: v for k, v in may_differ.results(work).items() if k in before} == before

    lost = next(iter(of))
    chunk = next((layout.Work(work).feature_store("texture", lost) / "features" / "c").rglob("0"))
    while chunk.is_dir():
        chunk = chunk / "0"
    chunk.write_bytes(b"short")
    code, told = cli(*given, "--set", "map.seed=5")
    assert code == 1
    assert f"left out, {lost}" in told
    assert lost not in {r["slide"] for r in stored.read(work / "maps" / "texture").slides}


def test_a_map_that_was_stopped_goes_on_and_ends_in_the_same_bytes(
    cli: Cli, work: Path, demo_cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("map", "--work", work, "--labels", demo_cohort / "labels.csv", "--clusters", "2", "--gallery", "0")
    asked: list[int] = []

    def flat(z: np.ndarray, config: object) -> np.ndarray:  # stands for UMAP, which takes long to start
        asked.append(len(z))
        return z[:, :2] * 2

    def stopped(*args: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(embedding, "methods", lambda config: ("pca", "umap"))
    monkeypatch.setattr(embedding, "spread_out", flat)
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
