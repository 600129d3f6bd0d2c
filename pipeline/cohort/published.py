"""Labels as the field publishes them, turned into this program's columns.

In: the cells of a label file. Out: the same rows as slide, label or slide, patient, time, event, each with the line it
came from. Two label files are known: headerless `id,label` (id of a slide, or of a TCGA patient), and
`Study,ID,Event,Status,WSI` (Event: time in months; Status: 1 if the event was seen; WSI: slide files, several apart by
semicolons).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mhim.pipeline.cohort.labels.cells import Line, Sheet, trimmed
from mhim.pipeline.cohort.labels.rows import COLUMNS, CohortError

SURVIVAL = ("ID", "Event", "Status", "WSI")
KEPT = {"split": "split", "fold": "fold", "site": "site"}
_HEADS = {*COLUMNS, "id", "case", "case_id", "slide_id", "name", "wsi", "filename", "patient_id"}


def translate(sheet: Sheet, name: str) -> Sheet:
    """The sheet in this program's columns; one that is in them already, or in no known form, comes back as it is."""
    header = sheet.lines[0][1]
    if set(SURVIVAL) <= set(header):
        return replace(sheet, lines=_survival(sheet.lines))
    sheet = trimmed(sheet)
    headless = not ({h.lower() for h in header} & _HEADS)
    if len(header) == 2 and headless and all(len(cells) == 2 for _, cells in sheet.lines):
        note = f"{name}: no header, taken as slide and label; its first row is {', '.join(header)}"
        return replace(sheet, lines=[(0, ["slide", "label"]), *sheet.lines], notes=(*sheet.notes, note))
    return sheet


def _survival(lines: Sequence[Line]) -> list[Line]:
    header = lines[0][1]
    at = {name: header.index(name) for name in (*SURVIVAL, *(k for k in KEPT if k in header))}
    extra = [k for k in KEPT if k in at]
    rows: list[Line] = [(lines[0][0], ["slide", "patient", "time", "event", *extra])]
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise CohortError(f"row {number}: {','.join(cells)} has {len(cells)} fields, the header {len(header)}")
        for slide in cells[at["WSI"]].split(";"):
            if slide.strip():
                known = [cells[at[k]] for k in ("ID", "Event", "Status", *extra)]
                rows.append((number, [slide.strip().removesuffix(".pt"), *known]))
    return rows
