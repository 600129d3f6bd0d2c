"""The controls of the viewer that no other test of its page drives, by pointer, at three widths; none is forgotten."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.pipeline.browser import page
from tests.pipeline.viewer.driving import driven
from tests.pipeline.viewer.serving import READY, SIZES, TOKEN, opened, shown

PARTS = (".verdict", ".legend", ".scalebar", ".navigator", ".readout")  # boxes that lie on a pane
OVERLAPS = """parts => {
  const pane = document.querySelector('.pane'), found = parts.map(s => [s, pane.querySelector(s)]);
  const seen = found.filter(([, e]) => e && e.checkVisibility() && (e.textContent || e.children.length));
  const boxes = seen.map(([s, e]) => [s, e.getBoundingClientRect()]).filter(([, b]) => b.width);
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return boxes.flatMap(([s, a], k) => boxes.slice(k + 1).filter(([, b]) => meet(a, b)).map(([t]) => `${s} ${t}`));
}"""


@pytest.mark.parametrize("name", ["index.html", "map.html"])
def test_every_control_of_both_pages_is_driven_by_a_test(name: str) -> None:
    text = files("mhim.pipeline.viewer").joinpath("static", name).read_text()
    controls = set(re.findall(r'<(?:button|select|input)\b[^>]* id="(\w+)"', text))
    assert len(controls) >= {"index.html": 33, "map.html": 6}[name]
    own = [p for p in Path(__file__).parent.glob("test_*.py") if ("map" in p.name) == (name == "map.html")]
    assert sorted(controls - set().union(*(driven(path.read_text()) for path in own))) == []


def test_only_what_is_acted_on_is_driven() -> None:
    source = """
for control, panel in (("heat", "#tiles"), ("grid", "#keys")):
    p.click(f"#{control}")
    p.wait_for_selector(panel)
p.locator("#opacity").fill("100")
q.select_option("#maps", label="two")
p.goto("/#map=1"), cli("map"), p.locator("#zoom option").first.inner_text(), p.click("#keys .close")
"""
    assert driven(source) == {"heat", "grid", "opacity", "maps"}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_filters_panels_and_two_runs(size: tuple[int, int], with_token: int) -> None:
    with page(*size) as p:
        p.context.grant_permissions(["clipboard-read", "clipboard-write"])
        opened(p, with_token, "#slide=a.svs&run=two&layer=attention")
        p.keyboard.press("x")  # a tile is told too
        p.wait_for_function("() => document.querySelector('.readout').textContent.includes('attention: 0')")
        assert p.evaluate(OVERLAPS, PARTS) == [], "what is told of a view is legible"
        narrow = size[0] < 820
        if narrow:
            p.click("#menu")
            p.wait_for_timeout(400)
        p.check("#wrong")  # the run calls the benign one tumour
        assert p.locator("#count").inner_text() == "1 of 3 slides"
        p.uncheck("#wrong")
        p.select_option("#label", "tumour")
        assert [t.split("\n")[0] for t in p.locator("#slides li").all_inner_texts()] == ["a.svs"]
        p.fill("#search", "nothing is called so")
        assert p.locator("#count").inner_text() == "0 of 3 slides"
        assert not p.locator("#maplink").is_visible(), "this cohort has no map"
        if narrow:
            p.keyboard.press("Escape")
            p.click("#more")
        pane = p.locator(".pane[data-side='0']")
        before = pane.screenshot()
        p.locator("#opacity").fill("100")
        p.wait_for_timeout(500)
        assert pane.screenshot() != before
        p.click("#two")
        p.wait_for_selector(".pane[data-side='1'][data-heat=ready]")
        p.select_option("#run1", label="one")
        p.wait_for_function(
            "() => document.querySelector(\".pane[data-side='1'] .verdict\").textContent.startsWith('one')"
        )
        assert shown(p)["right"] == "one"
        p.click("#link")
        p.wait_for_function("() => document.getElementById('said').textContent.includes('address')")
        copied = p.evaluate("navigator.clipboard.readText()")
        assert (copied, TOKEN in copied) == (p.url, False)
        for button, panel in (("#tilesbutton", "#tiles"), ("#drawbutton", "#regions")):
            p.click(button)
            p.wait_for_selector(f"{panel}:not([hidden])")
            p.click(f"{panel} .close")
            p.wait_for_selector(panel, state="hidden")
        p.click("#drawbutton")
        p.click("#polygon")
        for k in range(3):
            p.click("#corner")
            p.locator("#osd0").press("ArrowDown" if k else "ArrowRight")
            p.wait_for_timeout(700)
        p.click("#close")
        assert p.locator("#regionlist li").count() == 1
        p.click("#help")
        assert p.locator("#keys").is_visible()
        p.click("#keys .close")  # it may lie over the button that opened it
        assert not p.locator("#keys").is_visible()
        address = p.url
        p.reload()
        p.wait_for_selector(READY)
        p.keyboard.press("Tab")
        assert p.evaluate("document.activeElement.id") == "skip"
        p.keyboard.press("Enter")
        assert (p.evaluate("document.activeElement.id"), p.url) == ("osd0", address)
        assert p.faults == []
