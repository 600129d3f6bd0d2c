"""A labels table or manifest, from its file to its rows: which column is which, what is missing, what is told.

In: a file as `label_cells` reads it. Out: a `Table` of rows with notes, or one error that lists every wrong row with
its column. Columns that mean nothing here are left alone, and said. Knows no slides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mhim.configs.schema import LabelsConfig
from mhim.pipeline.cohort import published, tcga
from mhim.pipeline.cohort.labels import cells as label_cells
from mhim.pipeline.cohort.labels.cells import Sheet
from mhim.pipeline.cohort.labels.rows import (
    COLUMNS,
    OWN_LABELS,
    TARGET,
    CohortError,
    Row,
    contradictions,
    look_alikes,
    row_of,
    same,
    some,
)

# Other programs' names of a column (CLAM: case_id, slide_id; TRIDENT: wsi), taken where ours is not there.
ALIASES = {"slide": ("slide_id", "wsi", "filename"), "patient": ("patient_id", "case_id")}
NAMED = ("slide", "patient", "label", "time", "event")  # those that a setting may name


@dataclass(frozen=True)
class Table:
    """Rows of a table, what was guessed or left alone, and `columns`: our name -> the file's own."""

    path: Path
    rows: list[Row]
    columns: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_outcome(self) -> bool:
        """Whether it tells a label or a survival time: labels, not only a list of slides."""
        return "label" in self.columns or "time" in self.columns or any(c.startswith(TARGET) for c in self.columns)

    def settings(self, given: LabelsConfig) -> LabelsConfig:
        """`given` with the columns that were found, so that a record of it reads the same columns again."""
        found = {f"{ours}_column": self.columns.get(ours, "") for ours in NAMED}
        return given.model_copy(update={k: v for k, v in found.items() if v})


def read_rows(path: Path, settings: LabelsConfig | None = None, bag: str = "patient") -> list[Row]:
    """The rows of `read_table` alone."""
    return read_table(path, settings, bag=bag).rows


def read_table(
    path: Path,
    settings: LabelsConfig | None = None,
    may_lack_slide: bool = False,
    targets: Sequence[str] = (),
    bag: str = "patient",
) -> Table:
    """A manifest or labels table. may_lack_slide: rows of patients without a slide are allowed. targets: of a run with
    several, whose columns are those that `labels.label_column` names, or all of them that the table has. bag:
    `train.bag`; with `slide` the slides of a patient may have labels of their own.

    Raises CohortError naming every wrong row and column (at most 20)."""
    settings = settings or LabelsConfig()
    named = {ours: str(getattr(settings, f"{ours}_column")) for ours in NAMED if getattr(settings, f"{ours}_column")}
    names = (
        *named.values(),
        *targets,
        *_several(named.get("label", "")),
        *COLUMNS,
        *(a for of in ALIASES.values() for a in of),
    )
    looked_for = {plain(h) for h in (*names, "WSI")}
    dialect = label_cells.Dialect.of_labels(settings)
    sheet = label_cells.read(path, dialect, lambda header: bool(looked_for & {plain(h) for h in header}))
    found = published.translate(sheet, path.name) if not named else label_cells.trimmed(sheet)
    header = found.lines[0][1]
    at = _columns(header, named, path, targets, found.notes)
    rows, notes = _rows(found, at, settings, path, may_lack_slide, bag)
    if not rows:
        raise CohortError(f"{path} has no rows")
    columns = {ours: header[i] for ours, i in at.items()}
    notes = [*found.notes, *_of_columns(header, at, path), *notes]
    return Table(path, rows, columns, tuple(h for h in header if h), tuple(notes))


def plain(name: str) -> str:
    """A column's name as it is compared: small letters, blanks and hyphens as underscores."""
    return re.sub(r"[\s\-]+", "_", same(name).strip().casefold())


def _several(named: str) -> list[str]:
    """The columns of `labels.label_column`, if it may name more than one."""
    return [part.strip() for part in named.split(",")] if "," in named else []


