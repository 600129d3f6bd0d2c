"""`pipeline check --table` and the join: who is in which table, and what is odd about its columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.configs.schema import Config, LabelsConfig, TablesConfig, TrainConfig
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.patient_tables import check, columns_told, join
from mhim.pipeline.cohort.patient_tables.table import Kinds

Cli = Callable[..., tuple[int, str]]
N = 120


def rows(**columns: np.ndarray) -> Rows:
    return Rows(tuple(f"p{i:03d}" for i in range(N)), tuple(columns), np.array(list(columns.values()), dtype=float).T)


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def written(path: Path, header: str, lines: list[str]) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def settings(folder: Path, **tables: str) -> Config:
    files = {}
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text)
        files[name] = str(folder / f"{name}.csv")
    return Config(train=TrainConfig(tables=files))


# ---------------------------------------------------------------------------------------------- the join


def test_who_has_what_is_told_and_nothing_is_guessed(tmp_path: Path) -> None:
    config = settings(tmp_path, clinical="patient,age\nA,1\nB,\nb,3\nZ,4\n", rna="patient,G\nB,1\nC,2\n")
    found, notes = join.of_patients(join.read(config), ["A", "B", "C", "D"], ["A", "B", "D"])
    assert {k: t.patients for k, t in found.items()} == {"clinical": ("A", "B"), "rna": ("B", "C")}
    text = "\n".join(notes)
    assert "table clinical: 2 of 4 patients; not in it: C, D; 2 rows are of nobody here: Z, b" in text
    assert "table rna: 2 of 4 patients; not in it: A, D" in text
    assert "patients by what they have: 1 rna, 1 slides, 1 slides + clinical, 1 slides + rna" in text
    _, notes = join.of_patients(join.read(config), ["A", "B ", "C"])
    assert "table clinical: 'B' and 'B ' look like one patient and are two: ids are compared exactly" in notes


@pytest.mark.parametrize(
    ("ids", "patients", "why"),
    [
        (["TCGA-AA-1000-01A", "TCGA-AA-1001-01A"], ["TCGA-AA-1000"], "cut them to the patient's, the first 12"),
        (["7", "8"], ["007", "008"], "'007' and '7' differ in how they are written"),
        (["x", "y"], ["A", "B"], "is 'patient' the patients' column (tables.patient_column.clinical)?"),
        (["TP53"], ["age", "B"], "turn it round so that each has a row"),
    ],
)
def test_a_table_of_nobody_here_says_why(tmp_path: Path, ids: list[str], patients: list[str], why: str) -> None:
    config = settings(tmp_path, clinical="patient,age\n" + "".join(f"{i},{k}\n" for k, i in enumerate(ids)))
    with pytest.raises(CohortError) as error:
        join.of_patients(join.read(config), patients)
    assert "table clinical: no patient of the" in str(error.value)
    assert why in str(error.value)


def test_settings_of_a_table_that_is_not_given_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, clinical="patient,age\nA,1\nB,2\n")
    wrong = config.model_copy(update={"tables": TablesConfig(groups={"rna": ("x_",)})})
    with pytest.raises(CohortError, match=r"tables\.groups names 'rna', and there is no --table rna=FILE"):
        join.read(wrong)
    with pytest.raises(CohortError, match="--table clinical: the run was not trained with such a table; it knows: rna"):
        join.read(config, {"rna": Kinds(("G",), ())})


def test_the_record_says_what_was_read_without_a_path(tmp_path: Path) -> None:
    config = settings(tmp_path, clinical="patient,age,sex,x\nA,1,F,\nB,2,M,\n")
    found = json.loads(join.text(join.of_patients(join.read(config), ["A", "C"])[0]))
    assert found["clinical"].pop("sha256") == join.read(config)["clinical"].sha256
    assert found == {
        "clinical": {
            "file": "clinical.csv",
            "patient_column": "patient",
            "patients": 1,
            "numbers": ["age"],
            "factors": ["sex"],
            "groups": {},
            "left_out": {"x": "no cell is filled"},
            "missing": list(config.tables.missing),
        }
    }


# ---------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("factor", "name"), [(2.54, "cm and inches"), (30.44, "days and months"), (100.0, "shares and percent")]
)
def test_columns_of_two_units_are_told(factor: float, name: str) -> None:
    draw = draws()
    x = draw.normal(170, 9, N)
    found = columns_told.mixed_units(rows(height=np.where(np.arange(N) % 4, x, x / factor), plain=x))
    assert list(found) == ["height"]
    assert found["height"].startswith("30 patients around ")
    assert f"times: {name}?)" in found["height"]


def test_usual_columns_are_not_called_mixed() -> None:
    draw = draws(1)
    flags = draw.integers(0, 2, N) * 99 + 1.0
    twice = np.where(np.arange(N) % 2, draw.normal(10, 1, N), draw.normal(30, 3, N))  # two heaps of no such factor
    broad = np.exp(draw.normal(0, 2, (30, N)))
    found = columns_told.mixed_units(rows(flags=flags, twice=twice, signed=draw.normal(size=N),
                                          **{f"b{i}": x for i, x in enumerate(broad)}))  # fmt: skip
    assert found == {}


def test_columns_that_tell_the_outcome_are_told_and_chance_makes_none() -> None:
    draw = draws(2)
    noise = {f"g{i}": x for i, x in enumerate(draw.normal(size=(3000, N)))}
    classes = [("low", "high", "mid")[i % 3] for i in range(N)]
    copy = np.array([c == "mid" for c in classes]) + 0.2 * draw.normal(size=N)
    found = columns_told.leaks_of_classes(rows(copy=copy, **noise), classes)
    assert list(found) == ["copy"]
    assert found["copy"].endswith("of 'mid'")
    times = [(float(t), int(e)) for t, e in zip(draw.exponential(10, N), draw.random(N) < 0.5, strict=True)]
    months = np.array([t for t, _ in times])
    weak = np.array([-t for t, _ in times]) + draw.normal(0, 10, N)
    event = np.array([e for _, e in times])
    found = columns_told.leaks_of_survival(rows(days=months * 30 + draw.normal(size=N), weak=weak, event=event), times)
    assert set(found) == {"days", "event"}
    assert found["days"].startswith("C-index ")
    numbers = rows(copy=months**2, weak=months + draw.normal(0, 20, N), **noise)
    assert columns_told.leaks_of_numbers(numbers, months.tolist()) == {"copy": "rank correlation 1.000"}


def test_columns_and_words_that_tell_the_site_are_told() -> None:
    sites = [f"s{i % 3}" for i in range(N)]
    words = tuple({"s0": "scanner A", "s1": "scanner B", "s2": "scanner B"}[s] for s in sites)
    of = Rows(
        tuple(map(str, range(N))), (), np.empty((N, 0)), {"scanner": words, "any": tuple("xy"[i % 2] for i in range(N))}
    )
    assert columns_told.leaks_of_sites(of, sites) == {"scanner": "AUC 1.000 of 's0'"}


def test_check_tells_all_of_it_in_few_lines(tmp_path: Path, cli: Cli) -> None:
    draw = draws(3)
    labels = written(
        tmp_path / "labels.csv", "slide,patient,label,site", [f"s{i},P{i},{'ab'[i % 2]},h{i % 3}" for i in range(N)]
    )
    lines = []
    for i in range(N):
        age = "" if i % 4 == 0 else str(round(float(draw.normal(60, 9)), 1))
        height = float(draw.normal(170, 8)) / (2.54 if i % 5 == 0 else 1)
        lines.append(f"P{i},{age},{height:.1f},7,{i % 2},{'FM'[i // 3 % 2]},{'odd' if i == 3 else 'usual'},L{i % 3},1")
    table = written(tmp_path / "c.csv", "patient,age,height,flat,copy,sex,word,lab,os_months", lines)
    code, said = cli("check", "--table", f"clinical={table}", "--labels", labels, "--out", tmp_path / "out")
    assert code == 1
    for line in (
        "table clinical: column copy (AUC 1.000 of 'a'): by itself it tells the outcome",
        "table clinical: column lab (AUC 1.000 of 'h0'): tells the site",
        "table clinical, column height: two units? 24 patients around ",
        "table clinical: 2 columns have one value only, which tells nothing: flat, os_months",
        "table clinical: 1 column lacks 20% of the cells or more: age 25%",
        "table clinical: 1 word of factors of fewer than 5 patients: word = odd (1)",
        "table clinical: 1 column is called like outcomes or folds: os_months",
        f"patients by what they have: {N} clinical, slides not looked at",
    ):
        assert line in said
    with open(tmp_path / "out" / "tables.csv", newline="") as file:
        found = {r["column"]: r for r in csv.DictReader(file)}
    assert found["age"]["known"] == str(N - N // 4)
    assert found["sex"]["words"] == f"F={N // 2} M={N // 2}"
    assert found["copy"]["problems"] == "tells the outcome: AUC 1.000 of 'a'"
    good = written(tmp_path / "good.csv", "patient,age", [f"P{i},{50 + i % 17}" for i in range(N)])
    code, said = cli("check", "--table", f"clinical={good}", "--labels", labels, "--out", tmp_path / "out")
    assert (code, "nothing needs a person" in said) == (0, True)


def test_columns_that_tell_one_of_several_targets_are_told(tmp_path: Path) -> None:
    draw, n = draws(3), 60
    ki67 = draw.permutation(n) + 0.5
    labels = written(
        tmp_path / "labels.csv",
        "slide;patient;er;ki67",
        [f"s{i};p{i};{['neg', 'pos'][i % 2]};{str(ki67[i]).replace('.', ',')}" for i in range(n)],
    )
    lines = ["patient,status,mib1,age"]
    lines += [f"p{i},{i % 2},{ki67[i] * 2},{draw.integers(40, 80)}" for i in range(n)]
    config = settings(tmp_path, clinical="\n".join(lines) + "\n")
    config = config.model_copy(update={"labels": LabelsConfig(label_column="er,ki67")})
    (problem,) = [p for p in check.check(config, labels).problems if "by itself it tells the outcome" in p]
    assert "columns status (er: AUC 1.000 of 'neg'), mib1 (ki67: rank correlation 1.000)" in problem


def test_check_tells_tables_that_cannot_be_read_beside_those_that_can(tmp_path: Path, cli: Cli) -> None:
    bad = written(tmp_path / "bad.csv", "code,v", ["A,1"])
    good = written(tmp_path / "good.csv", "patient,v", ["A,1", "B,2"])
    code, said = cli("check", "--table", f"a={bad}", "--table", f"b={good}", "--out", tmp_path / "out")
    assert code == 1
    assert "table a: no column tells the patients" in said
    assert "good.csv: 2 patients, 1 column of numbers, 0 factors" in said
    code, said = cli("check", "--out", tmp_path / "out")
    assert (code, "nothing to check: name the slides, or patients' tables" in said) == (2, True)
    for wrong, why in (("x", "write NAME=FILE"), ("a=", "write NAME=FILE"), ("2=x", "cannot be the name of a table")):
        code, said = cli("check", "--table", wrong, "--out", tmp_path / "out")
        assert (code, why in said) == (2, True), said
    code, said = cli("check", "--table", f"a={good}", "--table", f"a={bad}")
    assert (code, "there is a 'a' already" in said) == (2, True)


def test_numbers_as_labels_and_unknown_labels_are_looked_at(tmp_path: Path) -> None:
    labels = written(tmp_path / "l.csv", "slide,patient,label", [f"s{i},P{i},{i}" for i in range(40)])
    config = settings(
        tmp_path, clinical="patient,twice,other\n" + "".join(f"P{i},{2 * i},{i % 7}\n" for i in range(40))
    )
    found = check.check(config, labels)
    assert len(found.problems) == 1
    assert found.problems[0].startswith("table clinical: column twice (rank correlation 1.000)")


def test_check_names_the_outcome_in_a_table_and_takes_patients_without_slides(tmp_path: Path, cli: Cli) -> None:
    labels = written(tmp_path / "labels.csv", "slide,patient,class", ["a.svs,A,x", ",B,y"])
    table = written(tmp_path / "c.csv", "patient,age,Class", ["A,50,x", "B,60,y"])
    given = ["check", "--labels", labels, "--set", "labels.label_column=class", "--out", tmp_path / "out"]
    code, said = cli(*given, "--table", f"clinical={table}")
    assert code == 1
    assert "is what labels.csv tells the outcome by; leave it out (--set 'tables.leave_out.clinical=[Class]')" in said
    code, said = cli(*given, "--table", f"clinical={table}", "--set", "tables.leave_out={clinical: [Class]}")
    assert (code, "table clinical: 2 of 2 patients" in said) == (0, True), said
