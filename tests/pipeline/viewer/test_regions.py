"""Regions drawn in the viewer: who may save them, where they land, and that `tile --regions` takes them."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhim.extract.tiles import regions
from mhim.pipeline.cohort.labels import use
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.store import layout, reading
from mhim.pipeline.viewer import drawn
from mhim.pipeline.viewer.data import Gallery
from tests.extract.slides import tissue_rgb, write_svs
from tests.pipeline.viewer.serving import get, serving

TOKEN = "a-long-enough-token"
RING = [[256.0, 256.0], [1280.0, 256.0], [1280.0, 768.0], [256.0, 768.0]]
SENT = {"regions": [{"name": "Tissue", "rings": [RING]}, {"name": "", "rings": [RING]}]}
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def tiled(tmp_path: Path, cli: Cli) -> Path:
    (tmp_path / "s" / "sub").mkdir(parents=True)
    write_svs(tmp_path / "s" / "sub" / "a.svs", tissue_rgb())
    write_svs(tmp_path / "s" / "b.svs", tissue_rgb())
    assert cli("tile", tmp_path / "s", "--work", tmp_path / "w", *SETTINGS)[0] == 0
    return tmp_path / "w"


SETTINGS = ("--workers", 1, "--tile-px", 64, "--set", "tile.blur_probe_um=0")


@pytest.fixture
def gallery(tiled: Path) -> Iterator[Gallery]:
    made = Gallery(layout.Work(tiled))
    yield made
    made.read.close()


def post(port: int, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request("POST", path, body, {k: v for k, v in given.items() if v})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_what_is_drawn_is_saved_shown_again_and_taken_by_tile(tiled: Path, gallery: Gallery, cli: Cli) -> None:
    number = [s.id for s in gallery.slides].index("sub/a.svs")
    for port in serving(gallery, token=TOKEN):
        status, said = post(port, f"/api/regions/{number}", json.dumps(SENT).encode())
        assert (status, json.loads(said)["file"]) == (200, str(tiled / "regions" / "sub" / "a.svs.geojson"))
        back = json.loads(get(port, f"/api/regions/{number}", Authorization=f"Bearer {TOKEN}")[1])
        closed = [[*RING, RING[0]]]
        assert back["regions"] == [{"name": "Tissue", "rings": closed}, {"name": "", "rings": closed}]
    found = regions.read(tiled / "regions" / "sub" / "a.svs.geojson")
    assert [r.role for r in found.regions] == ["tissue", "include"]
    (tiled / "regions" / "sub" / "A.svs.geojson").write_text("{}")  # of no slide
    again = layout.Work(tiled.parent / "w2")
    code, said = cli(
        "tile", tiled.parent / "s", "--work", again.root, *SETTINGS, "--regions",
        tiled / "regions",
    )  # fmt: skip
    assert code == 0, said
    assert "regions of 1 slide taken from it; files called as no slide here is: 1 (sub/A.svs.geojson)" in said
    coords = np.asarray(reading.read_array(again.tile_store("sub/a.svs"), "coords"))
    centres = coords + np.asarray(reading.read_attrs(again.tile_store("sub/a.svs"))["tile_l0"]) / 2
    assert len(centres) > 3
    assert ((centres >= (256, 256)) & (centres <= (1280, 768))).all()
    assert reading.read_array(again.tile_store("b.svs"), "coords").shape == gallery._coords(1 - number).shape


def test_regions_of_the_tiling_are_shown_where_they_were_tiled(gallery: Gallery, tmp_path: Path) -> None:
    polygon = {"type": "Polygon", "coordinates": [[*RING, RING[0]]]}
    (tmp_path / "own.geojson").write_text(json.dumps({"type": "Feature", "geometry": polygon, "properties": {}}))
    shown = gallery.slides[0]
    for frame, shift in (("auto", (100, 50)), ("bounds", (100, 50)), ("full", (0, 0))):
        tiles = {**(shown.tiles or {}), "bounds_l0": [100, 50, 1000, 700], "settings": {"input.regions_frame": frame}}
        gallery.slides[0] = replace(shown, tiles=tiles, regions=tmp_path / "own.geojson")
        (region,) = gallery.regions(0)["regions"]
        assert region["rings"][0][0] == [RING[0][0] + shift[0], RING[0][1] + shift[1]], frame


@pytest.mark.parametrize("frame", ["auto", "bounds", "full"])
def test_what_the_viewer_saves_says_where_it_counts_from(tmp_path: Path, frame: str) -> None:
    origin, file = (300, 220), tmp_path / "a.geojson"
    file.write_text(drawn.text(SENT, origin, (4000, 3000)))
    assert json.loads(file.read_text())["features"][0]["geometry"]["coordinates"][0][0] == [256 - 300, 256 - 220]
    found = regions.read(file, origin, frame)  # type: ignore[arg-type]
    assert found.regions[0].polygons[0][0].tolist() == [*RING, RING[0]]
    assert (found.frame, found.origin_l0, found.notes) == ("bounds", origin, ())
    assert drawn.read(file, origin, frame)[0]["rings"] == [[*RING, RING[0]]]
    bare = json.loads(file.read_text())
    del bare["counted_from"]  # of another program: the setting decides
    file.write_text(json.dumps(bare))
    shift = {"auto": (0, 0), "bounds": (0, 0), "full": (-300, -220)}[frame]
    ring = regions.read(file, origin, frame).regions[0].polygons[0][0]  # type: ignore[arg-type]
    assert ring[0].tolist() == [256 + shift[0], 256 + shift[1]]


def test_run_takes_the_folder_too(tiled: Path, cli: Cli) -> None:
    labels = tiled.parent / "labels.csv"
    labels.write_text("slide,patient,label\nsub/a.svs,p,yes\nb.svs,q,no\n")
    ask = ("run", tiled.parent / "s", "--work", tiled.parent / "w2", "--labels", labels, *SETTINGS, "--dry-run")
    (tiled.parent / "drawn").mkdir()
    (tiled.parent / "drawn" / "b.svs.geojson").write_text(drawn.text(SENT, (0, 0), (4000, 3000)))
    code, said = cli(*ask, "--regions", tiled.parent / "drawn")
    assert code == 0, said
    assert "regions of 1 slide taken from it" in said
    code, said = cli(*ask, "--regions", tiled.parent / "none")
    assert code == 2
    assert "is no folder" in said


def test_damaged_regions_fail_their_own_slide_only(tiled: Path, cli: Cli) -> None:
    folder = tiled.parent / "drawn"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.svs.geojson").write_text('{"type": "FeatureColl')
    polygon = {"type": "Polygon", "coordinates": [[*RING, RING[0]]]}
    whole = {"type": "Feature", "geometry": polygon, "properties": {"objectType": "annotation"}}
    (folder / "sub" / "a.svs.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [whole]}))
    again = layout.Work(tiled.parent / "w2")
    code, said = cli("tile", tiled.parent / "s", "--work", again.root, *SETTINGS, "--regions", folder)
    assert code == 1, said
    assert "failed b.svs: regions file b.svs.geojson is no GeoJSON" in said
    assert reading.stored(again.tile_store("b.svs")) is None
    assert len(reading.read_array(again.tile_store("sub/a.svs"), "coords")) > 3


def test_regions_that_fit_no_slide_are_told(tiled: Path, cli: Cli) -> None:
    (tiled / "regions").mkdir()
    for folder, words in ((tiled / "regions", "like b.svs.geojson"), (tiled / "none", "is no folder")):
        code, said = cli("tile", tiled.parent / "s", "--work", tiled, *SETTINGS, "--regions", folder)
        assert code == 2
        assert words in " ".join(said.split())


def test_packed_regions_are_taken_and_two_files_of_a_slide_refused(tmp_path: Path) -> None:
    slides = [SlideEntry("a.svs", tmp_path / "a.svs"), SlideEntry("b.svs", tmp_path / "b.svs")]
    (tmp_path / "b.svs.geojson.gz").write_bytes(b"")
    (tmp_path / "c.geojson.gz").write_bytes(b"")
    found, told = use.drawn_on(slides, tmp_path)
    assert [s.regions for s in found] == [None, tmp_path / "b.svs.geojson.gz"]
    assert told.endswith("regions of 1 slide taken from it; files called as no slide here is: 1 (c.geojson.gz)")
    (tmp_path / "b.svs.geojson").write_text("")
    with pytest.raises(
        CohortError, match=r"b\.svs\.geojson and b\.svs\.geojson\.gz in .* are both of b\.svs: keep one"
    ):
        use.drawn_on(slides, tmp_path)


def test_no_region_left_means_no_file(gallery: Gallery, tiled: Path) -> None:
    gallery.save_regions(0, SENT)
    path = drawn.file_of(gallery.work, gallery.slides[0].id)
    assert path.exists()
    assert gallery.save_regions(0, {"regions": []})["file"] == ""
    assert not path.exists()
    assert gallery.regions(0) == {"regions": [], "file": ""}


def test_who_may_save(gallery: Gallery, tiled: Path) -> None:
    body = json.dumps(SENT).encode()
    for port in serving(gallery, token=TOKEN):
        refused: list[dict[str, str]] = [
            {"Authorization": ""},
            {"Authorization": "Bearer wrong"},
            {"Host": "evil.example"},
            {"Origin": "http://evil.example"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Content_Type": "text/plain"},
            {"Content_Type": "application/x-www-form-urlencoded"},
        ]
        for headers in refused:
            assert post(port, "/api/regions/0", body, **headers)[0] == 403, headers
        for path in ("/api/regions/99", "/api/slide/0", "/api/regions/../0", "/regions/0"):
            assert post(port, path, body)[0] == 404, path
        assert post(port, "/api/regions/0", body, Content_Length=str(1 << 30))[0] == 411  # ten digits
        assert post(port, "/api/regions/0", body, Content_Length=str(drawn.MAX_BYTES + 1))[0] == 413
        assert not (tiled / "regions").exists()
        assert (
            post(port, "/api/regions/0", body, Origin=f"http://127.0.0.1:{port}", Sec_Fetch_Site="same-origin")[0]
            == 200
        )
    for port in serving(gallery):  # --no-token: everybody may look, and take what was drawn along
        shutil.rmtree(tiled / "regions")
        status, said = post(port, "/api/regions/0", body)
        assert (status, "--no-token" in said) == (403, True)
        assert not (tiled / "regions").exists()
        status, said = post(port, "/geojson/0", body)
        assert (status, len(json.loads(said)["features"])) == (200, 2)
        assert post(port, "/geojson/0", body, Origin="http://evil.example")[0] == 403


BAD: list[Any] = [
    [],
    {"regions": 3},
    {"regions": [{"name": "a", "rings": []}]},
    {"regions": [{"name": 4, "rings": [RING]}]},
    {"regions": [{"name": "x" * 81, "rings": [RING]}]},
    {"regions": [{"name": "a\nb", "rings": [RING]}]},
    {"regions": [{"name": "a", "rings": [RING[:2]]}]},
    {"regions": [{"name": "a", "rings": [[[0, 0], [1, "x"], [2, 2]]]}]},
    {"regions": [{"name": "a", "rings": [[[0, 0], [1, True], [2, 2]]]}]},
    {"regions": [{"name": "a", "rings": [[[0, 0], [1, 1e400], [2, 2]]]}]},
    {"regions": [{"name": "a", "rings": [[[0, 0], [1, 1, 1], [2, 2]]]}]},
    {"regions": [{"name": "", "rings": [RING]}] * 5001},
]


def test_what_is_no_drawing_is_refused(gallery: Gallery, tiled: Path) -> None:
    for port in serving(gallery, token=TOKEN):
        for sent in BAD:
            assert post(port, "/api/regions/0", json.dumps(sent).encode())[0] == 400, sent
        assert post(port, "/api/regions/0", b"{")[0] == 400
        assert post(port, "/api/regions/0", b"[" * 100_000)[0] == 400
    assert not (tiled / "regions").exists()


def test_corners_beyond_the_slide_are_moved_to_its_edge(gallery: Gallery) -> None:
    text = gallery.drawing(0, {"regions": [{"name": "a", "rings": [[[-9, -9], [1e9, 0], [5, 1e9]]]}]})
    corners = np.array(json.loads(text)["features"][0]["geometry"]["coordinates"][0])
    w, h = gallery.slides[0].geometry.size_l0
    assert corners.min() == 0
    assert corners.max(axis=0).tolist() == [w, h]


def test_a_link_out_of_the_work_folder_is_not_followed(gallery: Gallery, tiled: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tiled / "regions").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(drawn.BadDrawing, match="leads out of the work folder"):
        gallery.save_regions(0, SENT)
    assert list((tmp_path / "elsewhere").iterdir()) == []
