"""Label files as the field publishes them: taken whole, ids matched exactly."""

from pathlib import Path

import pytest

from mhim.pipeline.cohort.labels.match import match, of_patients
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.labels.table import read_rows


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_headerless_labels(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "labels.csv", "normal_001,0\ntumor_001,1\n"))
    assert [(r.slide, r.label) for r in rows] == [("normal_001", "0"), ("tumor_001", "1")]
    assert all(r.patient == r.slide for r in rows)


def test_survival_labels_with_several_slides(tmp_path: Path) -> None:
    text = "Study,ID,Event,Status,WSI\nLUAD,TCGA-05-4244,12.5,0,a-DX1.pt;a-DX2.pt\nLUAD,TCGA-05-4245,3.25,1,b-DX1.pt\n"
    rows = read_rows(written(tmp_path / "luad.csv", text))
    assert [(r.slide, r.patient, r.time, r.event) for r in rows] == [
        ("a-DX1", "TCGA-05-4244", 12.5, 0),
        ("a-DX2", "TCGA-05-4244", 12.5, 0),
        ("b-DX1", "TCGA-05-4245", 3.25, 1),
    ]


def test_a_negative_time_is_refused_by_row(tmp_path: Path) -> None:
    text = "Study,ID,Event,Status,WSI\nLUAD,P1,-2,0,a.pt\n"
    with pytest.raises(CohortError, match="column time: '-2'"):
        read_rows(written(tmp_path / "luad.csv", text))


def test_clams_labels_as_they_are(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "labels.csv", "case_id,slide_id,label\np,a,x\np,b,x\n"))
    assert [(r.slide, r.patient, r.label) for r in rows] == [("a", "p", "x"), ("b", "p", "x")]


def test_patients_take_their_own_slides_and_no_other() -> None:
    slides = ["TCGA-05-4244-01Z-00-DX1.abc", "TCGA-05-4244-01Z-00-DX2.def", "TCGA-05-42441-01Z-00-DX1.x", "other"]
    rows = [Row(1, "TCGA-05-4244", "TCGA-05-4244", "1"), Row(2, "other", "other", "0")]
    made = of_patients(rows, slides)
    assert [(r.slide, r.patient, r.label) for r in made] == [
        (slides[0], "TCGA-05-4244", "1"),
        (slides[1], "TCGA-05-4244", "1"),
        ("other", "other", "0"),
    ]


def test_a_slide_never_takes_the_features_of_one_whose_name_it_begins() -> None:
    found = match([Row(1, "slide_1", "slide_1", "0")], ["slide_10", "slide_11"])
    assert not found.rows
    assert [r.slide for r in found.without_slide] == ["slide_1"]
