"""What `score --truth` kept is seen in the viewer: an outline, a layer, each tile's share, and how well maps point."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.results import tile_truth, truth
from mhim.pipeline.store import layout, reading
from mhim.pipeline.viewer.data import Gallery
from tests.pipeline import scored
from tests.pipeline.browser import inaccessible, page
from tests.pipeline.viewer.serving import get, serving

SHARE = 0.75  # of the hottest tile


@pytest.fixture(scope="module")
def known(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    """The run `one` was held against a box over three quarters of the hottest tile of a.svs."""
    run, store = layout.Work(work).run("one"), layout.Work(work).tile_store("a.svs")
    coords = np.asarray(reading.read_array(run / "scores" / "a.svs.zarr", "coords"))
    (x, y), (w, h) = coords[scored.HOT].tolist(), reading.read_attrs(store)["tile_l0"]
    told = truth.Told(
        np.where(np.arange(len(coords)) == scored.HOT, SHARE, 0.0),
        (np.array([[x, y], [x + SHARE * w, y], [x + SHARE * w, y + h], [x, y + h]], float),),
    )
    fields = {"input.scores": "made by hand"}  # the fingerprint of these scores
    kept = [tile_truth.Kept("a.svs", told, "a.svs.geojson", fields)]
    tile_truth.keep(run, kept, tmp_path_factory.mktemp("private"))
    maps = {"attention": scored.attention(len(coords))}
    grid = truth.grid_of(coords, {"tile_l0": [w, h]})
    truth.write(run, [truth.Known("a.svs", told.true, maps, grid, "fold_0", len(coords))], 0, {})
    found = Gallery(layout.Work(work))
    yield found
    found.read.close()


def test_the_truth_is_a_layer_of_the_run_that_was_held_against_it(known: Gallery) -> None:
    number = [s.id for s in known.slides].index("a.svs")
    one, two = known.about(number)["runs"]
    assert one["layers"][-1] == {"name": "truth", "signed": False, "means": "share of the tile"}
    assert (one["truth"], two["truth"]) == (True, False)
    assert "truth" not in [layer["name"] for layer in two["layers"]], "of a run that was not, nothing is guessed"
    scores = known._layers(0, number)[-1].scores
    assert (scores[scored.HOT], scores.sum()) == (SHARE, SHARE)
    for port in serving(known):
        status, body, _ = get(port, f"/truth/0/{number}")
        told = json.loads(body)
        assert (status, told["file"], [len(r) for r in told["rings"]]) == (200, "a.svs.geojson", [8])
        assert told["maps"]["attention"]["pointing"] == 1.0
        assert json.loads(get(port, f"/truth/1/{number}")[1]) == {"file": "", "rings": [], "maps": {}, "why": ""}
        assert get(port, "/truth/7/0")[0] == 404


def test_outline_share_and_numbers_are_shown(known: Gallery) -> None:
    ink = "document.querySelector('.pane canvas:not(.osd canvas)').toDataURL()"
    for port in serving(known):
        with page() as p:
            p.goto(f"http://127.0.0.1:{port}/#slide=a.svs&run=one&layer=attention")
            p.wait_for_selector("#truthlabel:not([hidden])")
            p.wait_for_function(
                "() => document.querySelector('.points').textContent.includes('highest tile true in 100')"
            )
            assert "tile AUC 1 over 1 slides" in p.locator(".points").first.inner_text()
            p.locator("#osd0").focus()
            with_outline = p.evaluate(ink)
            p.keyboard.press("o")
            assert not p.locator("#truth").is_checked()
            assert p.evaluate(ink) != with_outline
            p.click("#truth")
            p.wait_for_function(f"told => {ink} === told", arg=with_outline)
            assert inaccessible(p) == []
            p.set_viewport_size({"width": 390, "height": 844})
            p.click("#more")
            assert p.locator("#truth").is_visible()
            assert inaccessible(p) == []
            p.click("#more")
            p.set_viewport_size({"width": 1400, "height": 900})
            p.locator("#osd0").focus()
            p.keyboard.press("x")
            p.wait_for_function("() => document.querySelector('.readout').textContent.includes('truth: 0.75')")
            p.select_option("#layer", "truth")
            p.wait_for_function("() => document.querySelector('.what').textContent === 'truth (share of the tile)'")
            p.select_option("#run0", label="two")
            p.wait_for_selector("#truthlabel", state="hidden")
            assert p.faults == []
