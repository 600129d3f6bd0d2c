"""A slide replaced by another of the same length and time stamp is told; what is remembered only saves time."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.extract.slide.identity import identity
from mhim.pipeline.cohort import identities
from mhim.pipeline.cohort.identities import Identities
from mhim.pipeline.store import layout, reading
from mhim.pipeline.store.layout import StoreError
from tests.extract.slides import tissue_rgb, write_tiff

Cli = Callable[..., tuple[int, str]]
TILE = ("--workers", 1, "--tile-px", 64, "--mpp-of-slides", 0.5, "--set", "tile.blur_probe_um=0")


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_tiff(folder / "a.tif", tissue_rgb(512, 512))
    write_tiff(folder / "b.tif", tissue_rgb(512, 512, seed=1))
    return folder


def put_in_place(new: Path, old: Path) -> None:
    """`new` under the name, length and time stamp of `old`."""
    info = old.stat()
    assert new.stat().st_size == info.st_size
    shutil.copyfile(new, old)
    os.utime(old, ns=(info.st_atime_ns, info.st_mtime_ns))


def test_another_file_of_the_same_length_and_time_is_not_taken_for_the_slide(
    slides: Path, tmp_path: Path, cli: Cli
) -> None:
    work = layout.Work(tmp_path / "w")
    assert cli("tile", slides, "--work", work.root, *TILE)[0] == 0
    assert reading.read_attrs(work.tile_store("a.tif"))["content"] == identity(slides / "a.tif")
    put_in_place(write_tiff(tmp_path / "other.tif", tissue_rgb(512, 512, seed=2)), slides / "a.tif")
    code, said = cli("extract", "--work", work.root)
    assert code == 1, said
    assert "a.tif is not the file that its tiles are of: its content was 1-" in said
    assert reading.stored(work.feature_store("texture", "a.tif")) is None
    features = reading.read_attrs(work.feature_store("texture", "b.tif"))
    assert features["content"] == identity(slides / "b.tif")
    code, said = cli("tile", slides, "--work", work.root, *TILE)
    assert code == 3, said
    assert "input.content" in said
    assert "b.tif" not in said
    assert cli("tile", slides, "--work", work.root, *TILE, "--replace")[0] == 0
    assert cli("extract", "--work", work.root)[0] == 0
    assert reading.read_attrs(work.feature_store("texture", "a.tif"))["content"] == identity(slides / "a.tif")


def test_a_new_time_stamp_redoes_nothing(slides: Path, tmp_path: Path, cli: Cli) -> None:
    work = tmp_path / "w"
    assert cli("tile", slides, "--work", work, *TILE)[0] == 0
    for path in slides.iterdir():
        shutil.copyfile(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
        os.utime(path, (1, 1))
    code, said = cli("tile", slides, "--work", work, *TILE)
    assert code == 0
    assert "0 to do, 2 done before" in said


def as_of_old(folder: Path) -> None:
    """Make a tile store what version 0.1 wrote: its fields, fingerprint and attributes without content."""
    meta = json.loads((folder / "zarr.json").read_text())
    attributes = meta["attributes"]
    del attributes["content"], attributes["settings"]["input.content"]
    attributes["fingerprint"] = layout.fingerprint(attributes["settings"])
    (folder / "zarr.json").write_text(json.dumps(meta))


def test_a_work_folder_that_recorded_lengths_only_is_judged_by_them(slides: Path, tmp_path: Path, cli: Cli) -> None:
    work = layout.Work(tmp_path / "w")
    assert cli("tile", slides, "--work", work.root, *TILE)[0] == 0
    for name in ("a.tif", "b.tif"):
        as_of_old(work.tile_store(name))
    code, said = cli("tile", slides, "--work", work.root, *TILE)
    assert code == 0, said
    assert "0 to do, 2 done before" in said
    assert cli("tile", slides, "--work", work.root, *TILE, "--set", "tile.max_pen=0.5")[0] == 0
    attrs = reading.read_attrs(work.tile_store("a.tif"))
    assert attrs["settings"]["tile.max_pen"] == 0.5
    assert "input.content" not in attrs["settings"], "what was not known then is not known now"
    assert cli("extract", "--work", work.root)[0] == 0
    (slides / "b.tif").write_bytes((slides / "b.tif").read_bytes() + b"\0")
    code, said = cli("tile", slides, "--work", work.root, *TILE, "--set", "tile.max_pen=0.5")
    assert code == 3
    assert "input.bytes" in said


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had lain there for long."""
    monkeypatch.setattr(identities, "_SETTLED_NS", 0)


def test_what_is_settled_is_hashed_once(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def counted(path: Path) -> str:
        asked.append(path)
        return identity(path)

    monkeypatch.setattr(identities, "identity", counted)
    known = Identities(tmp_path)
    paths = sorted(slides.iterdir())
    first = [known.of(p) for p in paths]
    assert [known.of(p) for p in paths] == first
    assert len(asked) == 4, "files changed a moment ago are read again: the clock may not have ticked since"
    assert not (tmp_path / identities.NAME).exists()
    settled(monkeypatch)
    known.expect(paths)
    asked.clear()
    assert [known.of(p) for p in paths] == first
    assert [pickle.loads(pickle.dumps(Identities(tmp_path))).of(p) for p in paths] == first
    assert not asked
    put_in_place(write_tiff(tmp_path / "other.tif", tissue_rgb(512, 512, seed=2)), paths[0])
    assert known.of(paths[0]) != first[0]
    assert asked == [paths[0]]


@pytest.mark.parametrize("damage", [b"", b"\0\xff garbage\n\n", b"torn line without an end"])
def test_a_damaged_record_costs_only_time(
    damage: bytes, slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(monkeypatch)
    paths = sorted(slides.iterdir())
    right = [Identities(tmp_path).of(p) for p in paths]
    file = tmp_path / identities.NAME
    whole = file.read_bytes()
    file.write_bytes(whole[:-20] + damage + whole[:30])
    assert [Identities(tmp_path).of(p) for p in paths] == right
    wrong = whole.replace(b"1-", b"2-", 1)
    file.write_bytes(wrong)
    assert [Identities(tmp_path).of(p) for p in paths] == right, "a record that was altered fails its check"


def test_a_folder_that_cannot_be_written_is_no_obstacle(slides: Path, tmp_path: Path) -> None:
    assert Identities(tmp_path / "none").of(slides / "a.tif") == identity(slides / "a.tif")
    assert Identities(tmp_path).of(tmp_path / "gone.tif") is None


def test_a_slide_that_changes_while_it_is_read_fails(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="changed while"), Identities(tmp_path).unchanged(slides / "a.tif"):
        (slides / "a.tif").write_bytes(b"another")
