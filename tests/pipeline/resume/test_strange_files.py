"""Files that end whoever reads them, and names that are no text: each costs its own slide, and the command goes on."""

from __future__ import annotations

import csv
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.extract.slide.tiffcheck import vast_tile
from mhim.pipeline.backends import local
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.resume.child import Child, Died, Order
from mhim.pipeline.resume.stage import Item, State
from mhim.pipeline.store import layout, names, reading
from tests.extract.slides import tissue_rgb, write_tiff
from tests.pipeline.toys import Toy

Cli = Callable[..., tuple[int, str]]
TILE = ("--workers", 1, "--tile-px", 64, "--mpp-of-slides", 0.5, "--set", "tile.blur_probe_um=0")


def write_vast(path: Path, side: int = 1 << 20, big: bool = False) -> Path:
    """A few hundred bytes: a sound header that promises one tile of `side` x `side` px."""
    rows = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 1), (277, 3, 1), (322, 4, side),
            (323, 4, side), (324, 4, 400), (325, 4, 216)]  # fmt: skip
    if big:
        body = struct.pack("<Q", len(rows)) + b"".join(struct.pack("<HHQQ", t, k, 1, v) for t, k, v in rows)
        path.write_bytes(b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) + body + bytes(500))
    else:
        body = struct.pack("<H", len(rows)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in rows)
        path.write_bytes(b"II*\0" + struct.pack("<I", 8) + body + bytes(500))
    return path


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_vast(folder / "a.tif")
    write_vast(folder / "b.tif", big=True)
    write_tiff(folder / "c.tif", tissue_rgb(512, 512))
    return folder


def test_a_vast_tile_is_refused_by_name(slides: Path, tmp_path: Path, cli: Cli) -> None:
    code, said = cli("tile", slides, "--work", tmp_path / "w", *TILE)
    assert code == 1, said
    assert "tile: 1 done, 2 failed" in said
    assert "a.tif: its header claims a tile of 1048576 x 1048576 px" in said
    assert cli("tile", slides / "a.tif", "--work", tmp_path / "w1", *TILE)[0] == 1
    code, said = cli("check", slides, "--out", tmp_path / "c", "--workers", 1, "--mpp-of-slides", 0.5)
    assert code == 1
    with open(tmp_path / "c" / "check.csv", newline="") as file:
        states = {r["slide"]: r["state"] for r in csv.DictReader(file)}
    assert states == {"a.tif": "unreadable", "b.tif": "unreadable", "c.tif": "ok"}
    assert vast_tile(slides / "c.tif") is None


def aborts(path: str) -> str:
    """What a decoder does that meets a damaged file, for files of that name."""
    if "bad" in path:
        os.abort()
    return path.upper()


def test_a_question_that_ends_its_process_is_told_and_the_next_is_answered() -> None:
    child = Child(Order(None, call=aborts))
    try:
        assert child.ask("a") == "A"
        with pytest.raises(Died, match="SIGABRT"):
            child.ask("bad")
        assert child.ask("b") == "B"
    finally:
        child.close()


class Strange(Toy):
    """Its second item ends the process, and so does looking ahead to it."""

    untrusted = True

    def prefetch(self, item: Item) -> None:
        if item.key == "item_001":
            os.abort()

    def make(self, item: Item, out: Path, partial: Path):  # type: ignore[no-untyped-def]
        if item.key == "item_001":
            os.abort()
        return super().make(item, out, partial)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_item_that_ends_the_process_is_blamed_and_no_other(heavy: bool, tmp_path: Path) -> None:
    from mhim.configs.schema import ClusterConfig

    stage = Strange(tmp_path / "t", n=3)
    stage.heavy = heavy
    outcomes = {o.key: o for o in local.run(stage, stage.items(), False, False, ClusterConfig(workers=1))}
    assert [outcomes[f"item_00{k}"].state for k in range(3)] == [State.DONE, State.FAILED, State.DONE]
    assert "died (signal SIGABRT)" in outcomes["item_001"].message


def raw_name(folder: Path, name: bytes) -> Path:
    """A file of a name that is no UTF-8, or skip where the file system allows none."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    try:
        path.touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    return path


def test_names_that_are_no_utf8_go_all_the_way(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    strange = raw_name(folder, b"f\xe4rbung.tif")
    write_tiff(strange, tissue_rgb(512, 512))
    write_tiff(folder / "f%E4rbung.tif", tissue_rgb(512, 512, seed=1))
    raw_name(folder, b"empty\xff.tif")
    raw_name(folder, b"n\xf6tes.doc")
    work = layout.Work(tmp_path / "w")
    code, said = cli("tile", folder, "--work", work.root, *TILE)
    assert code == 1, said
    assert "empty%FF.tif is empty (0 bytes)" in said
    assert "n%F6tes.doc" in said
    cohort = {s.id: s.path for s in read_cohort(work)}
    assert cohort["f%E4rbung.tif%"] == strange, "its own id is that of the other file"
    assert cohort["f%E4rbung.tif"] == folder / "f%E4rbung.tif"
    assert cli("extract", "--work", work.root, "--workers", 1)[0] == 0
    assert reading.stored(work.feature_store("texture", "f%E4rbung.tif%"))
    code, said = cli("status", "--work", work.root)
    assert "empty%FF.tif" in said
    code, said = cli("check", folder, "--out", tmp_path / "c", "--workers", 1, "--mpp-of-slides", 0.5)
    assert code == 1
    assert "empty%FF.tif" in (tmp_path / "c" / "check.csv").read_text(encoding="utf-8")


def test_paths_come_back_from_tables() -> None:
    for path in (Path("/a/b c.svs"), Path("/a/ä%20.svs"), Path(os.fsdecode(b"/a \xff/\xe4%41.svs"))):
        text = names.of_path(path)
        text.encode()
        assert names.to_path(text) == path
    assert names.of_path(None) == ""
