"""From a trained run to what people look at: pictures in place, new slides in one go, a report that opens anywhere."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from mhim.configs.schema import ScoreConfig
from mhim.extract.slide.slide import open_slide
from mhim.mil.heatmap import palette
from mhim.mil.tasks import Classification
from mhim.pipeline.cli.main import _main
from mhim.pipeline.pictures import layers
from mhim.pipeline.results.again import commands
from mhim.pipeline.store import layout, reading
from mhim.pipeline.store.attributes import Geometry
from tests.extract.slides import write_svs
from tests.pipeline.bags import sets
from tests.pipeline.browser import page

SETTINGS = [
    *sets("train.folds=2", "train.val_fraction=0.4", "train.epochs=3", "train.lr=0.001", "score.bootstrap=50"),
    "--workers",
    "1",
]
PICTURES = ["--heatmaps", "all", "--tiff", "--geojson", "--top-tiles", "3"]
OF_TWO = [*PICTURES, *sets("score.heatmap_limit=2")]  # what is drawn again and again need not be of every slide


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path, tiled_cohort: Path) -> Path:
    """Work folder with the scored run abmil and all its pictures."""
    work = Path(shutil.copytree(tiled_cohort, tmp_path_factory.mktemp("look") / "work"))
    shared = ["--work", str(work)]
    labels = ["--labels", str(demo_cohort / "labels.csv")]
    assert _main(["train", *shared, *labels, "--model", "abmil", *SETTINGS]) == 0
    assert _main(["score", *shared, "--name", "abmil", *PICTURES, *SETTINGS]) == 0
    return work


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    """The run, with its report."""
    assert _main(["report", "--work", str(trained), "--name", "abmil"]) == 0
    return trained / "runs" / "abmil"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_every_scored_slide_has_every_picture(trained: Path) -> None:
    run = trained / "runs" / "abmil"
    scored = [s for r in read(run / "predictions.csv") for s in r["slide"].split(";")]
    assert len(scored) == 8
    for slide in scored:
        names = {p.name for p in (run / "heatmaps" / slide).iterdir()}
        assert names == {
            "attention.png",
            "probability_tumour.png",
            "contribution_tumour.png",
            "heatmap.tif",
            "tiles.geojson",
            "tiles.jpg",
            "manifest.json",
        }


def test_drawing_again_with_other_settings_needs_no_permission(trained: Path) -> None:
    run = trained / "runs" / "abmil" / "heatmaps"
    slide = sorted(p.name for p in run.iterdir() if p.suffix == ".svs")[0]
    before = (run / slide / "attention.png").read_bytes()
    again = ["score", "--work", str(trained), "--name", "abmil", *SETTINGS]
    assert '"score.palette": "even"' in (run / slide / "manifest.json").read_text()
    assert _main([*again, *OF_TWO, "--set", "score.heatmap_scale=raw"]) == 0
    assert (run / slide / "attention.png").read_bytes() != before
    assert _main([*again, *OF_TWO, "--set", "score.palette=inferno"]) == 0
    assert (run / slide / "attention.png").read_bytes() != before
    assert '"score.palette": "inferno"' in (run / slide / "manifest.json").read_text()
    assert _main([*again, *OF_TWO]) == 0
    assert (run / slide / "attention.png").read_bytes() == before  # and the same settings give the same bytes


def test_pictures_from_before_the_choice_of_colours_stay_as_they_are(trained: Path) -> None:
    """They record no palette, as those in classic colours still do not; a picture drawn beside them looks alike."""
    run = trained / "runs" / "abmil" / "heatmaps"
    first, second = sorted(p for p in run.iterdir() if p.suffix == ".svs")[:2]
    even = (second / "attention.png").read_bytes()
    again = ["score", "--work", str(trained), "--name", "abmil", *SETTINGS]
    assert _main([*again, *OF_TWO, "--set", "score.palette=classic"]) == 0
    assert "score.palette" not in (first / "manifest.json").read_text()
    old, began = (second / "attention.png").read_bytes(), (first / "attention.png").stat().st_mtime_ns
    assert old != even
    assert "--set 'score.palette=\"classic\"'" in "".join(commands(layout.Work(trained), run.parent))
    shutil.rmtree(second)
    assert _main([*again, *OF_TWO]) == 0
    assert (first / "attention.png").stat().st_mtime_ns == began, "it was not drawn again"
    assert (second / "attention.png").read_bytes() == old
    assert _main([*again, *OF_TWO, "--set", "score.palette=even"]) == 0
    assert (second / "attention.png").read_bytes() == even
    assert _main([*again, *OF_TWO]) == 0
    assert (second / "attention.png").read_bytes() == even


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_the_hottest_tile_is_hot_in_picture_tiff_and_geojson(trained: Path, demo_cohort: Path, mpp: float) -> None:
    work = layout.Work(trained)
    run = work.run("abmil")
    slides = [p.name for p in sorted((run / "heatmaps").iterdir()) if p.suffix == ".svs"]
    slide = next(s for s in slides if reading.read_attrs(work.tile_store(s))["slide_mpp"][0] == mpp)
    scores = run / "scores" / f"{slide}.zarr"
    attention, coords = (np.asarray(reading.read_array(scores, k)) for k in ("attention", "coords"))
    tile_l0 = reading.read_attrs(work.tile_store(slide))["tile_l0"][0]
    hot = int(np.argmax(attention))
    centre = coords[hot] + tile_l0 / 2
    with tifffile.TiffFile(run / "heatmaps" / slide / "heatmap.tif") as tif:
        page0 = tif.pages[0]
        assert page0.is_tiled
        image = page0.asarray()
        x_resolution = page0.tags["XResolution"].value
        per_cm = x_resolution[0] / x_resolution[1]
    um = 1e4 / per_cm  # of a pixel of the TIFF
    x, y = (centre * mpp / um).astype(int)
    assert image[y, x].tolist() == palette("viridis")[255].tolist()
    with open_slide(demo_cohort / "slides" / slide) as opened:
        assert image.shape[1] * um == pytest.approx(opened.size_l0[0] * mpp, abs=um)
        rgb, frame = layers.low_resolution(opened)
    drawn = cv2.imread(str(run / "heatmaps" / slide / "attention.png"))[..., ::-1].astype(int)
    px, py = (centre / np.array(frame.px_l0)).astype(int)
    expected = (rgb[py, px].astype(int) + palette("viridis")[255]) / 2
    assert np.abs(drawn[py, px] - expected).max() <= 2
    features = json.loads((run / "heatmaps" / slide / "tiles.geojson").read_text())["features"]
    assert len(features) == len(coords)
    ring = np.array(features[hot]["geometry"]["coordinates"][0])
    assert ring.min(0).tolist() == coords[hot].tolist()
    assert (ring.max(0) - ring.min(0)).tolist() == [tile_l0, tile_l0]
    told = features[hot]["properties"]["measurements"]
    assert told["attention"] == pytest.approx(float(attention[hot]))
    assert told["attention percentile"] == 100


@pytest.mark.parametrize("mpp", [0.25, 0.503])
@pytest.mark.parametrize("bounds", [(0, 0, 1531, 1003), (301, 257, 1117, 611)], ids=["whole", "mrxs-like"])
def test_golden_a_planted_tile_is_red_where_the_slide_is_black(
    tmp_path: Path, mpp: float, bounds: tuple[int, int, int, int]
) -> None:
    """Odd sizes, bounds that do not begin at the corner, two mpp: the layer covers the tile's own pixels."""
    x0, y0, tile = bounds[0] + 2 * 128, bounds[1] + 128, 128
    rgb = np.full((1003, 1531, 3), 240, np.uint8)
    rgb[y0 : y0 + tile, x0 : x0 + tile] = 0
    path = write_svs(tmp_path / "s.svs", rgb, mpp, downsamples=(1, 4))
    coords = np.array([[bounds[0] + 128 * i, bounds[1] + 128 * j] for j in range(4) for i in range(6)])
    hot = coords.tolist().index([x0, y0])
    arrays = {"attention": np.eye(len(coords))[hot], "coords": coords}
    with open_slide(path) as slide:
        slide.bounds_l0 = bounds
        picture, frame = layers.low_resolution(slide)
    assert frame.origin_l0 == bounds[:2]
    tiles = Geometry((mpp, mpp), (1531, 1003), bounds, (tile, tile), tile, mpp)
    config = ScoreConfig(heatmap_scale="raw", palette="classic")
    layer = layers.Layer("attention", arrays["attention"])
    drawn = layers.overlay(picture, frame, layer, arrays, tiles, config, "s")[: picture.shape[0], : picture.shape[1]]
    black = picture.max(-1) < 100
    high = (palette()[255] / 2).astype(int)  # half the colour on black
    red = np.abs(drawn.astype(int) - high).max(-1) < 30
    assert black.any()
    assert (black & red).sum() / (black | red).sum() > 0.9  # a pixel's width at the edges may differ
    layers.write_tiff(tmp_path / "h.tif", layer, arrays, tiles, config)
    with tifffile.TiffFile(tmp_path / "h.tif") as tif:
        image, down = tif.pages[0].asarray(), 16
    ys, xs = np.nonzero((image == palette()[255]).all(-1))
    near = down / 2 + 1e-9
    assert abs(xs.min() * down - x0) <= near
    assert abs((xs.max() + 1) * down - x0 - tile) <= near
    assert abs(ys.min() * down - y0) <= near
    assert abs((ys.max() + 1) * down - y0 - tile) <= near