def _columns(
    header: Sequence[str], named: Mapping[str, str], path: Path, targets: Sequence[str], notes: Sequence[str]
) -> dict[str, int]:
    """Our columns -> their places in the header. notes: how the file was read, such as which of its sheets. Raises
    CohortError for what is missing, named twice or doubtful."""
    read = f" ({'; '.join(notes)})" if notes else ""
    has = f"{path} has the columns {', '.join(h or '(no name)' for h in header)}{read}"
    at: dict[str, int] = {}

    def places(*names: str) -> list[int]:
        exact = [i for i, h in enumerate(header) if h in names]
        return (
            exact
            if len(exact) == 1 and len(names) == 1
            else [i for i, h in enumerate(header) if plain(h) in {plain(n) for n in names}]
        )

    def only(ours: str, hits: list[int], cure: str) -> None:
        if len(hits) > 1:
            which = " and ".join(f"{header[i]!r} (number {i + 1})" for i in hits)
            raise CohortError(f"{path}: {len(hits)} columns may be `{ours}`: {which}; {cure}")
        if hits:
            at[ours] = hits[0]

    label = named.get("label", "")
    several = [] if places(label) else _several(label)
    if targets and not several:
        several = [label] if label else [t for t in targets if places(t)]
    for ours, name in [*named.items(), *((TARGET + name, name) for name in several)]:
        if ours == "label" and several:
            continue
        hits = places(name)
        if not hits:
            raise CohortError(
                f"there is no column {name!r} (--{'label' if ours.startswith(TARGET) else ours}-column): {has}"
            )
        only(ours, hits, "rename one")
    if len({i for ours, i in at.items() if ours.startswith(TARGET)}) < len(several):
        raise CohortError(f"--label-column {label or ','.join(several)}: a column is named twice")
    for ours in COLUMNS:
        if ours == "label" and several:
            continue
        if ours in at or (ours in ("time", "event") and "label" in named and not {"time", "event"} & named.keys()):
            continue  # who names the label's column means classes, whatever else the table holds
        own = [i for i in places(ours) if i not in at.values()]
        exact = [i for i in own if header[i] == ours]
        cure = f"name it with --{ours}-column" if ours in NAMED and len(exact) < 2 else "rename one"
        only(ours, own, cure)
        if ours not in at and ours in ALIASES:
            free = [i for i in places(*ALIASES[ours]) if i not in at.values()]
            only(ours, free, f"name it with --{ours}-column")
    if "slide" not in at:
        raise CohortError(
            f"no column `slide` tells the slides: {has}; say which with --slide-column NAME. Columns: "
            + ", ".join(f"{k} ({v})" for k, v in COLUMNS.items())
        )
    if ("time" in at) != ("event" in at):
        lone = "time" if "time" in at else "event"
        if lone in named or "label" not in at:
            raise CohortError(
                f"{path}: `time` and `event` belong together; one of the two columns is missing: {has}; "
                "say which with --time-column and --event-column"
            )
        del at[lone]
    return at


def _of_columns(header: Sequence[str], at: Mapping[str, int], path: Path) -> list[str]:
    """What is to be known of a table's columns: those under another name, and those that mean nothing here."""
    other = [f"{header[i]} as `{ours}`" for ours, i in at.items() if header[i] != ours and not ours.startswith(TARGET)]
    unused = [h for i, h in enumerate(header) if h and i not in at.values()]
    notes = [f"{path.name}: column {some(other, 9)}"] if other else []
    return notes + ([f"{path.name}: {len(unused)} columns are not used: {some(unused, 8)}"] if unused else [])


