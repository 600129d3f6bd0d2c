"""DICOM: one slide per series with VOLUME images, whatever the files are called and whatever lies beside them."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.pipeline.cohort import listing, slides
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.store.layout import Work
from tests.extract.dicoms import write_annotations, write_instance, write_series
from tests.extract.slides import tissue_rgb, write_svs

Cli = Callable[..., tuple[int, str]]
A, B, C = "1.2.826.0.1.31", "1.2.826.0.1.32", "1.2.826.0.1.320"
NOTES = "1.2.826.0.1.5"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/, b/, c/: a series each, of 768 x 512, 1024 x 512 and 512 x 512 px; a/ with its label; notes.dcm."""
    root = tmp_path_factory.mktemp("series")
    write_series(root / "a", tissue_rgb(512, 768), A, ("a1.dcm", "a2.dcm"), label="a3.dcm")
    write_series(root / "b", tissue_rgb(512, 1024, 1), B, ("b1.dcm", "b2.dcm"))
    write_series(root / "c", tissue_rgb(512, 512, 2), C, ("c1.dcm",))
    write_annotations(root / "notes.dcm", NOTES)
    return root


def lay(made: Path, folder: Path, *names: str) -> Path:
    """The files of the series `names` (a, b, c, or notes.dcm) right in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for file in [made / name] if (made / name).is_file() else sorted((made / name).iterdir()):
            shutil.copy(file, folder / file.name)
    return folder


def ids(source: Path) -> list[str]:
    return sorted(s.id for s in slides.list_slides(source).slides)


def tiled(work: Path) -> list[str]:
    """Ids of the slides that have tiles."""
    stores = [p.relative_to(work / "tiles").as_posix() for p in (work / "tiles").rglob("*.zarr")]
    return sorted(s.removesuffix(".zarr") for s in stores)


def sizes(out: Path) -> dict[str, tuple[str, int, int, int]]:
    with open(out / "check.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {r["slide"]: (r["state"], int(r["width"]), int(r["height"]), int(r["levels"])) for r in rows}


@pytest.mark.parametrize("layout", ["a folder each", "one folder", "the given folder"])
def test_one_slide_per_series_and_the_rest_is_told(made: Path, tmp_path: Path, cli: Cli, layout: str) -> None:
    source = tmp_path / "slides"
    if layout == "a folder each":
        lay(made, source / "one", "a", "notes.dcm")
        lay(made, source / "two", "b")
        one, two, notes = "one", "two", "one/notes.dcm"
    else:
        inner = "patient/" if layout == "one folder" else ""
        lay(made, source / inner, "a", "b", "notes.dcm")
        one, two, notes = f"{inner}{A}.dcm", f"{inner}{B}.dcm", f"{inner}notes.dcm"
    code, said = cli("check", source, "--out", tmp_path / "c", "--workers", 1)
    assert sizes(tmp_path / "c") == {
        one: ("ok", 768, 512, 2), two: ("ok", 1024, 512, 2), notes: ("no slide", 0, 0, 0)
    }, said  # fmt: skip
    assert code == 0, said
    assert "Microscopy Bulk Simple Annotations" in said
    assert "damaged" not in said
    code, said = cli("tile", source, "--work", tmp_path / "w", "--tile-px", 128, "--workers", 1)
    assert code == 0, said
    assert tiled(tmp_path / "w") == sorted([one, two])
    assert "notes.dcm" in said
    assert "Microscopy Bulk Simple Annotations" in said


def test_ids_outlive_other_names_of_the_files(made: Path, tmp_path: Path, cli: Cli) -> None:
    for source in (lay(made, tmp_path / "x" / "p", "a").parent, lay(made, tmp_path / "y" / "p", "a", "b").parent,
                   lay(made, tmp_path / "z", "a", "b")):  # fmt: skip
        work = tmp_path / f"work-{source.name}"
        before = ids(source)
        assert cli("tile", source, "--work", work, "--tile-px", 128, "--workers", 1)[0] == 0
        files = sorted(source.rglob("*.dcm"))
        for n, path in enumerate(files):  # the first is the last now
            path.rename(path.with_name(f"{len(files) - n}"))  # without suffix, as archives number their files
        assert ids(source) == before
        code, said = cli("tile", source, "--work", work, "--tile-px", 128, "--workers", 1)
        assert code == 0, said
        assert "done before" in said or "skipped" in said
        assert tiled(work) == before


def test_rows_of_a_manifest_name_files_series_and_folders(made: Path, tmp_path: Path, cli: Cli) -> None:
    lay(made, tmp_path / "several", "a", "b", "notes.dcm")
    lay(made, tmp_path / "one", "b")
    lay(made, tmp_path / "notes", "notes.dcm")
    rows = ["several/a2.dcm", f"several/{B}.dcm", "one"]
    good = tmp_path / "good.csv"
    good.write_text("slide\n" + "\n".join(rows) + "\n")
    assert [(s.series, s.path.name) for s in slides.list_slides(good).slides] == [
        (A, "a2.dcm"), (B, "b1.dcm"), (B, "b1.dcm")
    ]  # fmt: skip
    code, said = cli("tile", good, "--work", tmp_path / "w", "--tile-px", 128, "--workers", 1)
    assert code == 0, said
    assert tiled(tmp_path / "w") == sorted(rows)
    bad = tmp_path / "bad.csv"
    bad.write_text("slide\nseveral/a1.dcm\nseveral/a3.dcm\nseveral/notes.dcm\nseveral\nnotes\n")
    code, said = cli("tile", bad, "--work", tmp_path / "w2", "--tile-px", 128, "--workers", 1)
    assert code == 1, said
    said = " ".join(said.split())
    assert tiled(tmp_path / "w2") == ["several/a1.dcm"], "the label belongs to the same slide"
    assert "(row 3) is of the same DICOM series as row 2" in said
    assert "notes.dcm is a DICOM object of another kind (Microscopy Bulk Simple Annotations): no slide" in said
    assert f"2 DICOM series, each a slide: name one of them (several/{A}.dcm, several/{B}.dcm)" in said
    assert "notes is a folder without a slide" in said
    assert "damaged" not in said
    code, said = cli("check", bad, "--out", tmp_path / "c", "--workers", 1)
    assert code == 1
    assert {k for k, v in sizes(tmp_path / "c").items() if v[0] == "ok"} == {"several/a1.dcm"}


def test_a_series_that_comes_later_takes_no_id_from_those_that_were_there(made: Path, tmp_path: Path, cli: Cli) -> None:
    source, work = tmp_path / "s", tmp_path / "w"
    lay(made, source / "p", "a", "b")
    tile = ("tile", source, "--work", work, "--tile-px", 128, "--workers", 1)
    assert cli(*tile)[0] == 0
    lay(made, source / "p", "c")
    code, said = cli(*tile)
    assert code == 0, said
    assert tiled(work) == sorted(f"p/{s}.dcm" for s in (A, B, C))
    for path in [*(source / "p").glob("b*"), *(source / "p").glob("c*")]:
        path.unlink()
    assert cli(*tile)[0] == 0
    (left,) = listing.settled(slides.list_slides(source).slides, slides.read_cohort(Work(work)))
    assert left.id == f"p/{A}.dcm", "alone in its folder it keeps the id that it was tiled under"


@pytest.mark.parametrize("old_work_folder", [False, True])
def test_a_second_series_in_the_folder_of_one_is_told_what_to_do(
    made: Path, tmp_path: Path, cli: Cli, old_work_folder: bool
) -> None:
    source, work = tmp_path / "s", tmp_path / "w"
    lay(made, source / "p", "b")
    tile = ("tile", source, "--work", work, "--tile-px", 128, "--workers", 1)
    assert cli(*tile)[0] == 0
    if old_work_folder:  # as versions before the column `series` wrote it
        rows = [row[:4] for row in csv.reader((work / "cohort.csv").read_text().splitlines())]
        (work / "cohort.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    lay(made, source / "p", "a")  # its files sort first
    code, said = cli(*tile)
    assert code == 1, said
    assert f"{A} has come to it. Move the files of this series to a folder of their own" in " ".join(said.split())
    assert tiled(work) == ["p"]
    for path in (source / "p").glob("a*"):
        (source / "q").mkdir(exist_ok=True)
        path.rename(source / "q" / path.name)
    code, said = cli(*tile)
    assert code == 0, said
    assert tiled(work) == ["p", "q"]


def test_a_work_folder_of_before_keeps_its_file_and_is_done(made: Path, tmp_path: Path, cli: Cli) -> None:
    """Versions before opened the file that sorts first, and their fingerprint holds its length."""
    source, work = lay(made, tmp_path / "s" / "p", "a").parent, Work(tmp_path / "w")
    first = SlideEntry("p", source / "p" / "a2.dcm")
    slides.remember(work, [first])
    (kept,) = listing.settled(slides.list_slides(source).slides, slides.read_cohort(work))
    assert (kept.id, kept.path, kept.series) == (first.id, first.path, A)
    slides.remember(work, [kept])
    assert slides.read_cohort(work) == [kept]


def test_several_ids_of_one_series_are_not_made_more(made: Path, tmp_path: Path) -> None:
    """As versions before gave to the files right in the given folder."""
    source = lay(made, tmp_path / "s", "a")
    known = [SlideEntry(p.name, p) for p in sorted(source.iterdir())]
    (one,) = listing.settled(slides.list_slides(source).slides, known)
    assert "several times (a1.dcm, a2.dcm, a3.dcm)" in one.problem
    assert "fresh --work" in one.problem


def test_a_broken_file_is_its_own_failure(made: Path, tmp_path: Path, cli: Cli) -> None:
    source = tmp_path / "s"
    lay(made, source / "p", "a")
    whole = (source / "p" / "a1.dcm").read_bytes()
    (source / "p" / "0.dcm").write_bytes(whole[:500])  # before the size of its image
    (source / "p" / "1.dcm").write_bytes(b"no DICOM at all")
    (source / "p" / "2.dcm").write_bytes(b"")
    (source / "p" / "._a1.dcm").write_bytes(b"what macOS leaves beside a file")
    (source / "q").mkdir()
    (source / "q" / "README").write_text("a name without suffix is no reason to be taken for DICOM")
    write_svs(source / "q" / "x.svs", tissue_rgb(512, 512))
    code, said = cli("tile", source, "--work", tmp_path / "w", "--tile-px", 128, "--workers", 1)
    assert code == 1
    assert tiled(tmp_path / "w") == ["p", "q/x.svs"]
    for name, why in (("p/0.dcm", "header"), ("p/1.dcm", "no DICOM file"), ("p/2.dcm", "0 bytes|no DICOM file")):
        assert name in said
        assert any(w in " ".join(said.split()) for w in why.split("|"))
    assert "README" in said


@pytest.mark.parametrize("series", ["../../up", "..", "/etc", "1.2.x", "", "9" * 65])
def test_what_a_file_calls_its_series_never_becomes_a_path(tmp_path: Path, series: str) -> None:
    folder = tmp_path / "s" / "p"
    folder.mkdir(parents=True)
    kind = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    write_instance(folder / "1.dcm", tissue_rgb(256, 256), "1.2.3", "1.2.3.1", kind, SeriesInstanceUID=series)
    write_instance(folder / "2.dcm", tissue_rgb(256, 256), "1.2.4", "1.2.4.1", kind)
    assert ids(tmp_path / "s") == ["p", "p/1.dcm"]


def test_a_series_in_pieces_is_no_two_slides(made: Path, tmp_path: Path, cli: Cli) -> None:
    """Its levels in a folder each; and a copy of a whole series, which stays a slide."""
    source = tmp_path / "s"
    lay(made, source / "one", "b")
    lay(made, source / "copy", "b")
    for level in ("a1", "a2"):
        (source / level).mkdir()
        shutil.copy(made / "a" / f"{level}.dcm", source / level)
    code, said = cli("tile", source, "--work", tmp_path / "w", "--tile-px", 128, "--workers", 1)
    assert code == 1
    assert tiled(tmp_path / "w") == ["copy", "one"]
    said = " ".join(said.replace("│", " ").split())
    assert f"DICOM series {A} lie in several folders" in said


def test_labels_beside_the_folder_of_dicom_slides_are_found(made: Path, tmp_path: Path) -> None:
    source, work = tmp_path / "s", Work(tmp_path / "w")
    lay(made, source / "p", "a")
    slides.remember(work, slides.list_slides(source).slides)
    lay(made, source / "q", "b", "c")
    both = slides.list_slides(source).slides
    assert {s.root for s in both} == {source}, [s.id for s in both]
    (tmp_path / "labels.csv").write_text("slide,label\n")
    assert match.find_labels(None, work) == tmp_path / "labels.csv"


def test_a_series_without_volume_is_no_slide(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    write_instance(source / "l.dcm", tissue_rgb(256, 256), A, f"{A}.1", ["ORIGINAL", "PRIMARY", "LABEL", "NONE"])
    with pytest.raises(slides.CohortError, match="slide's label, whose series has no VOLUME image"):
        slides.list_slides(source)
    write_svs(source / "x.svs", tissue_rgb(512, 512))
    found = slides.list_slides(source)
    assert [s.id for s in found.slides] == ["x.svs"]
    assert list(found.what) == [source / "l.dcm"]
