"""A patients' table, from its file to rows of patients: which columns are numbers, which are factors, what is told.

In: a file and the settings. Out: a `PatientTable`, or one error that lists every wrong row with its column.

A column is of numbers if every cell that is not missing is one. It is a factor if at least half are none. If fewer are
none, that is a mistake of the table, and refused with row and column, unless `tables.factors` says otherwise. A column
of text with very many texts (names, ids, free text) is left out and told. Two rows of one patient are one if they are
equal, and refused if not. Knows no label, no slide and no fold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

import numpy as np

from mhim.configs.schema import TablesConfig
from mhim.mil.fusion.rows import Rows
from mhim.pipeline.cohort.labels import cells as label_cells
from mhim.pipeline.cohort.labels.rows import CohortError, counted, look_alikes, same, some
from mhim.pipeline.cohort.labels.table import ALIASES, plain
from mhim.pipeline.cohort.patient_tables import cells as table_cells
from mhim.pipeline.cohort.patient_tables import groups as table_groups
from mhim.pipeline.cohort.patient_tables.cells import Cells, listed

_DATE = re.compile(
    r"\d{1,2}-(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)|(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)-\d{1,2}"
    r"|\d{4}-\d{2}-\d{2}( 00:00:00|t00:00:00)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kinds:
    """Which columns were taken, as what, and which cells were missing: so that a later table is read as the one that a
    model was trained on. missing: the words for it, None where that is not recorded."""

    numbers: tuple[str, ...]
    factors: tuple[str, ...]
    missing: tuple[str, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class PatientTable:
    """One table. rows: of all its patients, or of those of `of`. sha256: of the file, unpacked.
    left_out: column -> why."""

    name: str
    path: Path
    rows: Rows
    sha256: str
    patient_column: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] | None = None

    @property
    def patients(self) -> tuple[str, ...]:
        return self.rows.patients

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """Column -> float64 (patients,), NaN where not known."""
        return dict(zip(self.rows.columns, self.rows.values.T, strict=True))

    @property
    def factors(self) -> Mapping[str, tuple[str | None, ...]]:
        return self.rows.factors

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        return self.rows.groups

    @property
    def kinds(self) -> Kinds:
        return Kinds(tuple(sorted(self.rows.columns)), tuple(sorted(self.rows.factors)), self.missing)

    def of(self, patients: Iterable[str]) -> PatientTable:
        """The table of those of `patients` that it has, in their order."""
        here = set(self.patients)
        return replace(self, rows=self.rows.of([p for p in patients if p in here]))

    def fingerprint(self, patients: Iterable[str]) -> str:
        """Hash of the rows of `patients`, the kinds of the columns and the groups: 16 hex digits. Neither the order of
        rows and columns nor how the file is written changes it."""
        mine = set(self.patients)
        rows = self.rows.of(sorted({p for p in patients if p in mine}))
        order = np.argsort(np.array(rows.columns)) if rows.columns else np.zeros(0, dtype=np.int64)
        values = np.ascontiguousarray(rows.values[:, order] + 0.0, dtype="<f8")  # -0 is 0
        values[np.isnan(values)] = np.nan
        kinds = self.kinds
        words = {name: rows.factors[name] for name in kinds.factors}
        members = {name: sorted(of) for name, of in sorted(rows.groups.items())}
        plain = json.dumps([rows.patients, kinds.numbers, words, members])
        return hashlib.sha256(plain.encode() + b"\0" + values.tobytes()).hexdigest()[:16]


def read(path: Path, name: str, settings: TablesConfig | None = None, kinds: Kinds | None = None) -> PatientTable:
    """The table `name` of the file `path`. kinds: the columns of a model that it will be given to, and what they are
    there; others are not looked at, and groups are the model's own.

    Raises CohortError naming every wrong row and column (at most 20)."""
    settings = settings or TablesConfig()
    if kinds is not None and kinds.missing is not None:  # a file's own words may be added to the model's
        more = settings.missing if "missing" in settings.model_fields_set else ()
        settings = settings.model_copy(update={"missing": tuple(dict.fromkeys((*kinds.missing, *more)))})
    raw = label_cells.content(path)
    named = settings.patient_column.get(name, "")
    wanted = {plain(n) for n in ((named,) if named else ("patient", *ALIASES["patient"]))}
    found = table_cells.read(path, raw, name, settings, lambda header: any(plain(h) in wanted for h in header))
    at, notes = _patient_column(found.header, named, wanted, path, name)
    taken, left_out = _taken(found.header, at, name, settings, kinds, path)
    _no_infinite(found, taken, path)
    numbers, factors, why = _told_apart(found, taken, name, settings, kinds, path)
    left_out |= why
    texts = found.texts([at, *factors])
    patients = [same(p) for p in texts[at]]
    words: dict[int, list[str | None]] = {i: [t or None for t in texts[i]] for i in factors}
    if kinds is None:
        many = _too_many(found.header, words, name, settings)
        left_out |= {found.header[i]: reason for i, reason in many.items()}
        words = {i: of for i, of in words.items() if i not in many}
    kept, twice = _each_once(found, patients, numbers, words, path)
    rows = Rows(
        tuple(patients[k] for k in kept),
        tuple(found.header[i] for i in numbers),
        found.values[np.ix_(kept, numbers)],
        {found.header[i]: tuple(of[k] for k in kept) for i, of in words.items()},
    )
    if kinds is None and not rows.columns and not rows.factors:
        raise CohortError(
            f"{path} has no column to use besides the patients: {_reasons(left_out) or 'it has no other'}"
        )
    groups, of_groups = ({}, []) if kinds else table_groups.read(name, rows.columns, settings, path)
    notes = [*found.notes, *notes, *twice, *_notes(path, rows, left_out, found), *of_groups]
    table = replace(rows, groups=groups)
    digest = hashlib.sha256(raw).hexdigest()
    return PatientTable(name, path, table, digest, found.header[at], left_out, tuple(notes), settings.missing)


def _patient_column(
    header: Sequence[str], named: str, wanted: set[str], path: Path, name: str
) -> tuple[int, list[str]]:
    """The place of the column with the patients, and what is to be told of it. Raises CohortError."""
    cure = f"--set tables.patient_column.{name}=NAME"
    hits = [i for i, h in enumerate(header) if named and h == named] or [
        i for i, h in enumerate(header) if plain(h) in wanted
    ]
    if len(hits) > 1:
        which = " and ".join(f"{header[i]!r} (number {i + 1})" for i in hits)
        raise CohortError(f"{path}: {len(hits)} columns may be the patients: {which}; say which with {cure}")
    if hits:
        return hits[0], []
    has = f"{path} has the columns {some([h or '(no name)' for h in header], 8)}"
    if named:
        raise CohortError(f"there is no column {named!r} (tables.patient_column.{name}): {has}")
    if header and (not header[0] or header[0].casefold() == "unnamed: 0"):
        return 0, [f"{path.name}: its first column has no name and is taken for the patients; if not, {cure}"]
    if header and not header[-1]:  # an index that parquet keeps behind the columns
        return len(header) - 1, [f"{path.name}: its index has no name and is taken for the patients; if not, {cure}"]
    turned = ""
    if len({len(h) for h in header[1:]}) == 1 and len(header) > 3 and len(header[1]) > 5:
        turned = "; if patients stand in its columns, turn it round so that each has a row"
    raise CohortError(f"no column tells the patients: {has}; say which with {cure}{turned}")


def _taken(
    header: Sequence[str], at: int, name: str, settings: TablesConfig, kinds: Kinds | None, path: Path
) -> tuple[list[int], dict[str, str]]:
    """Places of the columns to use, and why others are not. Raises CohortError for a name that stands twice, or one in
    the settings that no column has."""
    others = [i for i, h in enumerate(header) if i != at and h]
    if kinds is not None:
        wanted = {*kinds.numbers, *kinds.factors}
        others = [i for i in others if header[i] in wanted]
    patterns = {of: getattr(settings, of).get(name, ()) for of in ("columns", "leave_out", "factors", "numbers")}
    if kinds is None:
        for of, names in patterns.items():
            lost = [n for n in names if not any(fnmatchcase(header[i], n) for i in others)]
            if lost:
                raise CohortError(f"tables.{of}.{name}: {path} has no column {some(map(repr, lost))}")
    left: dict[str, str] = {}
    taken = []
    for i in others:
        chosen = not patterns["columns"] or any(fnmatchcase(header[i], n) for n in patterns["columns"])
        if kinds is None and (not chosen or any(fnmatchcase(header[i], n) for n in patterns["leave_out"])):
            left[header[i]] = "by the settings"
        else:
            taken.append(i)
    first: dict[str, int] = {}
    twice = sorted({header[i] for i in taken if first.setdefault(header[i], i) != i})
    if twice:
        which = [f"{n!r} (numbers {', '.join(str(i + 1) for i in taken if header[i] == n)})" for n in twice[:5]]
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise CohortError(
            f"{path}: {counted(len(twice), 'column name', 'stands', 'stand')} more than once: {', '.join(which)}{more}"
            "; keep one of each, such as their mean"
        )
    return taken, left


def _no_infinite(found: Cells, taken: Sequence[int], path: Path) -> None:
    wrong = [
        f"row {row}, column {found.header[i]}: {text!r} is infinite; leave the cell empty, or write the value"
        for i in taken
        for row, text in found.columns[i].infinite
    ]
    if wrong:
        raise CohortError(listed(path, sorted(wrong, key=_row)))


def _told_apart(
    found: Cells, taken: Sequence[int], name: str, settings: TablesConfig, kinds: Kinds | None, path: Path
) -> tuple[list[int], list[int], dict[str, str]]:
    """Places of numbers and of factors, and which columns are neither. Raises CohortError for text among numbers."""
    numbers: list[int] = []
    factors: list[int] = []
    left: dict[str, str] = {}
    wrong: list[str] = []
    as_number = set(kinds.numbers) if kinds else set()
    as_factor = set(kinds.factors) if kinds else set()
    for i in taken:
        column, called = found.columns[i], found.header[i]
        must = called in as_number or any(fnmatchcase(called, n) for n in settings.numbers.get(name, ()))
        if called in as_factor or (not kinds and any(fnmatchcase(called, n) for n in settings.factors.get(name, ()))):
            factors.append(i)
        elif not column.known and not kinds:
            left[called] = "no cell is filled"
        elif not column.strange:
            numbers.append(i)
        elif column.doubtful == column.strange:
            wrong += [
                f"row {row}, column {called}: is the comma of {text!r} a decimal or a thousands one? Write a point"
                for row, text in column.wrong
            ]
        elif must or 2 * column.strange < column.known:
            wrong += [
                f"row {row}, column {called}: {text!r} is not a number, as {column.known - column.strange} of its "
                f"{column.known} cells are"
                for row, text in column.wrong
            ]
        else:
            factors.append(i)
    if wrong:
        cure = (
            "mend the cells, or say that a word means missing (--set 'tables.missing=[...]'), or that the column "
            f"holds names of groups (--set 'tables.factors.{name}=[...]')"
        )
        raise CohortError(f"{listed(path, sorted(wrong, key=_row))}\n  {cure}")
    return numbers, factors, left


def _row(text: str) -> int:
    return int(re.match(r"row (\d+)", text)[1])  # type: ignore[index]


def _too_many(
    header: Sequence[str], words: Mapping[int, Sequence[str | None]], name: str, settings: TablesConfig
) -> dict[int, str]:
    """Columns of text that are no factors: too many texts. place -> why."""
    made = {}
    for i, of in words.items():
        different = {w for w in of if w is not None}
        named = any(fnmatchcase(header[i], n) for n in settings.factors.get(name, ()))
        if len(different) > settings.most_levels and not named:
            dates = sum(bool(re.fullmatch(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}.*", w)) for w in different)
            what = "dates; give years or days instead" if 2 * dates > len(different) else "names or free text"
            made[i] = f"{len(different)} different texts: {what}"
    return made


def _each_once(
    found: Cells, patients: Sequence[str], numbers: Sequence[int], words: Mapping[int, Sequence[str | None]], path: Path
) -> tuple[list[int], list[str]]:
    """Rows to keep, one per patient in their order in the file, and what is told. Raises CohortError for a row without
    patient, and for rows of one patient that differ."""
    wrong = [f"row {found.rows[k]}: no patient is named" for k, p in enumerate(patients) if not p]
    first: dict[str, int] = {}
    kept, again = [], []
    for k, patient in enumerate(patients):
        other = first.setdefault(patient, k)
        if not patient:
            continue
        if other == k:
            kept.append(k)
            continue
        a, b = found.values[k, numbers], found.values[other, numbers]
        differ = [found.header[numbers[j]] for j in np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b)))).tolist()]
        differ += [found.header[i] for i, of in words.items() if of[k] != of[other]]
        if differ:
            wrong.append(
                f"row {found.rows[k]}: patient {patient!r} stands in row {found.rows[other]} already with other values "
                f"of {some(differ, 3)}; keep one row, or their mean"
            )
        else:
            again.append(patient)
    if wrong:
        raise CohortError(listed(path, wrong))
    if not kept:
        raise CohortError(f"{path} has no rows")
    twice = (
        f"{path.name}: {counted(len(again), 'row', 'says', 'say')} again what another row of their patient says: "
        f"{some(sorted(set(again)))}"
    )
    return kept, [twice] if again else []


def _notes(path: Path, rows: Rows, left_out: Mapping[str, str], found: Cells) -> list[str]:
    """What was taken for what, before any work."""
    count = ", ".join(
        (
            counted(len(rows.patients), "patient"),
            f"{counted(len(rows.columns), 'column')} of numbers",
            counted(len(rows.factors), "factor"),
        )
    )
    notes = [f"{path.name}: {count}" + (f" ({some(sorted(rows.factors))})" if rows.factors else "")]
    if left_out:
        notes.append(f"{path.name}: {counted(len(left_out), 'column', 'is', 'are')} not used: {_reasons(left_out)}")
    dates = [n for n in (*rows.columns, *rows.factors) if _DATE.fullmatch(n)]
    if dates:
        notes.append(
            f"{path.name}: {counted(len(dates), 'column', 'is', 'are')} called like dates ({some(dates, 3)}): "
            "gene symbols such as SEPT1 and MARCH1 that a spreadsheet has changed? Their genes are not found in groups"
        )
    spoilt = [p for p in rows.patients if _DATE.fullmatch(p)]
    if spoilt:
        notes.append(
            f"{path.name}: {counted(len(spoilt), 'patient', 'is', 'are')} called like dates ({some(spoilt, 3)}): ids "
            "that a spreadsheet has changed?"
        )
    alike = look_alikes(rows.patients)
    if alike:
        pairs = [f"{a!r} and {b!r}" for a, b in alike]
        notes.append(f"{path.name}: patients {some(pairs, 3)} look like one and are taken as two")
    for column, words in rows.factors.items():
        pairs = [f"{a!r} and {b!r}" for a, b in look_alikes({w for w in words if w is not None})]
        if pairs:
            notes.append(f"{path.name}: `{column}` holds {some(pairs, 3)}, which look like one and are taken as two")
    return notes


def _reasons(left_out: Mapping[str, str]) -> str:
    """Why columns are left out, each reason once with the first columns."""
    by: dict[str, list[str]] = {}
    for column, why in left_out.items():
        by.setdefault(why, []).append(column)
    return "; ".join(f"{some(columns, 4)} ({why})" for why, columns in by.items())