def _rows(
    sheet: Sheet, at: Mapping[str, int], settings: LabelsConfig, path: Path, may_lack_slide: bool, bag: str
) -> tuple[list[Row], list[str]]:
    header = sheet.lines[0][1]
    own = {ours: header[i] for ours, i in at.items()}
    missing = {m.casefold() for m in settings.missing}
    gone: dict[str, Counter[str]] = {}
    words: dict[str, int] = {}
    rows: list[Row] = []
    wrong: list[str] = []
    commas = grouped = 0
    for number, line in sheet.lines[1:]:
        if len(line) != len(header):
            wrong.append(f"row {number}: it has not as many fields as the header ({len(line)}, not {len(header)})")
            continue
        cells = {ours: line[i] if ours in ("slide", "regions") else same(line[i]) for ours, i in at.items()}
        for ours, text in cells.items():
            if text and text.casefold() in missing:
                gone.setdefault(ours, Counter())[text] += 1
                cells[ours] = ""
        if not any(cells.values()):
            continue
        slide = cells["slide"]
        by_code = tcga.patient(same(slide)) if settings.tcga_patients and tcga.is_slide(slide) else None
        grouped += bool(by_code and not cells.get("patient"))
        whose = by_code or same(slide)
        try:
            row = row_of(number, cells, whose, sheet.separator, settings.event_words, may_lack_slide, own)
        except ValueError as error:
            wrong.append(f"row {number}, {error}")
            continue
        commas += any("," in cells.get(k, "") for k in ("mpp", "time"))
        if row.event is not None and not re.fullmatch(r"[01](\.0*)?", cells["event"]):
            words.setdefault(cells["event"], row.event)
        rows.append(row)
    contrary = contradictions(rows, own, bag)
    if contrary and grouped:
        contrary.append(
            "patients are those of the TCGA barcodes: --no-tcga-patients makes each slide a patient, and "
            "slides of one patient may then stand on both sides of a fold"
        )
    wrong += contrary
    if wrong:
        way_out = [OWN_LABELS] if OWN_LABELS in wrong else []
        wrong = [line for line in wrong if line != OWN_LABELS]
        more = [f"... and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise CohortError(f"{path}:\n  " + "\n  ".join([*wrong[:20], *more, *way_out]))
    return rows, _notes(path, rows, own, gone, words, commas, grouped)


def _notes(
    path: Path,
    rows: Sequence[Row],
    own: Mapping[str, str],
    gone: Mapping[str, Counter[str]],
    words: Mapping[str, int],
    commas: int,
    grouped: int,
) -> list[str]:
    """What was taken for what, before any work. own: our column -> the file's."""
    notes = [
        f"{path.name}: {sum(said.values())} cells of `{own[ours]}` are missing values "
        f"({', '.join(f'{n} {text}' for text, n in said.most_common())}; --set labels.missing=[...] changes it)"
        for ours, said in gone.items()
    ]
    if words:
        said = ", ".join(f"{word!r} is {value}" for word, value in sorted(words.items()))
        notes.append(f"{path.name}: `{own['event']}` {said}")
    if commas:
        notes.append(f"{path.name}: {commas} rows have numbers with a decimal comma")
    if grouped:
        patients = {r.patient for r in rows if tcga.patient(r.slide) == r.patient}
        notes.append(
            f"{path.name}: no column tells the patient: {grouped} slides are of {len(patients)} patients by "
            "their TCGA barcodes (--no-tcga-patients: each slide by itself)"
        )
    told = {ours: [getattr(r, ours) for r in rows] for ours in ("label", "patient", "site") if ours in own}
    told |= {
        ours: [dict(r.targets)[ours.removeprefix(TARGET)] for r in rows] for ours in own if ours.startswith(TARGET)
    }
    for ours, values in told.items():
        counts = Counter(v for v in values if v is not None)
        alike = look_alikes(counts)
        if alike:
            pairs = [f"{a!r} ({counts[a]}) and {b!r} ({counts[b]})" for a, b in alike]
            what = {"patient": "patients", "site": "sites"}.get(ours, "classes")
            said = f"are taken as two {what}"
            if what == "classes" and all(_one_number(a, b) for a, b in alike):
                said = "are two classes, unless the column is of numbers"
            notes.append(f"{path.name}: `{own[ours]}` holds {some(pairs, 3)}, which look like one and {said}")
    return notes


def _one_number(one: str, two: str) -> bool:
    try:
        return float(one.replace(",", ".")) == float(two.replace(",", "."))
    except ValueError:
        return False