def test_tiles_for_qupath_count_from_the_scanned_bounds() -> None:
    """As QuPath does, as `pipeline qupath` writes and as `regions` are read."""
    coords = np.array([[2501, 1727], [2725, 1727]])
    tiles = Geometry((0.5, 0.5), (9000, 9000), (2501, 1503, 5000, 4000), (224.0, 224.0), 224, 0.5)
    layer = layers.Layer("attention", np.array([0.25, 0.75]))
    features = json.loads(layers.geojson([layer], coords, tiles, "b0.scn"))["features"]
    assert [f["geometry"]["coordinates"][0][0] for f in features] == [[0, 224], [224, 224]]
    assert features[0]["properties"]["measurements"] == {"attention": 0.25, "attention percentile": 0.0}


def test_a_model_without_class_evidence_still_has_its_attention() -> None:
    task = Classification(classes=("a", "b"))
    found = layers.layers({"attention": np.ones(3)}, task, "all")
    assert [x.name for x in found] == ["attention"]


def test_layers_of_more_than_two_classes_are_one_per_class() -> None:
    rng = np.random.default_rng(0)
    arrays = {"attention": rng.random(5), "evidence": rng.normal(size=(5, 3))}
    found = {x.name: x for x in layers.layers(arrays, Classification(classes=("a", "b", "c")), "all")}
    assert set(found) == {"attention", *(f"{k}_{c}" for k in ("probability", "contribution") for c in "abc")}
    np.testing.assert_allclose(sum(found[f"probability_{c}"].scores for c in "abc"), 1)
    np.testing.assert_allclose(sum(found[f"contribution_{c}"].scores for c in "abc"), 0, atol=1e-12)
    assert found["contribution_a"].signed


