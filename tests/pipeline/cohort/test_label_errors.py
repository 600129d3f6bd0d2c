"""What is wrong with a table of labels is said in the file's own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhim.configs.schema import LabelsConfig
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.labels.table import read_table


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,who,stage,died,months\na,p,I,0,1\nb,p,II,0,1\n", "row 3, column stage: patient 'p' has 'II' here"),
        ("image,who,stage,died,months\na,p,I,0,x\n", "row 2, column months: 'x' is not a number"),
        ("image,who,stage,died,months\na,p,I,perhaps,1\n", "row 2, column died: 'perhaps' must be 0 or 1"),
        ("image,who,stage,died,months\na,p,I,,1\n", "row 2, columns months and died: give both or none; died is"),
        ("image,who,stage,died,months\n,p,I,0,1\n", "row 2, column image: it is empty"),
    ],
)
def test_errors_name_a_column_as_the_file_does(text: str, told: str, tmp_path: Path) -> None:
    given = {"slide": "image", "patient": "who", "label": "stage", "time": "months", "event": "died"}
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(CohortError) as error:
        read_table(path, LabelsConfig(**{f"{k}_column": v for k, v in given.items()}))
    assert told in str(error.value)
