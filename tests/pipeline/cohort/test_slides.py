"""Folders and CSV files: what is found, what is refused, and that nothing is dropped in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhim.pipeline.cohort import slides
from mhim.pipeline.cohort.labels import match, table
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.store.layout import Work


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_folder_is_searched_and_other_files_are_listed(tmp_path: Path) -> None:
    names = "a.svs site1/a.svs site1/b.TIFF notes.txt c.mrxs c/Data0001.dat d/1.dcm d/2.dcm p.png"
    for name in names.split():
        write(tmp_path / name, "x")
    found = slides.list_slides(tmp_path)
    assert [s.id for s in found.slides] == ["a.svs", "c.mrxs", "d", "site1/a.svs", "site1/b.TIFF"]
    assert sorted(p.name for p in found.others) == ["notes.txt", "p.png"]
    assert "p.png" in [s.id for s in slides.list_slides(tmp_path, plain_images=True).slides]


def test_a_link_back_to_its_own_folder_does_not_hang(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.svs", "x")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert [s.id for s in slides.list_slides(tmp_path).slides] == ["in/a.svs"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p / "none", "does not exist"),
        (lambda p: p, "it is empty"),
        (lambda p: write(p / "x" / "notes.txt", "").parent, "notes.txt"),
    ],
)
def test_missing_and_empty_folders(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CohortError, match=words):
        slides.list_slides(make(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("patient,label\na,1\n", ["no column `slide`"]),
        ("slide,label\na,1\nb,2\na,1\n", ["row 4", "column slide", "row 2"]),
        ("slide,patient,label\na,p,0\nb,p,1\n", ["row 3", "column label", "patient 'p'", "'1' here and '0' in row 2"]),
        ("slide,time,event\na,-1,1\n", ["row 2", "column time"]),
        ("slide,time,event\na,nan,1\n", ["row 2", "time and event", "time is missing"]),
        ("slide,time,event\na,5,2\n", ["row 2", "column event"]),
        ("slide,time,event\na,5,\n", ["row 2", "time and event"]),
        ("slide,time\na,5\n", ["belong together"]),
        ("slide,mpp\na,0\n", ["row 2", "column mpp"]),
        ("slide,mpp\na,half\n", ["row 2", "column mpp", "not a number"]),
        ("slide,split\na,tset\n", ["row 2", "column split"]),
        ("slide,label\na\n", ["row 2", "fields"]),
        ("slide,label\n", ["no rows"]),
    ],
)
def test_wrong_csv_names_row_and_column(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(CohortError) as caught:
        table.read_rows(write(tmp_path / "labels.csv", text))
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", "slide,mpp\n" + "".join(f"s{i},bad\n" for i in range(30)))
    with pytest.raises(CohortError, match="and 10 more"):
        table.read_rows(path)


def test_matching_is_exact(tmp_path: Path) -> None:
    text = "slide,label\nslide_1,0\nslide_10,1\nx/slide_2.svs,1\nlost,0\n"
    rows = table.read_rows(write(tmp_path / "l.csv", text))
    found = match.match(rows, ["slide_1.svs", "slide_10.svs", "x/slide_2.svs", "y/extra.svs"])
    assert [(r.slide, i) for r, i in found.rows] == [
        ("slide_1", "slide_1.svs"), ("slide_10", "slide_10.svs"), ("x/slide_2.svs", "x/slide_2.svs"),
    ]  # fmt: skip
    assert found.without_row == ["y/extra.svs"]
    assert [r.slide for r in found.without_slide] == ["lost"]


def test_a_name_that_fits_two_slides_is_refused(tmp_path: Path) -> None:
    rows = table.read_rows(write(tmp_path / "l.csv", "slide,label\na,0\n"))
    with pytest.raises(CohortError, match="fits"):
        match.match(rows, ["x/a.svs", "y/a.svs"])


@given(st.lists(st.text("ab1_", min_size=1, max_size=6), unique=True, min_size=1, max_size=8))
def test_every_slide_matches_its_own_id_and_no_other(ids: list[str]) -> None:
    rows = [Row(number=n, slide=i, patient=i) for n, i in enumerate(ids)]
    found = match.match(rows, [f"{i}.svs" for i in ids])
    assert [(r.slide + ".svs", i) for r, i in found.rows] == [(i, i) for _, i in found.rows]
    assert not found.without_row
    assert not found.without_slide


def test_the_work_folder_remembers_and_refuses_to_mix(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    a = SlideEntry("a.svs", write(tmp_path / "s" / "a.svs", "x"), 0.25)
    slides.remember(work, [a])
    slides.remember(work, [SlideEntry("b.svs", tmp_path / "s" / "b.svs")])
    assert slides.read_cohort(work)[0] == a
    assert len(slides.read_cohort(work)) == 2
    with pytest.raises(CohortError, match="stands for"):
        slides.remember(work, [SlideEntry("a.svs", tmp_path / "other" / "a.svs")])


def test_a_manifest_gives_ids_paths_and_mpp(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "slide,mpp\nsub/a.svs,0.25\n/elsewhere/b.svs,\n")
    a, b = slides.list_slides(path).slides
    assert (a.id, a.path, a.mpp) == ("sub/a.svs", tmp_path / "sub" / "a.svs", 0.25)
    assert (b.id, b.path, b.mpp) == ("b.svs", Path("/elsewhere/b.svs"), None)


def test_labels_are_found_beside_the_slides(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    slide = write(tmp_path / "slides" / "sub" / "a.svs", "x")
    slides.remember(work, [SlideEntry("sub/a.svs", slide)])
    with pytest.raises(CohortError, match="--labels"):
        match.find_labels(None, work)
    labels = write(tmp_path / "labels.csv", "slide,label\n")
    assert match.find_labels(None, work) == labels
    nearer = write(tmp_path / "slides" / "labels.csv", "slide,label\n")
    assert match.find_labels(None, work) == nearer
    features = work.features("bags")
    assert match.find_labels(None, work, features) == nearer
    own = write(features / "labels.csv", "slide,label\n")
    assert match.find_labels(None, work, features) == own
    own.unlink()
    work.cohort.write_text("damaged")
    with pytest.raises(CohortError, match="is damaged") as damaged:
        match.find_labels(None, work, features)
    assert not isinstance(damaged.value, match.NoLabels), "that labels lie nowhere would not be what happened"
