"""Which row is whose: rows of a labels table matched with the slides, or features, that are there; where the table is.

In: rows and slide ids. Out: pairs, and what is left over on both sides. Exact: never by a part of a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline import store
from pipeline.cohort import read_cohort
from pipeline.label_rows import CohortError, Row, some


@dataclass(frozen=True)
class Matched:
    """Rows with their slide ids, slides that no row names, and rows whose slide is not there."""

    rows: list[tuple[Row, str]]
    without_row: list[str]
    without_slide: list[Row]


def match(rows: Iterable[Row], slide_ids: Iterable[str]) -> Matched:
    """Match rows to slides exactly: by id, id without suffix, file name, or file name without suffix, never by a part.

    Raises CohortError when a name fits several slides or two rows fit one slide."""
    ids = list(slide_ids)
    forms: list[dict[str, list[str]]] = []
    for form in (str, _stem, lambda i: Path(i).name, lambda i: Path(i).stem):
        table: dict[str, list[str]] = {}
        for i in ids:
            table.setdefault(form(i), []).append(i)
        forms.append(table)
    known = set(ids)
    matched: list[tuple[Row, str]] = []
    lost: list[Row] = []
    taken: dict[str, Row] = {}
    for row in rows:
        hits = next((t[row.slide] for t in forms if row.slide in t), [])
        if not hits and (Path(row.slide).is_absolute() or row.slide.startswith(("./", "../"))):
            hits = forms[2].get(Path(row.slide).name, [])
        elif not hits and "/" in row.slide:
            # a path as seen from the CSV's folder: its tail may be the id
            parts = Path(row.slide).parts
            hits = next(([t] for k in range(1, len(parts)) if (t := "/".join(parts[k:])) in known), [])
        if len(hits) > 1:
            raise CohortError(f"row {row.number}, column slide: {row.slide!r} fits {some(hits)}; write the whole id")
        if not hits:
            lost.append(row)
            continue
        if hits[0] in taken:
            raise CohortError(
                f"row {row.number}, column slide: {row.slide!r} is the slide of row {taken[hits[0]].number} "
                f"already ({hits[0]})"
            )
        taken[hits[0]] = row
        matched.append((row, hits[0]))
    return Matched(matched, [i for i in ids if i not in taken], lost)


def _stem(slide_id: str) -> str:
    return Path(slide_id).with_suffix("").as_posix()


def find_labels(given: Path | None, work: store.Work) -> Path:
    """The labels CSV: as given, or labels.csv beside the slides or in the work folder. Raises CohortError."""
    if given is not None:
        return given
    places = [work.root]
    if work.cohort.exists():
        roots = {s.root for s in read_cohort(work)}
        places += sorted(roots) + sorted({r.parent for r in roots})
    for place in places:
        if (place / "labels.csv").is_file():
            return place / "labels.csv"
    looked = ", ".join(str(p) for p in places)
    raise CohortError(
        f"no labels.csv in {looked}; give one with --labels (columns slide, patient, label or time and event)"
    )


