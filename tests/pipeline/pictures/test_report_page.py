"""The report as a page: contents, enlarging, sorting, filters, what stands beside a run, light, dark, narrow, print."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mhim.mil import heatmap
from mhim.pipeline.cli.main import _main
from mhim.pipeline.pictures import layers, thumbnails
from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, sets, write_labels
from tests.pipeline.browser import inaccessible, page

QUICK = [
    *sets("train.folds=3", "train.val_fraction=0.4", "train.epochs=4", "train.lr=0.01", "score.bootstrap=40"),
    *("--workers", "1", "--set", "train.model=abmil"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's report: two slides have pictures, another run has the same splits, another cohort was scored."""
    folder = tmp_path_factory.mktemp("report")
    work, other = layout.Work(folder / "work"), layout.Work(folder / "other")
    labels = write_labels(folder / "labels.csv", make_features(work, 24))
    theirs = write_labels(folder / "theirs.csv", make_features(other, 12, prefix="x", seed=5))
    for name, more in (("run", ()), ("second", ("--set", "train.lr=0.002"))):
        shared = ["--work", work.root, "--name", name, *QUICK, *more]
        run_("train", *shared, "--labels", labels)
        run_("score", *shared, "--heatmaps", "none")
    new = ["--features", other.features("texture"), "--labels", theirs, "--as", "elsewhere"]
    run_("score", "--work", work.root, "--name", "run", *QUICK, *new)
    run = work.run("run")
    for slide in [r["slide"] for r in rows_of(run)[:2]]:
        drawn = run / "heatmaps" / slide
        drawn.mkdir(parents=True)
        for name in ("attention", "contribution_1"):
            picture = np.full((700, 1600, 3), 200, np.uint8)
            layers.save_png(drawn / f"{name}.png", heatmap.legend(picture, 4.0, f"{slide}: {name}", "0 %", "100 %"))
        layers.save_jpeg(drawn / "tiles.jpg", np.full((500, 1200, 3), 180, np.uint8))
        (drawn / layout.SEAL).write_text(json.dumps({"fingerprint": "drawn", "settings": {}}))
    run_("report", "--work", work.root, "--name", "run")
    return run / "report.html"


def run_(*words: object) -> None:
    assert _main([str(w) for w in words]) == 0


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "predictions.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 1280, 390])
def test_it_is_read_at_every_width(report: Path, width: int, scheme: str) -> None:
    with page(width, 900, scheme) as p:
        p.goto(report.as_uri())
        assert p.evaluate("document.documentElement.scrollWidth") <= width
        assert inaccessible(p) == []
        paper = p.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(22, 24, 30)" if scheme == "dark" else "rgb(255, 255, 255)")
        for link in p.locator("nav a").all():
            link.focus()
            p.keyboard.press("Enter")
            target = p.locator(link.get_attribute("href"))
            assert 0 <= target.bounding_box()["y"] < 900, link.inner_text()
        p.emulate_media(media="print")
        assert p.evaluate("getComputedStyle(document.body).color") == "rgb(34, 36, 46)"  # on paper never white on black
        assert p.locator("nav, input, select").evaluate_all("es => es.every(e => !e.checkVisibility())")
        assert p.faults == []


def test_pictures_of_every_layer_and_the_tiles_enlarge(report: Path) -> None:
    with page() as p:
        p.goto(report.as_uri())
        assert p.locator(".gallery figure").count() == 2
        names = p.locator(".gallery figure").first.locator("a span").all_inner_texts()
        assert names == ["contribution 1", "attention", "highest and lowest tiles"]
        first = p.locator(".gallery a.large").first
        first.focus()
        p.keyboard.press("Enter")
        assert p.locator("#large").evaluate("d => d.open")
        assert p.locator("#picture img").evaluate("i => i.naturalWidth") == thumbnails.PICTURE_PX
        file = report.parent / p.locator("#file").evaluate("a => decodeURIComponent(a.getAttribute('href'))")
        assert file.is_file()
        p.keyboard.press("Escape")
        assert not p.locator("#large").evaluate("d => d.open")
        p.locator(".figures a.large").first.click()
        assert p.locator("#picture img").evaluate("i => i.naturalWidth > 0")
        assert not p.locator("#file").is_visible()  # it is in the page as it was drawn
        p.click("#shut")
        assert p.faults == []


def test_the_legend_of_a_small_picture_is_not_made_smaller(tmp_path: Path) -> None:
    import cv2

    path = tmp_path / "a.png"
    drawn = heatmap.legend(np.full((700, 1600, 3), 200, np.uint8), 4.0, "slide: attention", "0 %", "100 %")
    layers.save_png(path, drawn)
    small = cv2.imdecode(np.frombuffer(thumbnails.heatmap(path), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert small.shape == (193 + heatmap.STRIP_PX, thumbnails.PICTURE_PX, 3)
    strip = drawn[-heatmap.STRIP_PX :, : thumbnails.PICTURE_PX]
    assert np.abs(small[193:].astype(int) - strip).mean() < 6  # JPEG


def test_sorting_is_seen_and_filters_say_what_is_left(report: Path) -> None:
    with page() as p:
        p.goto(report.as_uri())
        heads, found = p.locator("table.sortable th"), p.locator(".found")
        assert found.inner_text() == "24 of 24"
        heads.nth(0).locator("button").click()
        told = p.locator("table.sortable tbody tr td:first-child").all_inner_texts()
        assert told == sorted(told)
        assert heads.nth(0).get_attribute("aria-sort") == "ascending"
        mark = "getComputedStyle(document.querySelector('th[aria-sort] button'), '::after').content"
        up = p.evaluate(mark)
        heads.nth(0).locator("button").click()
        assert heads.nth(0).get_attribute("aria-sort") == "descending"
        assert p.evaluate(mark) != up
        p.fill("input[type=search]", told[0])
        assert found.inner_text() == "1 of 24"
        p.check("#onlymistakes")
        shown = p.locator(".gallery figure:visible").count()
        assert shown == p.locator(".gallery figure.mistake").count()


def test_what_stands_beside_the_run_and_the_methods_have_its_numbers(report: Path) -> None:
    found = json.loads((report.parent / "metrics.json").read_text())
    new = json.loads((report.parent / "new" / "elsewhere" / "metrics.json").read_text())
    with page() as p:
        p.goto(report.as_uri())
        compared = p.locator("#compared ~ .wide").first.inner_text()
        assert "second" in compared
        assert "p\n" in compared or "\tp\t" in compared
        external = p.locator("#external ~ .wide").first.inner_text()
        assert "elsewhere" in external
        assert f"{new['external']['auc']['value']:.3f}" in external
        text = p.locator("#methodstext").inner_text()
        for told in (
            f"{found['patients']} held-out patients",
            "3-fold cross-validation over patients",
            "4 epochs, learning rate 0.01",
            f"split {found['split_hash']}",
            f"Held-out auc was {found['test']['auc']['value']:.3f}",
            f"sensitivity {found['decisions']['sensitivity']:.3f}",
            "40 bootstrap samples",
        ):
            assert told in text, told
        assert "None" not in text
        frozen = p.locator(".big div").first.inner_text()
        assert frozen.split("\n") == [f"{found['decisions']['sensitivity']:.3f}", "sensitivity, frozen threshold"]
        p.locator("button.copy").first.click()
        p.wait_for_function("() => document.querySelector('button.copy').textContent !== 'copy'")
        assert p.evaluate("getSelection().toString()").strip()[:20] == text[:20]
        assert str(report.parent / "config.yaml") in p.locator("#againtext").inner_text()
