"""Bags as a table: what is read, what is refused by row and column, and the given folds obeyed by a training."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.exchange import bag_table
from mhim.pipeline.store import layout

Cli = Callable[..., tuple[int, str]]
SHARED = Path(__file__).resolve().parents[4] / "shared" / "mil"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bags.csv"
    path.write_text(text)
    return path


def test_without_a_header_it_is_label_bag_features(tmp_path: Path) -> None:
    facts, values, coords = bag_table.read(written(tmp_path, "1,a,0.5,2\n1,a,1,3\n0,b,4,5\n"))
    assert facts == {"a": {"label": "1"}, "b": {"label": "0"}}
    np.testing.assert_array_equal(values["a"], np.array([[0.5, 2], [1, 3]], np.float32))
    np.testing.assert_array_equal(coords["a"], [[0, 0], [1, 0]])


def test_named_columns_may_stand_anywhere(tmp_path: Path) -> None:
    text = "f1,bag,x,y,fold,label,patient,f2\n1,a,10,20,3,yes,P,2\n"
    facts, values, coords = bag_table.read(written(tmp_path, text))
    assert facts == {"a": {"fold": "3", "label": "yes", "patient": "P"}}
    np.testing.assert_array_equal(values["a"], [[1, 2]])
    np.testing.assert_array_equal(coords["a"], [[10, 20]])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("label,slide,f\n1,a,2\n", "needs a column `bag`"),
        ("label,bag\n1,a\n", "no feature columns"),
        ("1,a,0.5\n1,a\n", "row 2: 2 columns, expected 3"),
        ("1,a,0.5\n0,a,0.5\n", "row 2, column label: bag a has '0' here, '1' before"),
        ("bag,label,f\na,1,0.5\na,1,x\n", "row 3, column f: 'x' is not a number"),
        ("1,a,0.5\n1,a,nan\n", "row 2, column f0: 'nan' of bag a"),
        ("1,a,inf\n", "row 1, column f0: 'inf' of bag a"),
    ],
)
def test_what_cannot_be_read_is_told_by_row_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CohortError, match=says):
        bag_table.read(written(tmp_path, text))


def test_other_bags_under_the_same_name_are_refused(tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "w")
    bag_table.import_bags(written(tmp_path, "1,a,0.5\n0,b,1\n"), work, "mine")
    bag_table.import_bags(tmp_path / "bags.csv", work, "mine")
    with pytest.raises(CohortError, match="other features already"):
        bag_table.import_bags(written(tmp_path, "1,a,0.6\n0,b,1\n"), work, "mine")


def test_a_real_set_trains_on_its_given_folds(cli: Cli, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("needs data: real bags, in ../shared/mil")
    told = json.loads((SHARED / "musk1_folds.json").read_text())["folds"]
    fold_of = {str(bag): f["fold"] for f in told if f["rep"] == 0 for bag in f["test_bag_ids"]}
    lines = [line.split(",") for line in (SHARED / "musk1.csv").read_text().split()]
    header = ["label", "bag", "fold", *(f"f{i}" for i in range(166))]
    table = [header, *([label, bag, str(fold_of[bag]), *values] for label, bag, *values in lines)]
    bags = written(tmp_path, "".join(",".join(row) + "\n" for row in table))
    work, items = tmp_path / "w", tmp_path / "items"
    assert cli("import", bags, "--encoder", "musk1", "--work", work)[0] == 0
    items.write_text("teacher/fold_2\nfold_2\n")
    code, text = cli(
        "train",
        "--model",
        "mhim",
        "--encoder",
        "musk1",
        "--work",
        work,
        "--epochs",
        "1",
        "--workers",
        "1",
        "--items",
        items,
        "--set",
        "train.standardize=true",
        "--set",
        "train.min_epochs=0",
        "--set",
        "train.model_params={student_params: {width: 16}}",
    )
    assert code == 0, text
    with open(work / "runs" / "mhim" / "splits.csv", newline="") as f:
        tested = {r["patient"]: int(r["fold"]) for r in csv.DictReader(f) if r["split"] == "test"}
    assert tested == fold_of
