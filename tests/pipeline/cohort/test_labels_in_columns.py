"""One or several columns of labels: a decimal comma is a number for every reader, and what is told names the column."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhim.configs.schema import LabelsConfig, TrainConfig
from mhim.mil.tasks import Regression
from mhim.pipeline.cohort import outcomes
from mhim.pipeline.cohort.labels.rows import CohortError, Row
from mhim.pipeline.cohort.labels.table import Table, read_table
from mhim.pipeline.results import measures


def table(folder: Path, text: str, columns: str = "") -> Table:
    path = folder / "labels.csv"
    path.write_text(text)
    return read_table(path, LabelsConfig(label_column=columns))


def test_decimal_commas_are_numbers_whatever_asks(tmp_path: Path) -> None:
    rows = table(tmp_path, "slide;label\na;9,5\nb;10,5\nc;2\n").rows
    with pytest.raises(
        CohortError, match=r"the labels: 3 distinct numbers \(2\.0, 9\.5, 10\.5\), which may be classes"
    ):
        outcomes.told(rows, TrainConfig())
    (levels,) = outcomes.told(rows, TrainConfig(task="ordinal"))
    assert levels.classes == ("2", "9,5", "10,5")
    (one,) = outcomes.told(rows, TrainConfig(task="regression"))
    assert outcomes.targets(rows, (one,)) == [9.5, 10.5, 2.0]
    same = table(tmp_path, "slide;label\na;9,50\nb;9,5\n").rows
    with pytest.raises(CohortError, match="all 2 labelled slides are '9,50'"):
        outcomes.told(same, TrainConfig(task="regression"))
    # classes keep the order that earlier versions gave them
    (classes,) = outcomes.told(rows, TrainConfig(task="classification"))
    assert classes.classes == ("2", "10,5", "9,5")


def test_labels_of_new_patients_are_read_as_those_of_training() -> None:
    measure = measures.of(Regression(mean=0.0, sd=1.0))
    assert measure.told(Row(2, "a", "a", "9,5", separator=";")) == {"label": 9.5}
    with pytest.raises(CohortError, match="row 2, column label: is the comma of '9,5' a decimal or a thousands one"):
        measure.told(Row(2, "a", "a", "9,5"))
    with pytest.raises(CohortError, match="row 2, column ki67: '1_0' is not a number, which this model predicts"):
        measure.told(Row(2, "a", "a", "1_0", label_column="ki67"))
    with pytest.raises(CohortError, match="row 2, column label: 'inf' is not finite"):
        measure.told(Row(2, "a", "a", "inf"))


def test_each_of_several_columns_is_told_by_its_own_name(tmp_path: Path) -> None:
    found = table(tmp_path, "slide,er,pr\na,pos,yes\nb,neg,NA\nc,Pos,no\nd,,no\n", "er,pr")
    text = "\n".join(found.notes)
    assert "`er` holds 'Pos' (1) and 'pos' (1), which look like one and are taken as two classes" in text
    assert "1 cells of `pr` are missing values (1 NA;" in text
    assert "target." not in text
    numbers = "\n".join(table(tmp_path, "slide,PD-L1\na,1\nb,1.0\nc,NA\n", "PD-L1").notes)
    assert "`PD-L1` holds '1' (1) and '1.0' (1), which look like one and are two classes, unless the column" in numbers
    assert "1 cells of `PD-L1` are missing values (1 NA;" in numbers
    made = outcomes.told(found.rows, TrainConfig())
    assert outcomes.lacking(made) == "value of er or pr"
