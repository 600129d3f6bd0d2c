"""Labels as the field publishes them, turned into this program's columns.

In: the text of a label file. Out: the same rows as `slide,label` or `slide,patient,time,event`. Ids match whole, never
by a part: slide_1 does not take slide_10's features. Two label files are known: headerless `id,label` (id of a slide,
or of a TCGA patient), and `Study,ID,Event,Status,WSI` (Event: time in months; Status: 1 if the event was seen; WSI:
slide files, several apart by semicolons).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.label_rows import COLUMNS, CohortError, Row

SURVIVAL = ("ID", "Event", "Status", "WSI")
KEPT = {"split": "split", "fold": "fold", "site": "site"}


def translate(text: str) -> str:
    """Label text in this program's columns; text that is in them already, or in no known form, comes back as it is."""
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    header = [c.strip() for c in lines[0]] if lines else []
    if set(SURVIVAL) <= set(header):
        return _survival(header, lines[1:])
    headless = not ({h.lower() for h in header} & {*COLUMNS, "id", "case", "case_id", "slide_id", "name"})
    if len(header) == 2 and headless and all(len(line) == 2 for line in lines):
        return _write(["slide", "label"], [[line[0].strip(), line[1].strip()] for line in lines])
    return text


def of_patients(rows: Iterable[Row], slides: Iterable[str]) -> list[Row]:
    """Rows that name a TCGA patient, one per slide of that patient; all other rows as they are.

    A slide is the patient's when the first three parts of its barcode (TCGA-XX-XXXX) are the id, character by
    character."""
    of: dict[str, list[str]] = {}
    for slide in slides:
        parts = Path(slide).name.split(".")[0].split("-")
        if len(parts) > 3 and parts[0] == "TCGA":
            of.setdefault("-".join(parts[:3]), []).append(slide)
    made = []
    for row in rows:
        made += [replace(row, slide=s, patient=row.slide) for s in of[row.slide]] if row.slide in of else [row]
    return made


def _survival(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    at = {name: header.index(name) for name in (*SURVIVAL, *(k for k in KEPT if k in header))}
    extra = [k for k in KEPT if k in at]
    rows = []
    for line in lines:
        cells = [c.strip() for c in line]
        if len(cells) != len(header):
            raise CohortError(f"labels: {','.join(cells)} has {len(cells)} fields, the header {len(header)}")
        status = cells[at["Status"]]
        event = {"0": "0", "0.0": "0", "1": "1", "1.0": "1"}.get(status, status)
        for slide in cells[at["WSI"]].split(";"):
            if slide.strip():
                name = slide.strip().removesuffix(".pt")
                rows.append([name, cells[at["ID"]], cells[at["Event"]], event, *(cells[at[k]] for k in extra)])
    return _write(["slide", "patient", "time", "event", *extra], rows)


def _write(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
