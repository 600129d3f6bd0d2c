"""What a report says of a patient: of one target, or of several beside each other.

In: the section of each target. Out: the table of patients and the captions of their slides, with the targets whose
cells are known; whom more targets are wrong about stands first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mhim.pipeline.pictures.kinds.kind import Kind
from mhim.pipeline.results.measures.measure import bag_of
from mhim.pipeline.results.metrics_file import Metrics

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """The pictures of a patient's slides. told: the caption."""

    slides: list[str]
    wrong: bool
    told: str


@dataclass(frozen=True)
class Section:
    """What a page says of one target, "" of a single one. rows: one per patient, mistakes first. found: its numbers;
    values: of its template."""

    target: str
    kind: Kind
    rows: list[Row]
    found: Metrics
    values: dict[str, Any]

    def shown(self, row: Row) -> Shown:
        """A patient's slides with what this target's model says of them."""
        return Shown(str(row["slide"]).split(";"), self.kind.measure.said(row).wrong, self.kind.caption(row))


def anchor(target: str) -> str:
    """The id of the target's heading, which is none of the page's own."""
    return f"target-{quote(target, safe='')}"


def _together(sections: Sequence[Section]) -> list[dict[str, tuple[Section, Row]]]:
    """A mapping target -> section and row per patient, whom most targets are wrong about first, then who is nearest to
    the head of a target's own rows: the mistakes of two targets are in two units."""
    of: dict[str, dict[str, tuple[Section, Row]]] = {}
    place: dict[str, float] = {}
    for one in sections:
        for k, row in enumerate(one.rows):
            of.setdefault(bag_of(row), {})[one.target] = one, row
            place[bag_of(row)] = min(place.get(bag_of(row), 1.0), k / len(one.rows))

    def worst(patient: str) -> tuple[int, float, str]:
        wrong = sum(one.shown(row).wrong for one, row in of[patient].values())
        return -wrong, place[patient], patient

    return [of[patient] for patient in sorted(of, key=worst)]


def patients(sections: Sequence[Section]) -> dict[str, Any]:
    """The table of patients: of each target the truth and what is said. mark: as in `kinds`."""
    body = []
    for found in _together(sections):
        _, first = next(iter(found.values()))
        cells = [(str(first["patient"]), ""), (str(first["slide"]), ""), (str(first["fold"]), "n")]
        for one in sections:
            if one.target not in found:
                cells += [("", ""), ("", "")]
                continue
            said = one.kind.measure.said(found[one.target][1])
            answer = said.decision or f"{said.value:.4g}"
            cells += [(said.truth, ""), (answer, "wrong" if said.wrong else "" if said.decision else "n")]
        body.append([{"text": text, "mark": mark} for text, mark in cells])
    columns = [column for one in sections for column in (one.target, f"{one.target}, said")]
    return {"patient_columns": ["patient", "slides", "fold", *columns], "patients": body}


def slides(sections: Sequence[Section]) -> list[Shown]:
    """The patients' slides with what every target's model says of them."""
    made = []
    for found in _together(sections):
        each = {target: one.shown(row) for target, (one, row) in found.items()}
        told = "; ".join(f"{target}: {shown.told}" for target, shown in each.items())
        first = next(iter(each.values()))
        made.append(Shown(first.slides, any(shown.wrong for shown in each.values()), told))
    return made
