"""`--table` through the verbs: read once, recorded, in the fingerprint by its rows, and again with new patients."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.store import layout
from tests.pipeline.bags import make_features, sets, write_labels

Cli = Callable[..., tuple[int, str]]
N = 24
QUICK = sets(
    "train.model_params={width: 8, attention_width: 8}",
    "train.folds=2",
    "train.epochs=2",
    "train.patience=0",
    "train.fusion_folds=2",
    "score.bootstrap=20",
    "score.heatmaps=none",
    "cluster.workers=1",
)


def clinical(path: Path, patients: list[str], **cells: str) -> Path:
    """A table of made-up patients; a cell of `cells` by patient is another age."""
    draw = np.random.default_rng(5)
    lines = ["patient,age,sex"]
    for i, patient in enumerate(patients):
        age = f"{50 + 10 * (i % 2) + draw.normal():.2f}" if i % 7 != 3 else ""
        lines.append(f"{patient},{cells.get(patient, age)},{'FM'[i // 2 % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def cohort(tmp_path: Path) -> tuple[layout.Work, list[object], list[str]]:
    """Features, the beginning of a training's command, and the names of the patients."""
    work = layout.Work(tmp_path / "work")
    rows = make_features(work, N)
    labels = write_labels(tmp_path / "labels.csv", rows)
    words = ["train", "--work", work.root, "--labels", labels, "--model", "abmil", "--name", "f", "--fusion", "late"]
    return work, [*words, *QUICK], sorted({r.patient for r in rows})


def answers(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "predictions.csv", newline="") as file:
        return {row["patient"]: row for row in csv.DictReader(file)}


