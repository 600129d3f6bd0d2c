"""One row of a labels table or manifest: its columns, what a cell may hold, and rows that contradict each other.

In: the cells of one line. Out: a `Row`, or an error that names the column. Knows neither files nor slides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

COLUMNS = {
    "slide": "path or id of a slide (required)",
    "patient": "patient id; default: the slide itself",
    "label": "class of the patient",
    "time": "survival time",
    "event": "1 if the event happened at `time`, 0 if censored",
    "mpp": "µm per px of level 0",
    "split": "train, val or test",
    "fold": "number of the test fold",
    "site": "where the slide comes from",
    "regions": "file of drawn regions: QuPath GeoJSON, ASAP or ImageScope XML",
}


class CohortError(ValueError):
    """Something is wrong with the folder or CSV; the message names every row and column, and what to do."""


@dataclass(frozen=True)
class Row:
    """One labelled slide as the CSV gives it. number: line in the file as an editor counts it."""

    number: int
    slide: str
    patient: str
    label: str | None = None
    time: float | None = None
    event: int | None = None
    mpp: float | None = None
    split: str | None = None
    fold: int | None = None
    site: str | None = None
    regions: str | None = None


def row_of(number: int, cells: dict[str, str]) -> Row:
    def number_of(column: str, low: float) -> float | None:
        text = cells.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"column {column}: {text!r} is not a number") from None
        if not math.isfinite(value) or value < low:
            raise ValueError(f"column {column}: {text!r} must be a number of at least {low:g}")
        return value

    if not cells["slide"]:
        raise ValueError("column slide: it is empty")
    mpp = number_of("mpp", 0.0)
    if mpp == 0:
        raise ValueError("column mpp: it must be above 0")
    event = cells.get("event", "")
    if event not in ("", "0", "1"):
        raise ValueError(f"column event: {event!r} must be 0 or 1")
    fold = cells.get("fold", "")
    if fold and not fold.isdigit():
        raise ValueError(f"column fold: {fold!r} must be a whole number from 0")
    split = cells.get("split", "")
    if split not in ("", "train", "val", "test"):
        raise ValueError(f"column split: {split!r} must be train, val or test")
    time = number_of("time", 0.0)
    if (time is None) != (event == ""):
        raise ValueError("columns time and event: give both or none")
    return Row(
        number=number,
        slide=cells["slide"],
        patient=cells.get("patient") or cells["slide"],
        label=cells.get("label") or None,
        time=time,
        event=int(event) if event else None,
        mpp=mpp,
        split=split or None,
        fold=int(fold) if fold else None,
        site=cells.get("site") or None,
        regions=cells.get("regions") or None,
    )


def contradictions(rows: list[Row]) -> list[str]:
    """Slides named twice, and patients whose rows disagree."""
    wrong = []
    first_slide: dict[str, Row] = {}
    first_patient: dict[str, Row] = {}
    for row in rows:
        other = first_slide.setdefault(row.slide, row)
        if other is not row:
            wrong.append(f"row {row.number}, column slide: {row.slide!r} stands in row {other.number} already")
        patient = first_patient.setdefault(row.patient, row)
        for column in ("label", "time", "event", "split", "fold"):
            a, b = getattr(patient, column), getattr(row, column)
            if a != b:
                wrong.append(
                    f"row {row.number}, column {column}: patient {row.patient!r} has {b!r} here "
                    f"and {a!r} in row {patient.number}"
                )
    return wrong


def some(things: Iterable[object], most: int = 5) -> str:
    listed = [str(t) for t in things]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
