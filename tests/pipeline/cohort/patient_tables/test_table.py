"""Patients' tables from any usual file: what is a number, what a factor, and what is refused or told."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhim.configs.schema import TablesConfig, TrainConfig, fingerprint_fields
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.patient_tables.groups import gmt
from mhim.pipeline.cohort.patient_tables.table import Kinds, PatientTable, read

PLAIN = "patient,age,sex,psa\nA,61,F,1.5\nB,,M,NA\nC,70,F,-2e-1\n"


def clinical(folder: Path, text: str, **options: object) -> PatientTable:
    path = folder / "t.csv"
    path.write_text(text)
    return read(path, "clinical", TablesConfig(**options))  # type: ignore[arg-type]


def refused(folder: Path, text: str, **options: object) -> str:
    with pytest.raises(CohortError) as error:
        clinical(folder, text, **options)
    return str(error.value).replace(str(folder) + "/", "")


def test_numbers_and_factors_are_told_apart(tmp_path: Path) -> None:
    found = clinical(tmp_path, PLAIN)
    assert found.patients == ("A", "B", "C")
    assert found.kinds == Kinds(("age", "psa"), ("sex",))
    np.testing.assert_array_equal(found.numbers["age"], [61.0, np.nan, 70.0])
    np.testing.assert_array_equal(found.numbers["psa"], [1.5, np.nan, -0.2])
    assert found.factors["sex"] == ("F", "M", "F")
    assert found.notes == ("t.csv: 3 patients, 2 columns of numbers, 1 factor (sex)",)


def test_the_settings_decide_what_a_column_is(tmp_path: Path) -> None:
    text = "patient,code,n,note,dss_months,dss_event\nA,1,1,x1,5,0\nB,2,2,x2,6,1\nC,1,3,x3,7,0\n"
    found = clinical(
        tmp_path, text, factors={"clinical": "code"}, leave_out={"clinical": ["dss_*"]}, most_levels=2, impute="mean"
    )
    assert found.kinds == Kinds(("n",), ("code",))
    assert found.left_out == {
        "dss_months": "by the settings",
        "dss_event": "by the settings",
        "note": "3 different texts: names or free text",
    }
    assert "t.csv: 3 columns are not used: dss_months, dss_event (by the settings); note (3 different texts" in str(
        found.notes
    )
    assert clinical(tmp_path, text, columns={"clinical": ("n", "code")}).kinds == Kinds(("code", "n"), ())
    assert clinical(tmp_path, text, factors={"clinical": "note"}, most_levels=2).kinds.factors == ("note",)
    said = refused(tmp_path, text, numbers={"clinical": "note"})
    assert "row 2, column note: 'x1' is not a number, as 0 of its 3 cells are" in said
    for setting in ("columns", "leave_out", "factors", "numbers"):
        said = refused(tmp_path, text, **{setting: {"clinical": "gone"}})
        assert said == f"tables.{setting}.clinical: t.csv has no column 'gone'"


def test_text_in_a_number_column_is_refused_with_row_and_column(tmp_path: Path) -> None:
    said = refused(tmp_path, "patient,age,n\nA,61,1\nB,old,2\nC,70,<3\nD,71,4\n")
    assert said == (
        "t.csv:\n  row 3, column age: 'old' is not a number, as 3 of its 4 cells are\n"
        "  row 4, column n: '<3' is not a number, as 3 of its 4 cells are\n"
        "  mend the cells, or say that a word means missing (--set 'tables.missing=[...]'), or that the column holds "
        "names of groups (--set 'tables.factors.clinical=[...]')"
    )
    words = TablesConfig(missing=("old", "<3"))
    assert read(tmp_path / "t.csv", "clinical", words).kinds.numbers == ("age", "n")
    assert clinical(tmp_path, "patient,v\nA,1_000\nB,1_000\nC,x\n").factors["v"] == ("1_000", "1_000", "x")


def test_infinite_cells_are_refused(tmp_path: Path) -> None:
    said = refused(tmp_path, "patient,age\nA,inf\nB,2\nC,-Infinity\n")
    assert "row 2, column age: 'inf' is infinite; leave the cell empty, or write the value" in said
    assert "row 4, column age: '-Infinity' is infinite" in said


def test_all_missing_columns_are_left_out_and_told(tmp_path: Path) -> None:
    found = clinical(tmp_path, "patient,age,gone\nA,1,\nB,2,NA\n")
    assert found.left_out == {"gone": "no cell is filled"}
    said = refused(tmp_path, "patient,gone\nA,\nB,[Unknown]\n")
    assert said == "t.csv has no column to use besides the patients: gone (no cell is filled)"
    assert refused(tmp_path, "patient,age\n") == "t.csv has no rows"
    assert "has no column to use" in refused(tmp_path, "patient\nA\n")


def test_the_column_of_patients_is_found_or_asked_for(tmp_path: Path) -> None:
    for name in ("Patient", "patient_id", "case-id"):
        assert clinical(tmp_path, PLAIN.replace("patient", name, 1)).patients == ("A", "B", "C")
    said = refused(tmp_path, PLAIN.replace("patient", "code", 1))
    assert said == (
        "no column tells the patients: t.csv has the columns code, age, sex, psa; say which with "
        "--set tables.patient_column.clinical=NAME"
    )
    own = clinical(tmp_path, PLAIN.replace("patient", "code", 1), patient_column={"clinical": "code"})
    assert own.patients == ("A", "B", "C")
    said = refused(tmp_path, PLAIN, patient_column={"clinical": "code"})
    assert said.startswith("there is no column 'code' (tables.patient_column.clinical): t.csv has the columns patient")
    said = refused(tmp_path, "patient,case_id,v\nA,B,1\n")
    assert "2 columns may be the patients: 'patient' (number 1) and 'case_id' (number 2)" in said
    unnamed = clinical(tmp_path, PLAIN.replace("patient", "", 1))
    assert unnamed.patients == ("A", "B", "C")
    assert "its first column has no name and is taken for the patients" in unnamed.notes[0]
    of_r = clinical(tmp_path, "age\tsex\nA\t61\tF\nB\t62\tM\n")  # write.table names no column of row names
    assert (of_r.patients, of_r.numbers["age"].tolist()) == (("A", "B"), [61.0, 62.0])
    turned = refused(tmp_path, "gene,TCGA-01-0001,TCGA-01-0002,TCGA-01-0003\nTP53,1,2,3\n")
    assert turned.endswith("if patients stand in its columns, turn it round so that each has a row")


def test_rows_of_one_patient_are_one_if_equal_and_refused_if_not(tmp_path: Path) -> None:
    found = clinical(tmp_path, PLAIN + "B,,M,NA\nA,61.0,F,1.50\n")
    assert found.patients == ("A", "B", "C")
    assert "t.csv: 2 rows say again what another row of their patient says: A, B" in found.notes
    said = refused(tmp_path, PLAIN + "A,62,F,1.5\nB,,F,NA\n,1,F,1\n")
    assert said == (
        "t.csv:\n  row 7: no patient is named\n"
        "  row 5: patient 'A' stands in row 2 already with other values of age; keep one row, or their mean\n"
        "  row 6: patient 'B' stands in row 3 already with other values of sex; keep one row, or their mean"
    )
    # columns that are not used do not count
    assert clinical(tmp_path, "patient,age,x\nA,1,1\nA,1,2\n", leave_out={"clinical": "x"}).patients == ("A",)


def test_columns_that_stand_twice_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "patient,TP53,A,TP53\nA,1,2,3\n") == (
        "t.csv: 1 column name stands more than once: 'TP53' (numbers 2, 4); keep one of each, such as their mean"
    )


def test_uneven_rows_are_named(tmp_path: Path) -> None:
    assert "row 3: it has not as many fields as the header (2, not 3)" in refused(tmp_path, "patient,a,b\nA,1,2\nB,1\n")


def test_blank_cells_at_the_right_shift_no_column(tmp_path: Path) -> None:
    for text in ("patient,age,psa\nA,61,1.5,\nB,62,,\n", "patient,age,psa,,\nA,61,1.5\nB,62,,,\n"):
        found = clinical(tmp_path, text)
        assert found.patients == ("A", "B")
        np.testing.assert_array_equal(found.numbers["age"], [61.0, 62.0])
        np.testing.assert_array_equal(found.numbers["psa"], [1.5, np.nan])
    assert "row 2: it has not as many fields" in refused(tmp_path, "patient,age,psa\nA,61,1.5,2,\n")
    # what R writes: a name in every row and none above it
    for text in ("age,psa\nA,61,1.5\nB,62,\n", "age,patient\n1,61,A\n2,62,B\n"):
        assert clinical(tmp_path, text).patients == ("A", "B")


def test_names_and_words_are_compared_composed_as_in_the_labels(tmp_path: Path) -> None:
    text = "patient,gro\u0308\u00dfe,sex\nA,1,ma\u0308nnlich\nB,2,m\u00e4nnlich\n"
    found = clinical(tmp_path, text, missing=("gro\u00df",))
    assert found.factors["sex"] == ("m\u00e4nnlich", "m\u00e4nnlich")
    assert set(found.numbers) == {"gr\u00f6\u00dfe"}


def test_commas_in_numbers_are_those_of_labels_and_told(tmp_path: Path) -> None:
    found = clinical(tmp_path, "patient;age;crp\nA;61;1,5\nB;62;2,250\n")
    np.testing.assert_array_equal(found.numbers["crp"], [1.5, 2.25])
    assert "t.csv: 2 cells are numbers with a decimal comma" in found.notes
    for text in ('patient,crp\nA,"1,5"\nB,"2,5"\n', "patient\tcrp\nA\t1,200\nB\t7\n"):
        assert re.search(
            r"row 2, column crp: is the comma of '1,(5|200)' a decimal or a thousands one\? Write a point",
            refused(tmp_path, text),
        )
    asked = clinical(tmp_path, 'patient,crp\nA,"1,5"\nB,"2,5"\n', factors={"clinical": "crp"})
    assert asked.factors["crp"] == ("1,5", "2,5")


def test_genes_that_a_spreadsheet_made_dates_are_told(tmp_path: Path) -> None:
    found = clinical(tmp_path, "patient,1-Sep,2-Mar,TP53\nA,1,2,3\n1-Mar,1,2,3\na,1,2,4\n")
    text = "\n".join(found.notes)
    assert "2 columns are called like dates (1-Sep, 2-Mar): gene symbols such as SEPT1 and MARCH1 that a" in text
    assert "1 patient is called like dates (1-Mar)" in text
    assert "patients 'A' and 'a' look like one and are taken as two" in text
    mixed = clinical(tmp_path, "patient,grade\nA,High\nB,high\n")
    assert "`grade` holds 'High' and 'high', which look like one and are taken as two" in "\n".join(mixed.notes)
    dates = "patient,born,n\n" + "".join(f"P{i},19{i:02d}-01-02,{i}\n" for i in range(40))
    assert clinical(tmp_path, dates).left_out == {"born": "40 different texts: dates; give years or days instead"}


def test_dialects_packed_files_excel_and_parquet_give_the_same_table(tmp_path: Path) -> None:
    import openpyxl
    import pyarrow as pa
    from pyarrow import parquet

    plain = clinical(tmp_path, PLAIN)
    (tmp_path / "semicolon.csv").write_text(PLAIN.replace(",", ";").replace("1.5", "1,5"))
    (tmp_path / "tab.tsv").write_text("# made by hand\n" + PLAIN.replace(",", "\t"), encoding="utf-16")
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(PLAIN.encode()))
    book = openpyxl.Workbook()
    book.active.append(["nothing here"])
    sheet = book.create_sheet("values")
    for row in (["patient", "age", "sex", "psa"], ["A", 61, "F", 1.5], ["B", None, "M", "NA"], ["C", 70, "F", -0.2]):
        sheet.append(row)
    book.save(tmp_path / "book.xlsx")
    columns = {"age": [61, None, 70], "sex": ["F", "M", "F"], "psa": [1.5, float("nan"), -0.2]}
    parquet.write_table(pa.table({"patient": ["A", "B", "C"], **columns}), tmp_path / "plain.parquet")
    parquet.write_table(pa.table({**columns, "__index_level_0__": ["A", "B", "C"]}), tmp_path / "index.parquet")
    options = TablesConfig(sheet={"clinical": "values"})
    for file in ("semicolon.csv", "tab.tsv", "packed.csv.gz", "book.xlsx", "plain.parquet", "index.parquet"):
        found = read(tmp_path / file, "clinical", options)
        assert found.fingerprint("ABC") == plain.fingerprint("ABC"), file
    with pytest.raises(CohortError, match=r"no sheet 'x' \(tables\.sheet\.clinical\)"):
        read(tmp_path / "book.xlsx", "clinical", TablesConfig(sheet={"clinical": "x"}))
    with pytest.raises(CohortError, match="no such file"):
        read(tmp_path / "gone.csv", "clinical")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(PLAIN.encode())[:-12])
    with pytest.raises(CohortError, match="gzipped and damaged"):
        read(tmp_path / "cut.csv.gz", "clinical")
    (tmp_path / "latin.csv").write_bytes("patient,sex,n\nA,männlich,1\nB,x,2\n".encode("latin-1"))
    told = read(tmp_path / "latin.csv", "clinical").notes[0]
    assert told.endswith("if that is wrong, give --set tables.encoding=...")
    settled = TablesConfig(encoding="latin-1", separator="comma")
    assert read(tmp_path / "latin.csv", "clinical", settled).factors["sex"] == ("männlich", "x")


def test_infinite_values_of_parquet_are_refused_too(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"patient": ["A", "B"], "v": [1.0, float("inf")]}), tmp_path / "t.parquet")
    with pytest.raises(CohortError, match="row 2, column v: 'inf' is infinite"):
        read(tmp_path / "t.parquet", "clinical")


def test_parquet_without_its_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    for module in [m for m in sys.modules if m.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CohortError, match=r'needs pyarrow: pip install "mhim-pipeline\[tables\]"'):
        read(tmp_path / "t.parquet", "clinical")


def test_a_later_table_is_read_as_the_model_knows_it(tmp_path: Path) -> None:
    """Codes that were a factor in training are one again, and a word in a column of numbers is refused."""
    kinds = clinical(tmp_path, "patient,code,age\nA,x,1\nB,2,2\n", factors={"clinical": "code"}).kinds
    path = tmp_path / "new.csv"
    path.write_text("patient,code,age,more\nN,2,3,oh\nM,3,,no\n")
    found = read(path, "clinical", kinds=kinds)
    assert found.kinds == kinds
    assert found.factors["code"] == ("2", "3")
    path.write_text("patient,age\nN,none\nM,4\n")
    with pytest.raises(CohortError, match="row 2, column age: 'none' is not a number, as 1 of its 2 cells are"):
        read(path, "clinical", kinds=kinds)
    path.write_text("patient,other\nN,4\n")
    assert read(path, "clinical", kinds=kinds).kinds == Kinds((), ())


def test_fingerprints_know_cells_kinds_and_groups_of_the_patients_asked_for(tmp_path: Path) -> None:
    plain = clinical(tmp_path, PLAIN)
    assert clinical(tmp_path, PLAIN.replace("C,70", "C,71")).fingerprint("AB") == plain.fingerprint("AB")
    assert clinical(tmp_path, PLAIN + "D,1,F,2\n").fingerprint("CAB") == plain.fingerprint("ABC")
    others = [
        clinical(tmp_path, PLAIN.replace("C,70", "C,71")),
        clinical(tmp_path, PLAIN.replace("B,,M", "B,,F")),
        clinical(tmp_path, PLAIN.replace("age", "years")),
        clinical(tmp_path, PLAIN, factors={"clinical": "psa"}),
        clinical(tmp_path, PLAIN, groups={"clinical": "a"}, smallest_group=1),
    ]
    prints = [t.fingerprint("ABC") for t in (plain, *others)]
    assert len(set(prints)) == len(prints)
    assert clinical(tmp_path, PLAIN).of(["C", "X", "A"]).patients == ("C", "A")


@settings(max_examples=25)
@given(st.permutations(range(3)), st.permutations(range(4)))
def test_the_order_of_rows_and_columns_is_nobodys_business(
    tmp_path_factory: pytest.TempPathFactory, rows: list[int], columns: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    header, *lines = (line.split(",") for line in PLAIN.splitlines())
    cells = [header, *(lines[i] for i in rows)]
    text = "\n".join(",".join(line[j] for j in columns) for line in cells)
    assert clinical(folder, text).fingerprint("ABC") == clinical(folder, PLAIN).fingerprint("ABC")


def test_tables_are_called_by_plain_names() -> None:
    assert TrainConfig(tables={"rna_2": "x.csv"}).tables == {"rna_2": "x.csv"}
    for name in ("2", "a.b", "slide", "a b"):
        with pytest.raises(ValueError, match="cannot be the name of a table"):
            TrainConfig(tables={name: "x.csv"})
    assert "tables" not in fingerprint_fields(TrainConfig())


# ---------------------------------------------------------------------------------------------- groups

GENES = "patient,G1,G2,G3,G4,lab_a,lab_b,sex\nA,1,2,3,4,5,6,F\nB,2,3,4,5,6,7,M\n"


def test_groups_come_from_files_and_from_beginnings_of_names(tmp_path: Path) -> None:
    (tmp_path / "sets.gmt").write_text("S1\tremark\tG1\tG2\tG3\tG9\n\nS2\t\tG4\tG8\tG7\nS3\t\tG4\n")
    wanted = {"clinical": [str(tmp_path / "sets.gmt"), "lab_"]}
    found = clinical(tmp_path, GENES, groups=wanted, smallest_group=2)
    assert found.groups == {"S1": ("G1", "G2", "G3"), "lab": ("lab_a", "lab_b")}
    assert found.notes[1:] == (
        "sets.gmt: 3 of its 7 symbols are no columns: G7, G8, G9",
        "groups of clinical with fewer than 2 columns at hand, left out: S2, S3 (2 of 4; tables.smallest_group)",
        "clinical: 2 groups; number columns in none: 1 of 6",
    )
    assert "no group is left; groups of clinical with fewer than 3 columns at hand, left out: lab (1 of 1;" in refused(
        tmp_path, GENES, groups={"clinical": "lab_"}
    )
    assert "no number column of t.csv begins with 'mol_': G1, G2" in refused(
        tmp_path, GENES, groups={"clinical": "mol_"}
    )
    assert "the group 'lab' stands twice" in refused(tmp_path, GENES, groups={"clinical": ["lab_", "lab_"]})


def test_sets_of_other_genes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sets.gmt").write_text("S1\t\tENSG01\tENSG02\n")
    said = refused(tmp_path, GENES, groups={"clinical": str(tmp_path / "sets.gmt")})
    assert "none of the 2 symbols of sets.gmt is a column of t.csv" in said
    assert said.endswith("they are ENSG01, ENSG02; are these other ids of genes?")


def test_damaged_files_of_sets_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "s.gmt"
    path.write_text("S1\t\tG1\nS1\t\tG2\n")
    with pytest.raises(CohortError, match="line 2: the set 'S1' stands twice"):
        gmt(path)
    path.write_text("S1 G1 G2\n")
    with pytest.raises(CohortError, match="line 1: no tab"):
        gmt(path)
    path.write_text("\n")
    with pytest.raises(CohortError, match="holds no set"):
        gmt(path)


def test_many_more_genes_than_patients_are_read_and_fitted(tmp_path: Path) -> None:
    """20,000 genes of 30 patients."""
    from mhim.mil.fusion.columns import Options, fit

    draw = np.random.default_rng(0)
    x = draw.normal(5, 3, (30, 20_000)).round(3)
    lines = ["patient," + ",".join(f"G{i}" for i in range(20_000))]
    lines += [f"P{k:02d}," + ",".join(map(str, row)) for k, row in enumerate(x)]
    found = clinical(tmp_path, "\n".join(lines))
    np.testing.assert_array_equal(found.rows.values, x)
    kept = fit(found.rows, Options(select=50), [float(v) for v in x[:, 1234]])
    assert len(kept.features) == 50
    assert "G1234" in kept.names
