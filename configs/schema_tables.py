"""The settings by which tables are read: of slides and labels, and of patients. Part of the schema, see `schema.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mhim.configs.base import Settings

MISSING = ("NA", "N/A", "#N/A", "<NA>", "nan", "null", ".", "[Not Available]", "[Not Applicable]", "[Unknown]")


class LabelsConfig(Settings):
    """How a table of slides (labels or manifest) is read. What was read decides results, not how it was found."""

    slide_column: str = Field(
        "", description="column with paths or ids of the slides; empty: slide, slide_id, wsi or filename"
    )
    patient_column: str = Field("", description="column with the patient; empty: patient, patient_id or case_id")
    label_column: str = Field("", description="column with the class; empty: label")
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
