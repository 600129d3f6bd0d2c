"""One table in: any usual file, columns by any usual name, missing values and numbers as people write them; what is
guessed is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mhim.configs.schema import Config, LabelsConfig, TrainConfig
from mhim.pipeline.cohort import outcomes, tcga
from mhim.pipeline.cohort import patients as cases
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.cohort.labels import use
from mhim.pipeline.cohort.labels.match import Finder, files_of, match, without_suffix
from mhim.pipeline.cohort.labels.of_patients import joint_sites, mixed_tissue
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.labels.table import read_rows, read_table
from mhim.pipeline.cohort.listing import Listing, SlideEntry
from mhim.pipeline.stages import draw
from mhim.pipeline.store.layout import Work
from mhim.pipeline.store.writing import StoreWriter
from mhim.pipeline.upkeep import status
from tests.pipeline import records
from tests.pipeline.bags import make_features

PLAIN = [("s1", "a"), ("s2", "b")]


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def pairs(path: Path, settings: LabelsConfig | None = None) -> list[tuple[str, str | None]]:
    return [(r.slide, r.label) for r in read_rows(path, settings)]


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        ("slide;label\ns1;a\ns2;b\n", "utf-8", "semicolon"),
        ("slide\tlabel\r\ns1\ta\r\ns2\tb\r\n", "utf-8", "tab"),
        ("slide|label\ns1|a\ns2|b\n", "utf-8", "pipe"),
        ("sep=;\nslide;label\ns1;a\ns2;b\n", "utf-8", ""),
        ('# made by X\n# on Monday, "or so\nslide,label\ns1,a\ns2,b\n', "utf-8", ""),
        ("slide,label\rs1,a\rs2,b\r", "utf-8", ""),
        ("slide,label\ns1,a\ns2,b\n", "utf-8-sig", ""),
        ("slide,label\ns1,a\ns2,b\n", "utf-16", "UTF-16"),
        ("slide;label\ns1;a\ns2;b\n", "utf-16-le", "UTF-16-LE"),
        (" Slide ,LABEL,\ns1, a ,\ns2,b,\n,,\n", "utf-8", "Slide as `slide`"),
        ("s1,a\ns2,b\n", "utf-8", "no header"),
        ("case_id,slide_id,label\np,s1,a\nq,s2,b\n", "utf-8", "slide_id as `slide`"),
        ("wsi,label,age,stage\ns1,a,40,I\ns2,b,41,II\n", "utf-8", "2 columns are not used: age, stage"),
    ],
)
def test_usual_forms_of_a_table(tmp_path: Path, text: str, encoding: str, told: str) -> None:
    table = read_table(written(tmp_path / "t.csv", text, encoding))
    assert [(r.slide, r.label) for r in table.rows] == PLAIN
    assert told in " | ".join(table.notes)


def test_latin_1_is_told_and_can_be_declared(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "slide;label\ns1;mäßig\ns2;gut\n", "latin-1")
    table = read_table(path)
    assert table.rows[0].label == "mäßig"
    assert "Latin-1" in " ".join(table.notes)
    assert "row 2" in " ".join(table.notes)
    assert not [n for n in read_table(path, LabelsConfig(encoding="latin-1")).notes if "Latin" in n]
    with pytest.raises(CohortError, match="not written in utf-8: row 2"):
        read_table(path, LabelsConfig(encoding="utf-8"))
    with pytest.raises(CohortError, match="no such encoding"):
        read_table(path, LabelsConfig(encoding="klingon"))


def test_spreadsheets_and_parquet(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "notes"
    sheet = book.create_sheet("clinic")
    for line in ([], ["slide", "label", "time", "event", None], [12, 1, 3.5, True], ["0007.svs", "x", None, None]):
        sheet.append(line)
    sheet.cell(3, 1).number_format = "0000"
    book.save(tmp_path / "t.xlsx")
    rows = read_rows(tmp_path / "t.xlsx")
    assert [(r.number, r.slide, r.label, r.time, r.event) for r in rows] == [
        (3, "0012", "1", 3.5, 1),
        (4, "0007.svs", "x", None, None),
    ]
    with pytest.raises(CohortError, match=r"there is no column 'x' .*t\.xlsx: sheet 'clinic' of 2 .*clinic.*=NAME"):
        read_rows(tmp_path / "t.xlsx", LabelsConfig(slide_column="x"))
    with pytest.raises(CohortError, match=r"no sheet 'x'.*clinic"):
        read_rows(tmp_path / "t.xlsx", LabelsConfig(sheet="x"))


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"slide": ["s1", "s2", "s3"], "label": [1, 2, None], "fold": [0.0, 1.0, None]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows = read_rows(tmp_path / "t.parquet")
    assert [(r.number, r.slide, r.label, r.fold) for r in rows] == [
        (1, "s1", "1", 0),
        (2, "s2", "2", 1),
        (3, "s3", None, None),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xd0\xcf\x11\xe0 old", "old Excel file"),
        (b"PK\x03\x04 not really", "xlsx"),
        (b"PAR1 not really", "parquet"),
        (b'slide,label\ns1,"a\ns2,b\n', "row 2.*quotation mark"),
        (b"", "is empty"),
        (b"slide,label,label\ns1,a,b\n", "2 columns may be `label`: 'label' .number 2. and 'label' .number 3."),
        (b"slide,Label,LABEL\ns1,a,b\n", "2 columns may be `label`"),
        (b"slide_id,wsi,label\ns1,a,b\n", "--slide-column"),
        (b"image,grade,age\ns1,a,1\n", "no column `slide`.*image, grade, age.*--slide-column"),
        (b"slide,label\nNA,a\n", "row 2, column slide"),
    ],
)
def test_what_is_no_table_says_what_to_do(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(CohortError, match=words):
        read_table(tmp_path / "t.csv")


def test_columns_by_flag_are_recorded(tmp_path: Path) -> None:
    text = "image,who,grade,label,OS_MONTHS,OS_STATUS,time\ns1,p,high,x,3.5,1:DECEASED,9\ns2,q,low,x,7,0:LIVING,9\n"
    path = written(tmp_path / "t.csv", text)
    given = LabelsConfig(slide_column="image", patient_column="WHO", label_column="grade")
    table = read_table(path, given)
    assert [(r.slide, r.patient, r.label, r.time) for r in table.rows] == [
        ("s1", "p", "high", None),
        ("s2", "q", "low", None),
    ]
    kept = table.settings(given)
    assert (kept.slide_column, kept.patient_column, kept.label_column) == ("image", "who", "grade")
    assert read_table(path, kept).rows == table.rows
    survival = LabelsConfig(slide_column="image", time_column="OS_MONTHS", event_column="OS_STATUS")
    assert [(r.time, r.event) for r in read_rows(path, survival)] == [(3.5, 1), (7.0, 0)]
    with pytest.raises(CohortError, match=r"no column 'stage' .--label-column"):
        read_table(path, LabelsConfig(slide_column="image", label_column="stage"))


def test_missing_values_numbers_and_words(tmp_path: Path) -> None:
    text = "slide;label;time;event;fold\ns1;1.0;3,5;dead;1.0\ns2;n/a;4;Alive;0\ns3;NA;NA;nan;1\ns4;None;0,25;1.0;1\n"
    table = read_table(written(tmp_path / "t.csv", text))
    assert [(r.label, r.time, r.event, r.fold) for r in table.rows] == [
        ("1.0", 3.5, 1, 1),
        (None, 4.0, 0, 0),
        (None, None, None, 1),
        ("None", 0.25, 1, 1),
    ]
    told = " | ".join(table.notes)
    assert "2 cells of `label` are missing values (1 n/a, 1 NA" in told
    assert "'Alive' is 0, 'dead' is 1" in told
    assert "2 rows have numbers with a decimal comma" in told
    own = read_rows(tmp_path / "t.csv", LabelsConfig(missing=("None", "NA", "nan")))
    assert [r.label for r in own] == ["1.0", "n/a", None, None]
    with pytest.raises(CohortError, match="decimal or a thousands"):
        read_rows(written(tmp_path / "u.csv", 'slide,time,event\ns1,"1,234",1\n'))
    with pytest.raises(CohortError, match=r"row 2, column event: 'gone'.*event_words"):
        read_rows(written(tmp_path / "v.csv", "slide,time,event\ns1,1,gone\n"))
    assert read_rows(tmp_path / "v.csv", LabelsConfig(event_words={"Gone": 1}))[0].event == 1


def test_look_alike_classes_and_patients_are_told(tmp_path: Path) -> None:
    text = "slide,patient,label\ns1,P1,Neg\ns2,p1,neg \ns3,p3,neg\ns4,p4,1\ns5,p5,1.0\n"
    told = " | ".join(read_table(written(tmp_path / "t.csv", text)).notes)
    assert "'Neg' (1) and 'neg' (2)" in told
    assert "'1' (1) and '1.0' (1)" in told
    assert "'P1' (1) and 'p1' (1), which look like one and are taken as two patients" in told


def test_rows_are_numbered_as_in_an_editor(tmp_path: Path) -> None:
    quoted = 'slide,label,note\ns1,a,"two\nlines"\n\ns2,a,x\ns2,b,y\n'
    with pytest.raises(CohortError, match="row 6, column slide: 's2' stands in row 5"):
        read_rows(written(tmp_path / "t.csv", quoted))
    published = "Study,ID,Event,Status,WSI\nX,P1,2,0,a.pt;b.pt\n\nX,P2,-1,0,c.pt\n"
    with pytest.raises(CohortError, match="row 4, column time"):
        read_rows(written(tmp_path / "p.csv", published))


# ---------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize(
    ("row", "slides", "hit"),
    [
        ("B1", ["B1.1"], None),
        ("B1", ["B1.1.svs"], None),
        ("B1.1", ["B1.1.svs"], "B1.1.svs"),
        ("B1.2", ["B1.1"], None),
        ("a.SVS", ["a"], "a"),
        ("a", ["a.Ome.TIF"], "a.Ome.TIF"),
        ("a.ome.tiff", ["a"], "a"),
        ("a.ndpi", ["x/a.NDPI"], "x/a.NDPI"),
        ("a.svs", ["a.tif", "a.svs"], "a.svs"),
        ("a.SVS", ["a.tif", "a.svs"], "a.svs"),
        ("a.svs", ["a.tif"], "a.tif"),
        ("x/a.svs", ["y/a.svs"], None),
        ("slides/x/a.svs", ["x/a.svs"], "x/a.svs"),
        ("/data/x/a.svs", ["y/a.svs"], "y/a.svs"),
        ("x\\a.svs", ["x/a.svs"], "x/a.svs"),
        ("M\u00fcller.svs", ["Mu\u0308ller"], "Mu\u0308ller"),
        ("a.v2", ["a"], None),
        ("A", ["a"], None),
        ("a.h5", ["a"], "a"),
        (".svs", ["a"], None),
        ("slide_1", ["slide_10.svs", "slide_11.svs"], None),
    ],
)
def test_one_rule_of_names(row: str, slides: list[str], hit: str | None) -> None:
    found = match([Row(2, row, row, "x")], slides)
    assert [i for _, i in found.rows] == ([hit] if hit else [])
    assert [r.slide for r in found.without_slide] == ([] if hit else [row])
    assert files_of([row], slides) == ({row: hit} if hit else {})


def test_doubtful_names_are_told() -> None:
    with pytest.raises(CohortError, match=r"fits x/a.svs, y/a.svs"):
        match([Row(2, "a", "a")], ["x/a.svs", "y/a.svs"])
    with pytest.raises(CohortError, match=r"fits a.svs, a.tif"):
        match([Row(2, "a", "a")], ["a.tif", "a.svs"][::-1])
    with pytest.raises(CohortError, match=r"row 3.*is the slide of row 2"):
        match([Row(2, "a", "a"), Row(3, "a.svs", "a")], ["a.svs"])
    both = match([Row(2, "a.svs", "a"), Row(3, "a.tif", "b")], ["a.svs"])
    assert [r.number for r in both.without_slide] == [3], "another file of the name is not the slide of row 2 once more"
    assert "a.svs (row 2) is a.tif" in " ".join(match([Row(2, "a.svs", "a")], ["a.tif"]).notes)
    assert without_suffix("a.b.SVS") == "a.b"
    assert Finder([]).find("a") == (0, [])


# ------------------------------------------------------------------------------------- patients, classes, sites


def test_rows_that_miss_their_slide_by_capital_letters_are_told() -> None:
    found = match([Row(2, "a1.svs", "p"), Row(3, "b1", "q"), Row(4, "c", "r")], ["A1.SVS", "b1.svs", "d.svs"])
    assert [slide for _, slide in found.rows] == ["b1.svs"]
    assert found.notes == ("names that differ in capital letters are not taken for one: a1.svs (row 2) and A1.SVS",)
    zeros = match([Row(2, "7", "p"), Row(3, "B2_10", "q"), Row(4, "70", "r")], ["0007.svs", "B02_10", "0700"])
    assert zeros.rows == []
    assert [note for note in zeros.notes if "7 (row 2) and 0007.svs, B2_10 (row 3) and B02_10" in note], zeros.notes
    assert "70 (row 4)" not in str(zeros.notes)


def test_tcga_barcodes_make_patients(tmp_path: Path) -> None:
    text = "slide,label\n"
    text += "TCGA-AA-1000-01Z-00-DX1.0A.svs,a\nTCGA-AA-1000-01A-01-TS1.0B.svs,a\nTCGA-AA-1001-01Z-00-DX1.0C,b\n"
    path = written(tmp_path / "t.csv", text)
    table = read_table(path)
    assert [r.patient for r in table.rows] == ["TCGA-AA-1000", "TCGA-AA-1000", "TCGA-AA-1001"]
    assert "3 slides are of 2 patients" in " ".join(table.notes)
    alone = read_table(path, LabelsConfig(tcga_patients=False))
    assert len({r.patient for r in alone.rows}) == 3
    with pytest.raises(CohortError, match="--no-tcga-patients"):
        read_rows(written(tmp_path / "u.csv", text.replace("0B.svs,a", "0B.svs,b")))
    assert tcga.patient("x/TCGA-AA-1000-11A-01-TS1.1.svs") == "TCGA-AA-1000"
    assert tcga.normal_tissue("TCGA-AA-1000-11A-01-TS1.1.svs") is True
    assert tcga.normal_tissue("TCGA-AA-1000-01Z-00-DX1") is False
    assert tcga.patient("TCGA-AA-10001-01Z") is None
    (told,) = mixed_tissue({"p": ["TCGA-AA-1000-11A-01-TS1.1", "TCGA-AA-1000-01Z-00-DX1"], "q": ["TCGA-AA-1-11A"]})
    assert "1 slides of normal tissue" in told
    assert not mixed_tissue({"p": ["TCGA-AA-1000-11A-01-TS1.1"], "q": ["TCGA-AA-1000-01Z-00-DX1"]})


@pytest.mark.parametrize("column", ["label", "time", "split", "fold"])
def test_a_patient_who_contradicts_himself_is_refused(tmp_path: Path, column: str) -> None:
    one, two = {"label": ("a", "b"), "time": ("3", "4"), "split": ("train", "test"), "fold": ("0", "1")}[column]
    header, tail = ("slide,patient,time,event", ",1") if column == "time" else (f"slide,patient,{column}", "")
    text = f"{header}\ns1,p,{one}{tail}\ns2,p,{two}{tail}\n"
    with pytest.raises(CohortError, match=f"row 3, column {column}: patient 'p'"):
        read_rows(written(tmp_path / "t.csv", text))


def test_sites_that_share_a_patient_are_one_or_refused() -> None:
    rows = [
        Row(n, f"s{n}", p, "x", site=s)
        for n, (p, s) in enumerate([("p", "A"), ("p", "B"), ("q", "B"), ("q", "C"), ("r", "D"), ("t", "A")])
    ]
    sites, told = joint_sites(rows, "site")
    assert sites == {"p": "A+B+C", "q": "A+B+C", "r": "D", "t": "A+B+C"}
    assert "A+B+C" in told[0]
    with pytest.raises(CohortError, match=r"'p' is of A and B .2 such.*split_by=site"):
        joint_sites(rows, "patient")
    assert joint_sites(rows[4:], "auto") == ({"r": "D", "t": "A"}, [])


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["1", "-1"], ("-1", "1")),
        (["10.0", "9.0"], ("9.0", "10.0")),
        (["pos", "neg"], ("neg", "pos")),
        (["10", "9", "x"], ("9", "10", "x")),
        (["1e1", "2"], ("2", "1e1")),
        (["nan", "1"], ("1", "nan")),
    ],
)
def test_classes_stand_in_the_order_of_numbers_where_all_are(labels: list[str], order: tuple[str, ...]) -> None:
    assert outcomes.classes_of("", "classification", labels, ()) == order


# ---------------------------------------------------------------------------------------------- mpp, regions


def test_mpp_and_regions_of_a_table_reach_the_slides(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    path = written(tmp_path / "t" / "t.csv", "slide,label,mpp,regions\na,x,0.5,\nb.SVS,y,,sub/b.geojson\n")
    listed = Listing(
        [
            SlideEntry("a.svs", tmp_path / "a.svs"),
            SlideEntry("b.svs", tmp_path / "b.svs", 0.25),
            SlideEntry("c.svs", tmp_path / "c.svs"),
        ]
    )
    found = use.obeyed(listed, read_table(path))
    assert [(s.mpp, s.regions) for s in found.slides] == [
        (0.5, None),
        (0.25, (tmp_path / "t").resolve() / "sub" / "b.geojson"),
        (None, None),
    ]
    assert "mpp of 1 slide and regions of 1 slide taken from it" in " ".join(found.notes)
    other = replace(listed, slides=[SlideEntry("a.svs", tmp_path / "a.svs", 0.25)])
    with pytest.raises(CohortError, match=r"row 2, column mpp: 0.5 of a.svs, but the manifest says 0.25"):
        use.obeyed(other, read_table(path))


# ------------------------------------------------------------------------------------- with features


def test_the_order_of_rows_changes_no_training(tmp_path: Path) -> None:
    """Slides of a patient stand in one order, whatever the table's: the same patients, digests and folds."""
    work = Work(tmp_path / "work")
    rows = make_features(work, 6, slides_each=3)
    config = TrainConfig(folds=2)
    one = cases.labelled(rows, work.features("texture"), config)
    two = cases.labelled(rows[::-1], work.features("texture"), config)
    assert one.patients == two.patients
    assert list(one.patients[0].slides) == sorted(one.patients[0].slides)
    assert cases.make_folds(one, config) == cases.make_folds(two, config)
    assert cases.unlabelled(work.features("texture"), rows) == cases.unlabelled(work.features("texture"), rows[::-1])
    assert one.order == ["classes: no, yes; the positive one is yes (other order: train.classes)"]


