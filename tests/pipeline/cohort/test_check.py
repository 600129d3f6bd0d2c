"""`pipeline check`: everything of a cohort is told, nothing is changed, and the exit code says whether to look."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.cohort.check_page import page
from tests.extract.omes import RGB_NAMES, write_ome
from tests.extract.slides import tissue_rgb, write_svs

Cli = Callable[..., tuple[int, str]]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def rows(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "check.csv", newline="") as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    for sub in ("p", "q"):
        (folder / sub).mkdir(parents=True)
    write_svs(folder / "p" / "a.svs", tissue_rgb(1024, 1536))
    write_svs(folder / "p" / "b.svs", tissue_rgb(1024, 1024, seed=1))
    return folder


def test_a_good_cohort_needs_nobody_and_stays_as_it_is(slides: Path, tmp_path: Path, cli: Cli) -> None:
    (slides / "notes.txt").write_text("harmless")
    before = snapshot(slides)
    code, said = cli("check", slides, "--out", tmp_path / "c", "--workers", 1)
    assert code == 0, said
    assert "nothing needs a person" in said
    assert snapshot(slides) == before, "nothing is written among the slides"
    found = rows(tmp_path / "c")
    assert found["p/a.svs"]["state"] == "ok"
    assert int(found["p/a.svs"]["tiles"]) > 0
    assert float(found["p/a.svs"]["tiles_per_s"]) > 0
    html = (tmp_path / "c" / "check.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 2


def test_everything_odd_is_told_and_the_exit_code_is_1(slides: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copy(slides / "p" / "a.svs", slides / "q" / "a.svs")
    write_svs(slides / "q" / "nompp.svs", tissue_rgb(600, 600), mpp=None)
    (slides / "q" / "broken.svs").write_bytes((slides / "p" / "b.svs").read_bytes()[:5000])
    (slides / "q" / "film.vsi").write_bytes(b"x")
    (slides / "q" / "core.png").write_bytes(b"x")
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label\np/a.svs,0\nq/gone.svs,1\n")
    code, said = cli("check", slides, "--out", tmp_path / "c", "--labels", labels, "--workers", 2)
    assert code == 1
    found = rows(tmp_path / "c")
    states = {name: row["state"] for name, row in found.items()}
    assert {name for name, state in states.items() if state == "ok"} == {"p/a.svs", "q/a.svs", "p/b.svs"}
    assert states["q/nompp.svs"] == "no mpp"
    assert states["q/broken.svs"] == "unreadable"
    assert states["q/film.vsi"] == states["q/core.png"] == "unsupported"
    assert "the same slide as q/a.svs" in found["p/a.svs"]["problems"]
    assert "same name" in found["q/a.svs"]["warnings"]
    assert "truncated" in found["q/broken.svs"]["problems"]
    assert "mpp" in found["q/core.png"]["problems"]
    assert "row 3: there is no slide q/gone.svs" in said
    assert "4 slides have no row in labels.csv" in said
    assert "7 files" in said


def test_it_never_writes_among_the_slides(slides: Path, cli: Cli) -> None:
    code, said = cli("check", slides, "--out", slides / "report", "--workers", 1)
    assert code == 2, said
    assert "never writes there" in said
    assert not (slides / "report").exists()


def test_a_name_cannot_inject_html() -> None:
    from mhim.pipeline.cohort.finding import Finding

    text = page("<b>", [Finding("<script>alert(1)</script>.svs", "ok", problems=("<i>",))], ["<u>"])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<i>" not in text


def test_what_was_never_measured_has_no_number(tmp_path: Path, cli: Cli) -> None:
    """An unreadable slide has no 0.0 % of tissue; an empty one has."""
    folder = tmp_path / "slides"
    folder.mkdir()
    write_svs(folder / "white.svs", np.full((600, 600, 3), 250, np.uint8))
    write_svs(folder / "nompp.svs", tissue_rgb(600, 600), mpp=None)
    (folder / "broken.svs").write_bytes((folder / "nompp.svs").read_bytes()[:5000])
    (folder / "film.vsi").write_bytes(b"x")
    _, said = cli("check", folder, "--out", tmp_path / "c", "--workers", 1)
    found = rows(tmp_path / "c")
    assert {name: row["tissue_fraction"] for name, row in found.items()} == {
        "white.svs": "0.0", "nompp.svs": "", "broken.svs": "", "film.vsi": ""
    }  # fmt: skip
    html = (tmp_path / "c" / "check.html").read_text()
    for text in (said, html):
        assert text.count("0.0%") == 1


def test_a_sound_file_of_several_planes_is_not_called_unreadable(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    planes = [np.ascontiguousarray(tissue_rgb(512, 512)[..., c]) for c in range(3)]
    write_ome(folder / "if.ome.tif", planes, {"SizeC": 3}, [{"Name": n} for n in ("DAPI", "CD3", "CD8")])
    write_ome(folder / "he.ome.tif", planes, {"SizeC": 3}, RGB_NAMES, levels=2)
    code, said = cli("check", folder, "--out", tmp_path / "c", "--set", "tile.tile_px=128", "--workers", 1)
    assert code == 1
    assert "3 fluorescence channels (DAPI, CD3, CD8)" in " ".join(said.split())
    found = rows(tmp_path / "c")
    assert found["if.ome.tif"]["state"] == "unfit"
    assert (found["he.ome.tif"]["state"], found["he.ome.tif"]["levels"]) == ("ok", "2")
