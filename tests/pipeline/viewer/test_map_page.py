"""The viewer's page of maps in a real browser: points lead to their slide, by pointer and by keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.maps import stored
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline.browser import inaccessible, page
from tests.pipeline.viewer.serving import get, serving


@pytest.fixture(scope="module")
def of_a_map(work: Path) -> Iterator[int]:
    """A map of 100,000 points in a row by hand: all of a.svs, of which only its own tiles are there."""
    coords = reading.read_array(layout.Work(work).tile_store("a.svs"), "coords")
    tiles = []
    for k in range(100_000):
        x, y = coords[k % len(coords)].tolist()
        tiles.append(
            {
                "slide": "a.svs",
                "tile": k % len(coords),
                "x_l0": x,
                "y_l0": y,
                "pca_1": k % 500,
                "pca_2": k // 500,
                "cluster": k % 3,
            }
        )
    one = {"slide": "a.svs", "patient": "P0", "tiles": len(coords), "drawn": 100_000, "by_label": "tumour"}
    who = {"patient": "P0", "slides": "a.svs", "pca_1": 0.0, "pca_2": 0.0, "by_label": "tumour"}
    proto = {
        "of": "cluster",
        "name": "0",
        "cluster": 0,
        "patient": "P0",
        **{k: tiles[1][k] for k in ("slide", "tile", "x_l0", "y_l0")},
    }
    protos = [proto, {**proto, "of": "class", "name": "tumour"}]
    parts = {
        "tiles": tiles,
        "slides": [one],
        "patients": [who],
        "clusters": [{"cluster": 0}],
        "prototypes": protos,
    }
    colour = {"name": "label", "kind": "classes", "column": "by_label", "outcome": True}
    methods = {"tiles": ["pca"], "patients": ["pca"]}
    card = {"run": "one", "methods": methods, "tiles": len(tiles), "attention": False, "colours": [colour]}
    folder = work / "maps" / "by-hand"
    stored.write(folder, card, parts)
    writing.seal(folder, {"made": "by hand"})
    lacking = work / "maps" / "lacking"  # of another version, say
    stored.write(lacking, {k: v for k, v in card.items() if k != "colours"}, parts)
    writing.seal(lacking, {"made": "by hand"})
    found = Gallery(layout.Work(work))
    yield from serving(found)
    found.read.close()


def test_points_are_numbers_in_columns(of_a_map: int) -> None:
    status, body, _ = get(of_a_map, "/points/0.bin")
    whole = np.frombuffer(body, "<i4").reshape(-1, 100_000)
    assert (status, len(whole)) == (200, 7)
    assert whole[4][:4].tolist() == [0, 1, 2, 0]
    assert np.frombuffer(body, "<f4").reshape(-1, 100_000)[6][-1] == 199
    assert get(of_a_map, "/points/2.bin")[0] == get(of_a_map, "/api/map/2")[0] == 404
    status, body, _ = get(of_a_map, "/api/map/0")
    assert (status, json.loads(body)["told"]) == (200, ""), "nothing was left out of it"
    assert get(of_a_map, "/api/map/1")[0] == 500, "what is damaged is not missing"


@pytest.mark.parametrize(("size", "scheme"), [((1400, 900), "light"), ((390, 844), "dark")], ids=str)
def test_a_point_opens_its_slide_at_the_tile(size: tuple[int, int], scheme: str, of_a_map: int) -> None:
    with page(*size, scheme) as p:
        p.goto(f"http://127.0.0.1:{of_a_map}/map")
        p.wait_for_selector("#plane[data-drawn='100000']")
        assert inaccessible(p) == []
        assert p.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert p.locator("#key").inner_text().splitlines() == ["0 (33334)", "1 (33333)", "2 (33333)"]
        p.select_option("#colour", "by label")
        assert p.locator("#key").inner_text() == "tumour (100000)"
        p.locator("#plane").focus()
        for key in ("+", "ArrowRight", "ArrowUp", "-", "0", " "):
            p.keyboard.press(key)
        p.wait_for_selector("#card a")
        told = p.locator("#card").inner_text()
        assert "a.svs" in told
        assert "label: tumour" in told
        href = p.locator("#card a").get_attribute("href")
        assert href.startswith("/#slide=a.svs&run=one&x=")
        p.keyboard.press("Enter")
        p.wait_for_selector(".pane[data-side='0'][data-heat=ready]")
        assert p.evaluate("document.title") == "a.svs"
        assert p.evaluate("location.hash").startswith("#slide=a.svs")
        p.go_back()
        p.wait_for_selector("#plane[data-drawn='100000']")
        assert p.locator("#colour").input_value() == "by label", "the address kept it"
        p.select_option("#points", "patients")
        p.wait_for_selector("#plane[data-drawn='1']")
        assert p.locator("#crops a").count() == 1
        p.select_option("#group", "class tumour")
        p.select_option("#method", "pca")
        p.click("#fit")
        q = p.context.browser.new_page()  # shared: the same choices
        q.goto(p.url)
        q.wait_for_selector("#plane[data-drawn='1']")
        assert q.url == p.url
        assert "map=by-hand&points=patients&method=pca&colour=by+label&group=class+tumour" in q.url
        q.keyboard.press("Tab")
        q.keyboard.press("Enter")
        assert q.evaluate("document.activeElement.id") == "plane"
        assert q.url == p.url, "the skip link leaves the address alone"
        q.select_option("#maps", label="lacking")
        q.wait_for_selector("#message:not([hidden])")
        # a page that is left gives up the pictures it still waits for
        assert [f for f in p.faults if "ERR_ABORTED" not in f] == []