def test_tables_are_recorded_and_a_changed_cell_is_another_training(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    table = clinical(tmp_path / "c.csv", [*names[:-2], "stranger"])
    code, said = cli(*train, "--table", f"clinical={table}")
    assert code == 0, said
    assert f"patients by what they have: {N - 2} slides + clinical, 2 slides" in " ".join(said.split())
    record = json.loads((work.run("f") / "tables.json").read_text())["clinical"]
    assert (record["file"], record["numbers"], record["factors"]) == ("c.csv", ["age"], ["sex"])
    before = {p: p.stat().st_mtime_ns for p in work.run("f").rglob("model.json")}
    clinical(table, [*names[:-2], "stranger"], stranger="99")  # of nobody in the run
    code, said = cli(*train, "--table", f"clinical={table}")
    assert code == 0, said
    assert {p: p.stat().st_mtime_ns for p in work.run("f").rglob("model.json")} == before
    clinical(table, [*names[:-2], "stranger"], **{names[0]: "99"})
    code, said = cli(*train, "--table", f"clinical={table}")
    assert code == 3
    assert "input.table.rows" in said
    code, said = cli(*train, "--table", f"clinical={table}", "--set", "tables.impute=mean")
    assert (code, "input.table.impute" in said) == (3, True), said


def test_new_patients_come_with_their_tables_or_without(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    table = clinical(tmp_path / "c.csv", names)
    assert cli(*train, "--table", f"clinical={table}")[0] == 0
    new = make_features(layout.Work(tmp_path / "new"), 4, seed=9, prefix="n")
    patients = sorted({r.patient for r in new})
    labels = write_labels(tmp_path / "new.csv", new)
    other = clinical(tmp_path / "d.csv", [*patients[:3], "bare"])
    score = ["score", "--work", work.root, "--name", "f", *QUICK]
    given = ["--features", tmp_path / "new" / "features" / "texture", "--labels", labels]
    code, said = cli(*score, *given, "--as", "both", "--table", f"clinical={other}")
    assert code == 0, said
    found = answers(work.run("f") / "new" / "both")
    assert {p: r["modalities"] for p, r in found.items()} == {
        **dict.fromkeys(patients[:3], "slide+clinical"),
        patients[3]: "slide",
        "bare": "clinical",
    }
    code, said = cli(*score, *given, "--as", "slides")
    assert code == 0, said
    assert "table clinical is not given: answers rest on the others" in said
    slides = answers(work.run("f") / "new" / "slides")
    assert {r["modalities"] for r in slides.values()} == {"slide"}
    assert slides[patients[3]]["p_yes"] == found[patients[3]]["p_yes"]  # nobody else's table changes an answer
    code, said = cli(*score, "--as", "table", "--table", f"clinical={other}")
    assert code == 0, said
    lone = answers(work.run("f") / "new" / "table")
    assert {r["modalities"] for r in lone.values()} == {"clinical"}
    assert lone["bare"]["p_yes"] == found["bare"]["p_yes"]


def test_patients_without_slides_are_trained_and_scored_by_their_tables(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    bare = [f"t{i:02d}" for i in range(6)]
    table = clinical(tmp_path / "c.csv", [*names[:-3], *bare])
    with open(tmp_path / "labels.csv", "a") as file:
        file.writelines(f"{'' if i % 2 else f'gone{i}.svs'},{p},{('no', 'yes')[i % 2]}\n" for i, p in enumerate(bare))
    code, said = cli(*train, "--table", f"clinical={table}")
    assert code == 0, said
    said = " ".join(said.split())
    assert "6 patients have no slides with features, tables alone: t00, t01, t02" in said
    assert f"patients by what they have: {N - 3} slides + clinical, 6 clinical, 3 slides" in said
    code, said = cli("score", "--work", work.root, "--name", "f", *QUICK)
    assert code == 0, said
    found = answers(work.run("f"))
    assert set(found) == {*names, *bare}
    assert {found[p]["slide"] for p in bare} == {""}
    rests = {}
    for fold in ("fold_0", "fold_1"):
        with open(work.run("f") / fold / "parts.csv", newline="") as file:
            rests |= {r["patient"]: r["modalities"] for r in csv.DictReader(file)}
    assert {rests[p] for p in bare} == {"clinical"}
    assert {rests[p] for p in names[-3:]} == {"slide"}
    # known again by its name, though no slide is there to know it by
    code, said = cli("score", "--work", work.root, "--name", "f", *QUICK, "--table", f"clinical={table}", "--as", "x")
    assert code == 0, said
    again = answers(work.run("f") / "new" / "x")
    assert all(again[p]["known"].startswith(f"{p} of the run") for p in bare)


def test_a_table_is_refused_where_nothing_would_use_it(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    table = clinical(tmp_path / "c.csv", names)
    plain = [w for w in train if w not in ("--fusion", "late")]
    code, said = cli(*plain, "--table", f"clinical={table}")
    assert code == 2
    assert "train.fusion is none" in said
    assert "e.g. --fusion late" in said
    for idle in ("fusion_params={width: 8}", "fusion_groups=[rna]"):
        code, said = cli(*plain, *sets(f"train.{idle}"))
        assert code == 2
        assert f"train.{idle.partition('=')[0]} says how" in " ".join(said.split())
    fused = ["benchmark", *plain[1:5], *sets(f"train.tables={{clinical: {table}}}", "train.fusion=late")]
    code, said = cli(*fused)
    assert (code, "benchmark compares models of slides alone" in said) == (2, True), said
    code, said = cli(*train)
    assert (code, "--table NAME=FILE" in said) == (2, True)
    code, said = cli(*train, "--table", f"clinical={clinical(tmp_path / 'x.csv', ['a', 'b'])}")
    assert code == 2
    assert "table clinical: no patient of the 24 here has a row" in " ".join(said.split())
    assert cli(*plain)[0] == 0
    code, said = cli("score", "--work", work.root, "--name", "f", *QUICK, "--table", f"clinical={table}")
    assert code == 2
    assert "was trained on slides alone: leave --table away" in said


def test_a_run_without_tables_has_no_record_of_any(
    cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, _ = cohort
    assert cli(*[w for w in train if w not in ("--fusion", "late")])[0] == 0
    assert not (work.run("f") / "tables.json").exists()
    assert "tables" not in (work.run("f") / "config.yaml").read_text()


def test_a_table_that_holds_the_outcome_is_refused_before_any_work(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    code, said = cli(*train, "--table", f"clinical={tmp_path / 'labels.csv'}")  # the labels themselves
    assert code == 2
    said = " ".join(said.split())
    assert "table clinical: 'label' of" in said
    assert "is what labels.csv tells the outcome by" in said
    assert not work.run("f").exists()
    # time and event under the names that the flags give, in another file
    survival = tmp_path / "survival.csv"
    survival.write_text("slide,patient,OS.months,dead\n" + "".join(
        f"s{n[1:]}_0.svs,{n},{5 + i % 9},{i % 2}\n" for i, n in enumerate(names)))  # fmt: skip
    other = tmp_path / "other.csv"
    other.write_text("patient,age,os.months,Dead\n" + "".join(
        f"{n},{50 + i},{5 + i % 9},{i % 2}\n" for i, n in enumerate(names)))  # fmt: skip
    columns = ["--labels", survival, "--time-column", "OS.months", "--event-column", "dead"]
    code, said = cli(*train, *columns, "--table", f"clinical={other}")
    assert code == 2
    assert "--set 'tables.leave_out.clinical=[Dead, os.months]'" in " ".join(said.split())
    code, said = cli(
        *train, *columns, "--table", f"clinical={other}", *sets("tables.leave_out={clinical: [Dead, os.months]}")
    )
    assert code == 0, said
    assert json.loads((work.run("f") / "tables.json").read_text())["clinical"]["numbers"] == ["age"]


def test_new_tables_are_read_by_the_runs_own_words_and_not_by_the_present_settings(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    work, train, names = cohort
    table = clinical(tmp_path / "c.csv", names, **dict.fromkeys(names[:3], "-9"))
    sets_of = tmp_path / "sets.gmt"
    sets_of.write_text("S\t\tage\n")
    own = sets("tables.missing=[NA, '-9']", f"tables.groups={{clinical: [{sets_of}]}}", "tables.smallest_group=1")
    code, said = cli(
        *train, *own, "--table", f"clinical={table}", "--table", f"lab={clinical(tmp_path / 'l.csv', names)}"
    )
    assert code == 0, said
    new = tmp_path / "new.csv"
    new.write_text("patient,age,sex\nx1,-9,F\nx2,,F\nx3,99,F\n")
    score = ["score", "--work", work.root, "--name", "f", *QUICK, "--table", f"clinical={new}"]
    code, said = cli(*score, "--as", "a")
    assert code == 0, said
    found = answers(work.run("f") / "new" / "a")
    assert found["x1"]["p_yes"] == found["x2"]["p_yes"] != found["x3"]["p_yes"]
    # a word of the new file is added; groups, and settings of a table that is not given, are the run's business
    sets_of.unlink()
    also = sets("tables.missing=['99']", f"tables.groups={{clinical: [{sets_of}]}}", "tables.leave_out={lab: [x]}")
    code, said = cli(*score, *also, "--as", "b")
    assert code == 0, said
    again = answers(work.run("f") / "new" / "b")
    assert again["x1"]["p_yes"] == again["x3"]["p_yes"] == found["x2"]["p_yes"]


def test_labels_of_other_slides_are_told_as_such_though_every_patient_is_in_a_table(
    tmp_path: Path, cohort: tuple[layout.Work, list[object], list[str]], cli: Cli
) -> None:
    _, train, names = cohort
    other = tmp_path / "other.csv"
    other.write_text("slide,patient,label\n" + "".join(f"z{n}.svs,{n},{'ab'[i % 2]}\n" for i, n in enumerate(names)))
    table = clinical(tmp_path / "c.csv", names)
    code, said = cli(*train, "--labels", other, "--table", f"clinical={table}")
    assert code == 2, said
    assert "24 rows of the labels have no features: zp00.svs" in " ".join(said.split())
