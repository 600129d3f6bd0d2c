"""The viewer's page in a real browser: every control, at three widths, light and dark, by pointer, touch and keys."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mhim.pipeline.store import layout
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline import scored
from tests.pipeline.browser import inaccessible, page
from tests.pipeline.viewer.serving import READY, SIZES, TOKEN, opened, serving, shown

NAME = "e => e.id || `${e.tagName} ${e.dataset.slide || e.getAttribute('aria-label')}`"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_control_by_keyboard_alone(size: tuple[int, int], scheme: str, with_token: int) -> None:
    """Each control is reached by Tab and shows its focus; keys open and close panels; axe finds no serious fault."""
    with page(*size, scheme) as p:
        opened(p, with_token)
        dark = p.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--dark').trim()")
        assert dark == ("1" if scheme == "dark" else "0")
        assert inaccessible(p) == []
        assert p.evaluate("document.documentElement.scrollWidth") <= size[0]
        if size[0] < 820:
            for opener in ("#menu", "#more"):
                p.locator(opener).focus()
                p.keyboard.press("Enter")
            p.wait_for_timeout(300)
        reached = tabbed(p)
        wanted = p.evaluate(
            "[...document.querySelectorAll('button, select, input, a, [tabindex]')].filter(e => e.tabIndex >= 0 &&"
            f" !e.disabled && e.checkVisibility({{visibilityProperty: true}})).map({NAME})"
        )
        assert {"skip", "search", "run0", "layer", "palette", "heat", "fit", "png", "osd0", "theme"} <= set(wanted)
        assert set(wanted) <= {name for name, _ in reached}
        assert [name for name, outline in reached if not outline] == []
        for key, panel in (("v", "#tiles"), ("r", "#regions"), ("?", "#keys")):
            p.locator("#osd0").focus()
            p.keyboard.press(key)
            p.wait_for_selector(f"{panel}:not([hidden])")
            p.wait_for_timeout(500)
            assert inaccessible(p) == [], panel
            p.keyboard.press("Escape")
            p.wait_for_selector(panel, state="hidden")
        assert p.evaluate("document.activeElement.id") == "osd0"
        assert p.faults == []


def tabbed(p: Any) -> list[tuple[str, bool]]:
    """(id or class, whether its focus is seen) of everything that Tab reaches, once around."""
    p.evaluate("document.activeElement.blur()")
    found: list[tuple[str, bool]] = []
    for _ in range(80):
        p.keyboard.press("Tab")
        at = p.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e), pane = e.closest('.pane');"
            " const around = pane && getComputedStyle(pane, '::after').borderTopWidth === '3px';"
            f" return [({NAME})(e), around || (s.outlineStyle !== 'none' && s.outlineWidth !== '0px')]; }})()"
        )
        if found and at[0] == found[0][0]:
            break
        if not at[0].startswith("BODY"):
            found.append((at[0], at[1]))
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_control_by_pointer(size: tuple[int, int], with_token: int, tmp_path: Path) -> None:
    with page(*size) as p:
        opened(p, with_token)
        if size[0] < 820:
            p.click("#more")
        view = p.locator("#osd0")
        for control in ("heat", "tissue", "grid", "map"):
            before = view.screenshot(), p.locator(".pane[data-side='0']").screenshot()
            p.click(f"#{control}")
            p.wait_for_timeout(700)
            assert (view.screenshot(), p.locator(".pane[data-side='0']").screenshot()) != before, control
            p.click(f"#{control}")
        p.select_option("#palette", "cividis")
        p.select_option("#scale", "raw")
        p.select_option("#layer", label="contribution tumour")
        p.select_option("#run0", label="one")
        p.select_option("#zoom", "20")
        told = shown(p)
        assert (told["colours"], told["scale"], told["layer"]) == ("cividis", "raw", "contribution_tumour")
        assert (float(told["um"]), p.locator("#zoom option").first.inner_text()) == (0.5, "20.0×")
        p.click("#fit")
        assert float(shown(p)["um"]) != 0.5
        with p.expect_download() as saved:
            p.click("#png")
        saved.value.save_as(tmp_path / "view.png")
        assert re.fullmatch(r"[\w.+-]+_one_contribution_tumour\.png", saved.value.suggested_filename)
        picture = cv2.imread(str(tmp_path / "view.png"))
        box = view.bounding_box()
        assert picture.shape[:2] == (round(box["height"]) + 64, round(box["width"]))
        strip = picture[-64:]
        assert (strip.max(2) < 40).sum() > 300  # the captions and the scale bar
        assert (np.ptp(strip.astype(int), axis=2) > 40).sum() > 500  # the colour bar
        p.select_option("#theme", "dark")
        assert p.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 30)"
        p.reload()
        p.wait_for_selector(READY)
        assert p.locator("#theme").input_value() == "dark"  # remembered
        p.click("#full")
        p.wait_for_function("() => document.fullscreenElement !== null || document.getElementById('said').textContent")
        assert p.faults == []


def test_the_address_tells_the_view_and_never_the_token(with_token: int) -> None:
    with page() as p:
        opened(p, with_token)
        p.select_option("#run0", label="one")
        p.select_option("#scale", "raw")
        p.keyboard.press("Escape")
        p.keyboard.press("x")
        p.keyboard.press("s")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        told, address = shown(p), p.url
        assert TOKEN not in address
        assert (told["run"], told["right"], told["scale"]) == ("one", "two", "raw")
        p.reload()
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        assert shown(p) == told
        p.keyboard.press("n")
        p.wait_for_function(f"() => !location.hash.includes({json.dumps(told['slide'])})")
        p.wait_for_timeout(500)
        other = shown(p)
        assert other["slide"] != told["slide"]
        p.go_back()
        p.wait_for_function(f"() => document.title === {json.dumps(told['slide'])}")
        p.wait_for_selector(READY)
        assert shown(p) == told
        assert p.faults == []
        q = p.context.browser.new_page(viewport={"width": 900, "height": 700})  # the same place and magnification
        q.goto(f"http://127.0.0.1:{with_token}/?token={TOKEN}{address[address.index('#') :]}")
        q.wait_for_selector(READY)
        there = shown(q)
        assert {k: there[k] for k in ("slide", "run", "layer")} == {k: told[k] for k in ("slide", "run", "layer")}
        places = [[float(a[k]) for k in ("x", "y", "um")] for a in (there, told)]
        assert np.allclose(*places, rtol=0.01)
        q.goto(f"http://127.0.0.1:{with_token}/#slide=gone.svs")
        q.reload()
        q.wait_for_selector("#message:not([hidden])")
        assert "not in this work folder" in q.locator("#message").inner_text()


def test_the_colour_bar_and_the_decision_say_numbers(with_token: int, gallery: Gallery) -> None:
    with page() as p:
        opened(p, with_token, "#slide=a.svs&run=one&layer=attention&scale=raw")
        ticks = ".pane[data-side='0'] .ticks span"
        p.wait_for_selector(ticks)
        low, *_, high = (t for t in p.locator(ticks).all_inner_texts())
        assert (low, high) == ("0", "0.9")
        verdict = p.locator(".pane[data-side='0'] .verdict").inner_text()
        assert "P(tumour) 0.9 ≥ threshold 0.5 → tumour label tumour" in " ".join(verdict.split())
        p.select_option("#scale", "percentile")
        p.wait_for_function(
            f"() => [...document.querySelectorAll({json.dumps(ticks)})].some(t => t.textContent.includes('50 %'))"
        )
        median = p.locator(ticks).nth(2).inner_text().split()[0]
        n = len(gallery._coords([s.id for s in gallery.slides].index("a.svs")))
        assert float(median) == pytest.approx(np.median(scored.attention(n)), rel=0.01)


def test_tiles_by_score_jump_to_their_place(with_token: int) -> None:
    with page() as p:
        opened(p, with_token, "#slide=a.svs&run=one&layer=attention")
        p.keyboard.press("v")
        p.wait_for_selector("#crops button")
        first = p.locator("#crops button").first
        assert (first.get_attribute("data-tile"), first.locator(".name").inner_text()) == (str(scored.HOT), "0.9")
        p.wait_for_function("() => document.querySelector('#crops img').naturalWidth > 50")
        before = shown(p)
        p.wait_for_function("() => document.activeElement.dataset.tile !== undefined")
        p.keyboard.press("Enter")
        assert shown(p)["um"] != before["um"]
        assert f"tile {scored.HOT} at" in p.locator(".pane[data-side='0'] .readout").inner_text()
        p.select_option("#order", "bottom")
        p.wait_for_function("() => document.querySelector('#crops .name').textContent === '0'")
        p.select_option("#order", "cluster")
        p.wait_for_function("() => document.getElementById('tilenote').textContent.includes('has no features')")
        assert p.locator("#crops button").count() == 0
        assert p.faults == []


def test_regions_are_drawn_by_pointer_keyboard_and_freehand_and_saved(with_token: int, gallery: Gallery) -> None:
    number = [s.id for s in gallery.slides].index("a.svs")
    with page() as p:
        opened(p, with_token, "#slide=a.svs")
        p.keyboard.press("r")
        p.fill("#regionclass", "Exclude")
        p.click("#polygon")
        p.locator("#osd0").focus()
        for key in (",", "ArrowRight", ",", "ArrowDown", ",", "Enter"):
            p.keyboard.press(key)
            p.wait_for_timeout(100 if key == "," else 700)
        assert p.locator("#regionlist li").count() == 1
        box = p.locator("#osd0").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        p.fill("#regionclass", "Tissue")
        for dx, dy in ((-100, -100), (80, -90), (60, 90)):
            p.mouse.click(x + dx, y + dy)
            p.wait_for_timeout(500)  # two clicks at once would be a double click
        p.click("#undo")
        p.mouse.click(x + 70, y + 80)
        p.click("#close")
        assert p.locator("#regionlist li").count() == 2
        p.click("#freehand")
        p.mouse.move(x - 50, y)
        p.mouse.down()
        for k in range(12):
            p.mouse.move(x + 50 * np.sin(k / 2), y - 50 * np.cos(k / 2))
        p.mouse.up()
        p.wait_for_function("() => document.querySelectorAll('#regionlist li').length === 3")
        p.locator("#regionlist input").nth(2).fill("Stroma")
        p.locator("#regionlist input").nth(2).press("Tab")
        assert p.locator("#regionnote").inner_text() == "not saved"
        with p.expect_download() as saved:
            p.click("#getregions")
        names = [
            f["properties"].get("classification", {}).get("name")
            for f in json.loads(saved.value.path().read_text())["features"]
        ]
        assert names == ["Exclude", "Tissue", "Stroma"]
        p.click("#saveregions")
        p.wait_for_function("() => document.getElementById('regionnote').textContent.endsWith('a.svs.geojson')")
        kept = gallery.regions(number)["regions"]
        assert [r["name"] for r in kept] == names
        w, h = gallery.slides[number].geometry.size_l0
        corners = np.array(kept[1]["rings"][0])
        assert len(corners) == 4  # three, and the ring is closed
        assert ((corners > 0) & (corners < (w, h))).all()
        right, down = np.diff(np.array(kept[0]["rings"][0])[:3], axis=0)
        assert right[0] > 0
        assert down[1] > 0
        assert max(abs(right[1]), abs(down[0])) < 2
        p.reload()
        p.wait_for_selector(READY)
        p.keyboard.press("r")
        p.wait_for_function("() => document.querySelectorAll('#regionlist li').length === 3")
        for _ in range(3):
            p.locator("#regionlist button", has_text="delete").first.click()
        p.click("#saveregions")
        p.wait_for_function("() => document.getElementById('regionnote').textContent === 'none yet'")
        assert gallery.regions(number) == {"regions": [], "file": ""}
        assert p.faults == []


def test_touch_tells_a_tile_and_opens_slides_on_a_narrow_screen(with_token: int) -> None:
    with page(390, 844, touch=True) as p:
        opened(p, with_token, "#slide=a.svs&run=one")
        p.keyboard.press("x")
        p.wait_for_timeout(900)
        box = p.locator("#osd0").bounding_box()
        p.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        p.wait_for_function(f"() => document.querySelector('.readout').textContent.includes('tile {scored.HOT} at')")
        assert not p.locator("#side").is_visible()
        p.tap("#menu")
        p.wait_for_timeout(400)
        p.locator("#slides button", has_text="nasty").tap()
        p.wait_for_function("() => document.title.includes('nasty')")
        p.wait_for_timeout(400)
        assert not p.locator("#side").is_visible()
        assert p.faults == []


def test_three_thousand_slides_are_listed_in_two_seconds(work: Path, gallery: Gallery, tmp_path: Path) -> None:
    many, real = layout.Work(tmp_path / "many"), layout.Work(work)
    many.tiles.mkdir(parents=True)
    long = "a-name-that-is-far-too-long-for-one-line-" * 4
    ids = [f"{long if k == 7 else 'slide'}_{k:04d}.svs" for k in range(3000)]
    path = next(s.path for s in gallery.slides if s.id == "a.svs")
    many.cohort.write_text("slide,path,mpp,regions,series\n" + "".join(f"{i},{path},,,\n" for i in ids))
    for one in ids:
        many.tile_store(one).symlink_to(real.tile_store("a.svs"))
    began = time.monotonic()
    found = Gallery(many)
    started = time.monotonic() - began
    for port in serving(found):
        with page() as p:
            p.goto(f"http://127.0.0.1:{port}/")
            p.wait_for_selector("#slides li")
            listed = p.evaluate("performance.now()") / 1000
            assert (started < 4, listed < 2) == (True, True), (started, listed)
            assert p.locator("#count").inner_text() == "3000 of 3000 slides"
            assert p.locator("#slides li").count() < 60  # those in sight
            heights = set(p.evaluate("[...document.querySelectorAll('#slides li .text')].map(e => e.offsetHeight)"))
            assert len(heights) == 1  # the long name too takes one line
            p.locator("#slides button[tabindex='0']").focus()
            p.keyboard.press("End")
            p.wait_for_function("() => document.activeElement.dataset.row === '2999'")
            p.keyboard.press("ArrowUp")
            p.keyboard.press("Enter")
            p.wait_for_function("() => document.title === 'slide_2998.svs'")
            p.keyboard.press("/")
            p.keyboard.type("_1234")
            p.wait_for_function("() => document.getElementById('count').textContent === '1 of 3000 slides'")
            assert p.faults == []
    found.read.close()
