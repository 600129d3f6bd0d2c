"""The viewer: what it serves, and that the page works in a real browser with the keyboard alone."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from mhim.extract.slide.slide import open_slide
from mhim.mil import heatmap
from mhim.mil.tasks import Classification
from mhim.pipeline.store import layout, writing
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline import records, scored
from tests.pipeline.browser import page
from tests.pipeline.viewer.serving import get, serving


def picture(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def numbers(gallery: Gallery) -> dict[str, int]:
    return {s.id: i for i, s in enumerate(gallery.slides)}


def places(port: int, number: int) -> np.ndarray:
    """(n, 2): what the page reads of where the tiles lie."""
    steps = np.frombuffer(get(port, f"/places/{number}.bin")[1], "<i4")
    return np.cumsum(steps.reshape(2, -1), axis=1).T


def values(port: int, run: int, layer: int, number: int) -> np.ndarray:
    """float32 (n,): what the page reads of a layer."""
    raw = np.frombuffer(get(port, f"/values/{run}/{layer}/{number}.bin")[1], np.uint8)
    return np.ascontiguousarray(raw.reshape(4, -1).T).view("<f4")[:, 0]


def test_the_list_tells_every_slide_even_the_unreadable(port: int) -> None:
    index = json.loads(get(port, "/api/index")[1])
    by_id = {s["id"]: s for s in index["slides"]}
    assert set(by_id) == {"a.svs", scored.NASTY, "truncated.svs"}
    assert by_id["a.svs"]["predictions"][0]["decision"] == "tumour"
    assert not by_id["a.svs"]["predictions"][0]["wrong"]
    assert by_id[scored.NASTY]["predictions"][1]["wrong"]
    assert not by_id["truncated.svs"]["readable"]


def test_tiles_are_the_slide_s_own_pixels(port: int, gallery: Gallery) -> None:
    """Put together, the tiles of one zoom level are the picture that the slide gives at that resolution."""
    number = numbers(gallery)["a.svs"]
    about = json.loads(get(port, f"/api/slide/{number}")[1])
    top = int(np.ceil(np.log2(max(about["width"], about["height"]))))
    level, down = top - 2, 4
    w, h = -(-about["width"] // down), -(-about["height"] // down)
    whole = np.zeros((h, w, 3), np.uint8)
    for y in range(0, h, 512):
        for x in range(0, w, 512):
            status, data, _ = get(port, f"/tile/{number}/{level}/{x // 512}_{y // 512}.jpg")
            assert status == 200
            part = picture(data)
            whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    assert not gallery._ask(number, "geometry").note  # decoded directly
    with open_slide(gallery.slides[number].path) as slide:
        expected = slide.read_region(0, 0, (w, h), slide.slide_mpp[0] * down)[..., ::-1]
    assert np.abs(whole.astype(int) - expected).mean() < 4  # JPEG


def test_the_hot_tile_is_the_hot_place_of_the_layer(port: int, gallery: Gallery) -> None:
    for slide in ("a.svs", scored.NASTY):
        number = numbers(gallery)[slide]
        about = json.loads(get(port, f"/api/slide/{number}")[1])
        layer = picture(get(port, f"/layer/0/0/{number}.png?scale=raw")[1])
        down = gallery.layer_place(number).px_l0[0]
        x, y = (places(port, number)[scored.HOT] + np.array(about["tile_l0"]) / 2) / down
        assert layer[int(y), int(x)].tolist() == [*heatmap.palette("viridis")[255][::-1].tolist(), 255]
        assert values(port, 0, 0, number)[scored.HOT] == np.float32(0.9)
        assert about["tiles"] == len(values(port, 0, 0, number))


def test_new_slides_are_shown_with_the_scores_of_their_run(tmp_path: Path, work: Path) -> None:
    """`pipeline score --model RUN slides/` leaves a work folder of its own, without metrics if nothing is labelled."""
    import shutil

    run = tmp_path / "runs" / "old"
    new = run / "new" / "slides"
    shutil.copytree(work, new)
    shutil.copytree(new / "runs" / "one" / "scores", new / "scores")
    (new / "runs" / "one" / "predictions.csv").rename(new / "predictions.csv")
    shutil.rmtree(new / "runs")
    (run / "fold_0").mkdir()
    task = Classification(classes=("benign", "tumour"))
    (run / "fold_0" / "model.json").write_text(records.card(task).text())
    writing.seal(run / "fold_0", {"made": "by hand"})
    found = Gallery(layout.Work(new))
    assert [r.name for r in found.runs] == ["old"]
    told = found.index()["slides"][numbers(found)["a.svs"]]["predictions"][0]
    assert (told["of"], told["value"], told["decision"]) == ("tumour", 0.9, "tumour")
    names = [x["name"] for x in found.about(numbers(found)["a.svs"])["runs"][0]["layers"]]
    assert "contribution_tumour" in names
    found.read.close()


def test_a_damaged_run_or_layer_costs_no_other(tmp_path: Path, work: Path) -> None:
    import shutil

    shutil.copytree(work, tmp_path / "w")
    mine = layout.Work(tmp_path / "w")
    shutil.copytree(mine.run("one"), mine.run("odd"))
    told = json.loads((mine.run("odd") / "metrics.json").read_text())
    (mine.run("odd") / "metrics.json").write_text(json.dumps(told | {"features": None, "task": 3}))
    shutil.rmtree(mine.run("two") / "scores" / "a.svs.zarr")
    found = Gallery(mine)
    assert [r.name for r in found.runs] == ["one", "two"]
    (why,) = [line for line in found.left_out if str(mine.run("odd")) in line]
    assert "metrics.json" in why
    number = numbers(found)["a.svs"]
    one, two = found.about(number)["runs"]
    assert (len(one["layers"]) > 0, one["why"]) == (True, "")
    assert (two["layers"], two["why"]) == ([], "scores are not there")
    for port in serving(found):
        with page() as p:
            p.goto(f"http://127.0.0.1:{port}/#slide=a.svs&run=two")
            p.wait_for_function("() => document.querySelector('.lack').textContent")
            lack = p.locator(".pane[data-side='0'] .lack").inner_text()
            assert lack == "two has no layers here: scores are not there"
            assert p.faults == []
    (mine.run("one") / "truth.json").write_text("{")
    assert "truth.json" in found.truth(0, number)["why"]
    found._layers.cache_clear()
    (mine.run("one") / "scores" / "a.svs.zarr" / "attention" / "zarr.json").write_text("{")
    one, _ = found.about(number)["runs"]
    assert one["layers"] == []
    assert "a.svs.zarr" in one["why"]
    found.read.close()


def test_in_the_browser_with_the_keyboard_alone(port: int, gallery: Gallery, tmp_path: Path) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        first = p.locator(".pane[data-side='0']")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready][data-tissue=ready]")
        assert p.locator("#slides li").count() == 3
        assert scored.NASTY in p.locator("#slides").inner_text()  # escaped, not turned into markup
        assert p.locator("#slides img[src=x]").count() == 0
        before = first.screenshot()
        p.keyboard.press("h")
        p.wait_for_timeout(600)
        assert not p.locator("#heat").is_checked()
        assert first.screenshot() != before
        p.keyboard.press("h")
        for key in ("t", "g", "+", "ArrowRight"):
            p.keyboard.press(key)
        assert p.locator("#tissue").is_checked()
        assert p.locator("#grid").is_checked()
        p.keyboard.press("x")  # go to the highest tile: its number and score are told
        assert f"tile {scored.HOT} at" in first.locator(".readout").inner_text()
        assert "attention: 0.9" in first.locator(".readout").inner_text()
        assert "µm" in first.locator(".scalebar").inner_text()
        p.keyboard.press("0")
        title = p.locator("#title").inner_text()
        p.keyboard.press("n")
        p.wait_for_timeout(1500)
        assert p.locator("#title").inner_text() != title
        p.keyboard.press("s")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        p.wait_for_timeout(500)
        assert p.locator("#run1").is_visible()
        p.keyboard.press("/")
        p.keyboard.type("nasty")
        assert p.locator("#slides li").count() == 1
        p.screenshot(path=str(tmp_path / "viewer.png"))
        assert p.faults == []


def test_the_link_opens_in_the_browser_and_leaves_no_token_there(gallery: Gallery) -> None:
    for port in serving(gallery, token="a-long-enough-token"):
        with page() as p:
            p.goto(f"http://127.0.0.1:{port}/?token=a-long-enough-token")
            p.wait_for_selector(".pane[data-side='0'][data-heat=ready][data-tissue=ready]")
            assert p.url.split("#")[0] == f"http://127.0.0.1:{port}/"
            assert "token" not in p.evaluate("document.cookie + document.referrer + location.href")
            p.reload()
            p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
            assert p.faults == []


def test_two_runs_tell_the_same_tile_and_what_one_of_them_lacks(port: int, gallery: Gallery) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        p.keyboard.press("s")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        p.keyboard.press("x")
        texts = [p.locator(f".pane[data-side='{k}'] .readout").inner_text() for k in (0, 1)]
        assert all(t.startswith(f"tile {scored.HOT} at") for t in texts)
        assert "attention: 0.9" in texts[0]
        assert "attention: 0.9" not in texts[1]  # the other run's own number
        p.select_option("#layer", label="probability tumour")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        assert p.locator(".pane[data-side='1'] .lack").inner_text() == "two has no probability tumour here"
        assert p.locator(".pane[data-side='0'] .lack").inner_text() == ""
        p.keyboard.press("Escape")
        p.keyboard.press("n")  # what was told of the last slide must not stay
        p.wait_for_selector(".pane[data-side='0'] .readout:empty", state="attached")
        assert p.faults == []


def test_hovering_a_tile_tells_its_score(port: int, gallery: Gallery) -> None:
    with page() as p:
        p.goto(f"http://127.0.0.1:{port}/")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        p.keyboard.press("x")
        p.wait_for_timeout(1200)
        box = p.locator("#osd0").bounding_box()
        p.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # the view is centred on it
        text = p.locator(".pane[data-side='0'] .readout").inner_text()
        assert text.startswith(f"tile {scored.HOT} at")
        assert "attention: 0.9" in text
        assert "probability tumour: 0.858" in text  # 1 / (1 + exp(-2 x 0.9))
        p.mouse.move(box["x"] + 3, box["y"] + 3)
        assert p.faults == []