def test_train_tells_of_columns_that_only_tiling_obeys(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    make_features(work, 3, slide_mpp=[0.25, 0.25])
    path = written(tmp_path / "t.csv", "slide,label,mpp,regions\ns00_0,x,0.25,\ns01_0,y,0.5,\ns02_0,x,,r.geojson\n")
    mpp, regions = use.too_late(read_table(path), work.features("texture"), work)
    assert "s01_0.svs (tiles 0.25, the table 0.5)" in mpp
    assert "s00_0" not in mpp
    assert "regions of 1 slides were not there" in regions
    assert "s02_0.svs" in regions
    plain = written(tmp_path / "u.csv", "slide,label\ns00_0,x\n")
    assert use.too_late(read_table(plain), work.features("texture"), work) == []
    assert "split and mpp" in " ".join(
        use.unused_by_score(read_table(written(tmp_path / "v.csv", "slide,split,mpp\na,test,1\n")), False)
    )


def test_imported_features_find_the_slide_of_their_name(tmp_path: Path) -> None:
    """Pictures of what lies on a slide at hand; of the rest, why there are none."""
    work = Work(tmp_path / "work")
    work.root.mkdir()
    cohort.remember(work, [SlideEntry(f"ward/{n}.tif", tmp_path / f"{n}.tif") for n in ("a", "b", "d")])
    stores = {}
    for name, more in {"a": {}, "b": {"coords_frame": "none: no coordinates"}, "c": {}}.items():
        writer = StoreWriter(work.feature_store("e", name), {"weights_id": "imported", **more})
        writer.write("features", np.zeros((2, 3), np.float32))
        stores[name] = work.feature_store("e", name)
    (tmp_path / "fold").mkdir()
    (tmp_path / "fold" / "model.json").write_text(records.card().text())
    patients = [SimpleNamespace(slides=(n,), stores=(p,)) for n, p in stores.items()]
    scored = SimpleNamespace(data=SimpleNamespace(patients=patients), models={"a": [tmp_path / "fold"]}, out=tmp_path)
    stage, told = draw.drawing(work, Config(), scored)
    assert [(s.id, s.path.name) for s in stage.slides] == [("a", "a.tif")]
    assert sorted(told) == [
        "no pictures of 1 slides (b): their features came without coordinates",
        "no pictures of 1 slides (c): their files are not in cohort.csv",
    ]
    assert [s.name for s in status.read(work)][:2] == ["tile", "import e"]
    assert status.read(work)[1].keys["done"] == ["a", "b", "c"]


def test_the_separator_can_be_declared(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "slide;label\ns1;a\ns2;b\n", "utf-8")
    assert [(r.slide, r.label) for r in read_table(path, LabelsConfig(separator="semicolon")).rows] == PLAIN
    with pytest.raises(CohortError):
        read_table(path, LabelsConfig(separator="comma"))
