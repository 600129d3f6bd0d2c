"""What a map is made of, against values known beforehand: samples, places, clusters, shares, scores."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mhim.configs.schema import MapConfig
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.maps import embedding, people, sample, shares
from mhim.pipeline.pictures import scatter
from mhim.pipeline.stages import map as map_stage
from mhim.pipeline.store import layout, writing


def store(work: layout.Work, slide: str, features: np.ndarray) -> None:
    writer = writing.StoreWriter(work.feature_store("texture", slide), {"fingerprint": slide, "encoder": "texture"})
    writer.write("features", features)
    writer.write("coords", np.arange(2 * len(features), dtype=np.int32).reshape(-1, 2))


def test_each_slide_gives_equally_many_tiles_whatever_the_others_are(tmp_path: Path) -> None:
    work, rng = layout.Work(tmp_path), np.random.default_rng(0)
    for k, n in enumerate((500, 300, 4)):
        store(work, f"{k}.svs", rng.normal(size=(n, 3)).astype(np.float16))
    found = sample.draw(work.features("texture"), 60, 7)
    assert np.bincount(found.slide).tolist() == [20, 20, 4]
    assert found.tiles == (500, 300, 4)
    own = found.row[found.slide == 1]
    assert (np.diff(own) > 0).all()
    assert found.coords[found.slide == 1][:, 0].tolist() == (2 * own).tolist()
    assert own.tolist() == sample.rows_of("1.svs", 300, 20, 7).tolist()  # by the seed and the slide's name alone
    assert own.tolist() != sample.rows_of("1.svs", 300, 20, 8).tolist()


def test_a_damaged_slide_is_left_out_with_the_reason_and_changes_no_other(tmp_path: Path) -> None:
    work, rng = layout.Work(tmp_path), np.random.default_rng(0)
    for k in range(4):
        store(work, f"{k}.svs", rng.normal(size=(30, 3)).astype(np.float32))
    whole = sample.draw(work.features("texture"), 300, 1)
    (work.feature_store("texture", "1.svs") / "features/c/0/0").write_bytes(b"short")
    store(work, "4.svs", np.full((30, 3), np.nan, np.float32))
    found = sample.draw(work.features("texture"), 300, 1)
    assert list(found.left_out) == ["1.svs", "4.svs"]
    assert "damaged" in found.left_out["1.svs"]
    assert "no finite numbers" in found.left_out["4.svs"]
    assert found.slides == ("0.svs", "2.svs", "3.svs")
    assert np.array_equal(found.features, whole.features[whole.slide != 1])
    assert found.digest != whole.digest
    store(work, "5.svs", np.zeros((30, 2), np.float32))
    with pytest.raises(CohortError, match=r"5\.svs and 0\.svs differ in their width"):
        sample.draw(work.features("texture"), 300, 1)


def test_components_are_those_of_the_covariance_with_a_fixed_sign() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 6)) @ np.diag([5, 3, 1, 0.5, 0.2, 0.1]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 40
    z, variance = embedding.reduced(x.astype(np.float32), 3)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert variance == pytest.approx((values[::-1] / values.sum())[:3], rel=1e-5)
    for k in range(3):
        axis = vectors[:, -1 - k]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        assert z[:, k] == pytest.approx((x - x.mean(axis=0)) @ axis, abs=2e-3)


def test_clusters_are_found_and_the_largest_is_the_first() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1, 2], [60, 200, 100])
    z = np.array([[0, 0], [30, 0], [0, 30]])[truth] + rng.normal(size=(360, 2))
    own, away = embedding.clusters(z, MapConfig(clusters=3))
    assert [set(own[truth == k].tolist()) for k in range(3)] == [{2}, {0}, {1}]
    assert away[truth == 1] == pytest.approx(
        np.linalg.norm(z[truth == 1] - z[truth == 1].mean(axis=0), axis=1), abs=0.3
    )
    assert len(set(embedding.clusters(np.zeros((50, 2)), MapConfig(clusters=3))[0].tolist())) == 1


def test_shares_are_of_patients_not_of_tiles() -> None:
    cluster = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 1])
    slide = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])  # slides 0 and 1 are of patient A
    found = shares.by_patient(cluster, slide, ["A", "A", "B"], 2)
    assert found["A"].tolist() == [0.375, 0.625]  # mean of 3/4 and 0
    assert found["B"].tolist() == [0.5, 0.5]
    rows = shares.table(found, {"label": {"A": "x", "B": "y"}})
    told = {(r["cluster"], r["class"]): (r["patients"], r["share"], r["sd"]) for r in rows}
    assert told[0, ""] == (2, 0.4375, pytest.approx(0.0884, abs=1e-4))
    assert told[1, "x"] == (1, 0.625, None)
    assert shares.leading(found, {"A": "x", "B": "y"}, "x") == [1]
    assert shares.leading(found, {"A": "x"}, "x") == []  # nothing to lead over


def test_prototypes_are_near_their_centre_and_of_different_patients_first() -> None:
    cluster, away = np.zeros(5, np.int64), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    found = shares.prototypes(cluster, away, list("AAABC"), {p: np.ones(1) for p in "ABC"}, {}, 4)
    assert [p.tile for p in found] == [0, 3, 4, 1]


def test_scores_are_places_inside_each_training_and_of_no_one_else() -> None:
    rows = [
        {"slide": s, "repeat": 0, "fold": f, "seed": 1, "p": p}
        for s, f, p in [("a", 0, 0.1), ("b;c", 0, 0.2), ("d", 1, 0.8), ("e", 1, 0.99), ("f", 1, 0.7)]
    ]
    found = people._placed(rows, lambda r: r["p"])
    # a fold that says 0.8 of its middle patient and one that says 0.2 of its highest stand on no common scale
    assert found == {"a": 0.0, "b": 1.0, "c": 1.0, "f": 0.0, "d": 0.5, "e": 1.0}


def test_columns_of_labels_become_classes_or_numbers() -> None:
    rows = [Row(k, f"{k}.svs", f"P{k // 2}", label=str(k), site="north" if k < 3 else None) for k in range(20)]
    found = people.people(rows, [f"{k}.svs" for k in range(21)])
    assert (found.patient["3.svs"], found.patient["20.svs"]) == ("P1", "20.svs")
    assert [(c.name, c.kind, len(c.values)) for c in found.colours] == [("label", "number", 20), ("site", "classes", 3)]
    few = people.people(rows[:8], [f"{k}.svs" for k in range(8)])
    assert few.colours[0].kind == "classes"
    assert "20.svs" not in few.patient
    timed = [Row(1, "a", "A", time=3.0, event=1), Row(2, "b", "B", time=5.0, event=0)]
    named = {c.name: c.values for c in people.people(timed, ["a", "b"]).colours}
    assert named == {"event": {"a": "event", "b": "censored"}, "time": {"a": 3.0, "b": 5.0}}


def test_umap_is_told_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> str:
        raise embedding.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as without:
        without.setattr(embedding.metadata, "version", gone)
        assert embedding.methods(MapConfig()) == ("pca",)
        with pytest.raises(embedding.NoUmap, match="mhim-pipeline\\[map\\]"):
            embedding.methods(MapConfig(method="umap"))
    assert embedding.methods(MapConfig(method="pca")) == ("pca",)


def test_umap_is_asked_for_the_same_by_the_seed_and_begun_at_the_components(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Stand:  # for umap-learn, whose import compiles for half a minute
        def __init__(self, **given: Any) -> None:
            asked.append(given)

        def fit_transform(self, z: np.ndarray) -> np.ndarray:
            return z[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Stand))
    z = np.random.default_rng(0).normal(size=(80, 5)) * 30
    config = MapConfig(neighbors=15, min_dist=0.2, seed=2**32 + 3)
    made = embedding.spread_out(z, config)
    assert made is not None
    assert (made.shape, made.dtype) == ((80, 2), np.float64)
    (given,) = asked
    assert {k: given[k] for k in ("n_neighbors", "min_dist", "random_state", "n_jobs")} == {
        "n_neighbors": 15,
        "min_dist": 0.2,
        "random_state": 3,
        "n_jobs": 1,
    }
    assert (given["init"].dtype, given["init"].min(), given["init"].max()) == (np.float32, 0, 10)
    assert np.corrcoef(given["init"][:, 1], z[:, 1])[0, 1] == pytest.approx(1)
    assert embedding.spread_out(z[:12], config) is not None
    assert asked[-1]["n_neighbors"] == 11
    assert embedding.spread_out(z[:9], config) is None
    assert len(asked) == 2
    assert embedding.spread_out(np.zeros((10, 1)), config) is not None


def test_what_patients_are_is_what_their_slides_agree_in() -> None:
    of = {"a": "A", "b": "A", "c": "B", "d": "B", "e": "C"}
    label = people.Colour("label", "classes", {"a": "x", "b": "y", "c": "x", "d": "x", "f": "y"})
    assert people.of_patients(label, of) == {"B": "x"}
    score = people.Colour("score", "rank", {"a": 0.2, "b": 0.6, "e": 1.0})
    assert people.of_patients(score, of) == {"A": pytest.approx(0.4), "C": 1.0}


def test_labels_that_are_called_as_the_map_s_own_columns_keep_their_own() -> None:
    named = [("cluster", True), ("site", True), ("a b", True), ("a-b", True), ("site", False), ("Slide", False)]
    colours = [people.Colour(name, "classes", {}, outcome) for name, outcome in named]
    names = ["label cluster", "label site", "a b", "label a-b", "site", "Slide again"]
    assert [c.name for c in map_stage._apart(colours)] == names


def test_a_picture_of_names_that_look_like_formulas(tmp_path: Path) -> None:
    values = ["$a$"] * 3 + ["$\\frac$", ""]
    title = "5 tiles, by $\\frac$"
    scatter.save(tmp_path / "a.png", scatter.Points(np.arange(10.0).reshape(5, 2), values, title, ("PCA 1", "PCA 2")))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
