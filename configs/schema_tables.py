"""The settings by which tables are read: of slides and labels, and of patients. Part of the schema, see `schema.py`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mhim.configs.base import Settings


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]  # a lone name is a list of one
MISSING = ("NA", "N/A", "#N/A", "<NA>", "nan", "null", ".", "[Not Available]", "[Not Applicable]", "[Unknown]")


class LabelsConfig(Settings):
    """How a table of slides (labels or manifest) is read. What was read decides results, not how it was found."""

    slide_column: str = Field(
        "", description="column with paths or ids of the slides; empty: slide, slide_id, wsi or filename"
    )
    patient_column: str = Field("", description="column with the patient; empty: patient, patient_id or case_id")
    label_column: str = Field(
        "",
        description="column with the class, level or number; several, separated by commas, are the targets of one run; empty: label",
    )
    time_column: str = Field("", description="column with the survival time; empty: time")
    event_column: str = Field("", description="column that tells whether the event happened; empty: event")
    event_words: dict[str, int] = Field(
        default_factory=dict,
        description="further words of the event column, as {relapse: 1, well: 0}; known: 1 and 0, dead and alive, 1:DECEASED and the like",
    )
    missing: tuple[str, ...] = Field(MISSING, description="cells that mean: not known, in any case, besides blank ones")
    encoding: str = Field(
        "auto", description="encoding of a text table, such as latin-1; auto: UTF-8 or UTF-16, else Windows-1252"
    )
    separator: Literal["auto", "comma", "semicolon", "tab", "pipe"] = Field(
        "auto", description="separator of a text table"
    )
    sheet: str = Field("", description="sheet of an xlsx file; empty: the first that holds something")
    tcga_patients: bool = Field(
        True,
        description="where no column tells the patient, slides with TCGA barcodes belong to the patient of the barcode",
    )


class TablesConfig(Settings):
    """How patients' tables (`--table NAME=FILE`) are read and prepared. Per table: `{clinical: ...}` by its name."""

    patient_column: dict[str, str] = Field(
        default_factory=dict,
        description="table -> column with the patient; else patient, patient_id or case_id, or a first column without a name",
    )
    columns: dict[str, Names] = Field(
        default_factory=dict, description="table -> the columns to use (`*` stands for anything); else all"
    )
    leave_out: dict[str, Names] = Field(
        default_factory=dict, description="table -> columns not to use (`*` stands for anything), such as outcomes"
    )
    factors: dict[str, Names] = Field(
        default_factory=dict, description="table -> columns of numbers that are names of groups, such as codes"
    )
    numbers: dict[str, Names] = Field(
        default_factory=dict, description="table -> columns that must be numbers, whatever their cells look like"
    )
    groups: dict[str, Names] = Field(
        default_factory=dict,
        description="table -> groups of its number columns: `.gmt` files (pathways), or beginnings of column names such as lab_",
    )
    smallest_group: int = Field(3, ge=1, description="groups with fewer columns at hand are left out, by name")
    most_levels: int = Field(
        30, ge=2, description="a column of text with more different texts is left out, unless `factors` names it"
    )
    missing: tuple[str, ...] = Field(MISSING, description="cells that mean: not known, in any case, besides blank ones")
    encoding: str = Field(
        "auto", description="encoding of text tables, such as latin-1; auto: UTF-8 or UTF-16, else Windows-1252"
    )
    separator: Literal["auto", "comma", "semicolon", "tab", "pipe"] = Field(
        "auto", description="separator of text tables"
    )
    sheet: dict[str, str] = Field(
        default_factory=dict, description="table -> sheet of its xlsx file; else the first that holds something"
    )
    impute: Literal["median", "mean"] = Field(
        "median", description="what a missing number becomes, of the training part's known cells"
    )
    indicators: bool = Field(
        False, description="one more column per number column with missing cells, which tells where they are"
    )
    select: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="table -> number of columns to keep, those that tell most of the outcome in the training part; else all",
    )


def plain_names(tables: dict[str, str]) -> dict[str, str]:
    """`train.tables`, whose names become folders and columns. Raises ValueError."""
    wrong = [n for n in tables if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", n) or n in ("slide", "slides")]
    if wrong:
        raise ValueError(f"{wrong[0]!r} cannot be the name of a table: letters, digits and _, and not slide")
    return tables