def test_a_new_slide_is_scored_in_one_go(
    trained: Path, demo_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All folds score it. It is one of the run's own under another name, which has to be allowed."""
    known = read(trained / "runs" / "abmil" / "predictions.csv")[0]["slide"].split(";")[0]
    new = tmp_path / "of_tomorrow.svs"
    shutil.copy(demo_cohort / "slides" / known, new)
    assert _main(["score", str(new), "--work", str(trained), "--model", "abmil", "--allow-known", *SETTINGS]) == 0
    out = trained / "runs" / "abmil" / "new" / "of_tomorrow"
    (row,) = read(out / "predictions.csv")
    assert row["slide"] == "of_tomorrow.svs"
    assert 0 <= float(row["p_tumour"]) <= 1
    assert float(row["p_tumour"]) + float(row["p_benign"]) == pytest.approx(1)
    assert row["decision"] in ("benign", "tumour")
    assert float(row["spread"]) >= 0
    assert "counted as new" in row["known"]
    assert (out / "heatmaps" / "of_tomorrow.svs" / "attention.png").exists()
    assert "of_tomorrow.svs" in capsys.readouterr().out
    assert not (trained / "tiles" / "of_tomorrow.svs.zarr").exists()  # the cohort stays as it was


def test_another_cohort_with_labels_is_compared(
    trained: Path, demo_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    rows = [r for r in read(demo_cohort / "labels.csv") if r["slide"].startswith("case")][:4]
    for row in rows:
        shutil.copy(demo_cohort / "slides" / row["slide"], other / row["slide"])
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,patient,label\n" + "".join(f"{r['slide']},{r['patient']},{r['label']}\n" for r in rows))
    code = _main(
        [
            "score",
            str(other),
            "--work",
            str(trained),
            "--model",
            "abmil",
            "--labels",
            str(labels),
            "--allow-known",
            "--heatmaps",
            "none",
            *SETTINGS,
        ]
    )  # they are the run's own, which stand in here for strangers
    assert code == 0
    found = json.loads((trained / "runs" / "abmil" / "new" / "other" / "metrics.json").read_text())
    assert found["slides"] == 4
    assert found["patients"] == len({r["patient"] for r in rows})
    assert found["internal"]["accuracy"]["value"] is not None
    assert found["external"]["accuracy"]["value"] is not None
    assert "external" in capsys.readouterr().out


def test_predictions_carry_frozen_decisions_and_the_metrics_their_counts(trained: Path) -> None:
    run = trained / "runs" / "abmil"
    for row in read(run / "predictions.csv"):
        card = json.loads((run / f"fold_{row['fold']}" / "model.json").read_text())
        assert float(row["threshold"]) == card["threshold"]
        assert row["decision"] == ("tumour" if float(row["p_tumour"]) >= card["threshold"] else "benign")
    found = json.loads((run / "metrics.json").read_text())
    assert found["decisions"]["patients"] == found["patients"]
    assert set(found["reliability"]) == {"before", "after"}


class Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]


def test_the_report_is_one_file_with_everything(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert len(text) < 10 * 2**20
    links = Addresses()
    links.feed(text)
    assert links.found
    # nothing from anywhere else; beside the run's pictures in small stand links to those in the run's folder
    elsewhere = [a for a in links.found if not a.startswith(("data:", "#"))]
    assert [a for a in elsewhere if not a.startswith("heatmaps/") or not (run / a).is_file()] == []
    assert not re.search(r'src(set)?="(?!data:)', text)
    for words in ("no_mpp.svs", "truncated", "no tissue", "config.yaml", "pipeline train", "Splits"):
        assert words in text
    for name in ("roc", "pr", "confusion", "reliability", "loss", "validation"):
        assert (run / "report" / f"{name}.svg").exists()
        assert (run / "report" / f"{name}.png").exists()
    order = re.findall(r"<b>(case_\d+\.svs)</b>", text)
    assert len(order) == 8
    wrong = {
        s: (r["decision"] != r["label"], 1 - float(r[f"p_{r['label']}"]))
        for r in read(run / "predictions.csv")
        for s in r["slide"].split(";")
    }
    assert [wrong[s] for s in order] == sorted((wrong[s] for s in order), reverse=True)


def test_the_report_works_in_a_browser_from_the_disk(run: Path) -> None:
    with page() as p:
        p.goto((run / "report.html").resolve().as_uri())
        rows = p.locator("table.sortable tbody tr")
        n = rows.count()
        p.locator("table.sortable th button").nth(0).click()
        patients = [rows.nth(i).locator("td").nth(0).inner_text() for i in range(n)]
        assert patients == sorted(patients)
        p.locator("input[type=search]").fill(patients[-1])
        assert 1 <= p.locator("table.sortable tbody tr:visible").count() < n
        assert p.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
        assert p.faults == []


def test_a_run_that_is_not_scored_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "runs" / "bare").mkdir(exist_ok=True)
    assert _main(["report", "--work", str(trained), "--name", "bare"]) == 2
    assert "pipeline score --name bare" in capsys.readouterr().err
    (trained / "runs" / "bare").rmdir()


def test_names_are_escaped_in_the_report(trained: Path) -> None:
    run = trained / "runs" / "abmil"
    copy = trained / "runs" / "evil"
    shutil.copytree(run, copy)
    text = (copy / "predictions.csv").read_text()
    patient = read(copy / "predictions.csv")[0]["patient"]
    (copy / "predictions.csv").write_text(text.replace(f",{patient},", ",<script>alert(1)</script>,"))
    seal = json.loads((copy / "score.json").read_text())  # a stranger's, who sealed what he wrote
    (copy / "score.json").write_text(json.dumps({k: v for k, v in seal.items() if k not in ("files", "seal_sum")}))
    assert _main(["report", "--work", str(trained), "--name", "evil"]) == 0
    written = (copy / "report.html").read_text()
    assert "<script>alert" not in written
    assert "&lt;script&gt;alert(1)" in written
    shutil.rmtree(copy)
