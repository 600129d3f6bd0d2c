"""`pipeline check --table`: what patients' tables are worth before any training. Reads only; told in few lines.

In: the settings with their tables, perhaps a table of labels. Out: lines that need a person, lines to be known, and
`tables.csv`, one row per column. Leaks and units are guesses by stated limits (`columns_told.py`): a person decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mhim.configs.schema import Config
from mhim.pipeline.cohort import outcomes
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError, Row, counted, some
from mhim.pipeline.cohort.labels.table import Table
from mhim.pipeline.cohort.patient_tables import columns_told as told
from mhim.pipeline.cohort.patient_tables import join
from mhim.pipeline.cohort.patient_tables import table as patient_table
from mhim.pipeline.cohort.patient_tables.table import PatientTable
from mhim.pipeline.store import tables as csv_tables

FILE = "tables.csv"
COLUMNS = ("table", "column", "kind", "known", "missing_share", "min", "median", "max", "words", "problems")
_SHOWN = 12  # number columns of which each range is told
_MISSING = 0.2  # share of missing cells from which on a column is named


@dataclass
class Checked:
    """problems: need a person. notes: to be known. rows: of `tables.csv`."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[list[object]] = field(default_factory=list)

    def csv(self) -> str:
        return csv_tables.text_of(COLUMNS, self.rows)


def check(config: Config, labels: Path | None = None) -> Checked:
    """Every table of `train.tables`, and, with labels, beside the outcome and the sites. A table that cannot be read is
    one of the problems."""
    found = Checked()
    tables: dict[str, PatientTable] = {}
    for name, path in config.train.tables.items():
        try:
            tables[name] = patient_table.read(Path(path), name, config.tables)
        except CohortError as error:
            found.problems.append(f"table {name}: {error}")
    given = _labels(labels, config, found)
    known: dict[str, Row] = {}
    for row in given.rows if given else ():
        known.setdefault(row.patient, row)
    if given:
        for name, table in tables.items():
            try:
                join.without_outcomes({name: table}, given)
            except CohortError as error:
                found.problems.append(str(error))
    if known:
        for name in list(tables):
            try:
                _, lines = join.of_patients({name: tables[name]}, known)
                found.notes += lines[:-1]  # the last one is of all tables together
            except CohortError as error:
                found.problems.append(str(error))
                del tables[name]
        if tables:
            found.notes.append(f"patients by what they have: {join.patterns(sorted(known), (), tables)}, "
                               "slides not looked at")  # fmt: skip
    else:
        for table in tables.values():
            found.notes += table.notes
        if len(tables) > 1:
            everyone = sorted({p for t in tables.values() for p in t.patients})
            found.notes.append(f"patients by what they have: {join.patterns(everyone, (), tables)}")
    for table in tables.values():
        _look(table, known, found)
    return found


def _labels(path: Path | None, config: Config, found: Checked) -> Table | None:
    """The labels, whose patients may have tables alone; None without any, and where they cannot be read."""
    if path is None:
        return None
    try:
        return label_table.read_table(path, config.labels, may_lack_slide=True, bag=config.train.bag)
    except CohortError as error:
        found.problems.append(str(error))
        return None


def _look(table: PatientTable, known: Mapping[str, Row], found: Checked) -> None:
    rows = table.rows
    flat, lacking, ranges = told.constant(rows), told.missing(rows), told.ranges(rows)
    units = told.mixed_units(rows)
    leaks: dict[str, str] = {}
    sites: dict[str, str] = {}
    if known:
        of = [known.get(p) for p in table.patients]
        leaks = _leaks(table, of)
        sites = told.leaks_of_sites(rows, [r.site if r else None for r in of])
    name = f"table {table.name}"
    if leaks:
        found.problems.append(
            f"{name}: {_named(leaks)}: by itself it tells the outcome; is it known before it, or a copy? "
            f"Leave it out (--set 'tables.leave_out.{table.name}=[...]')"
        )
    if sites:
        found.notes.append(f"{name}: {_named(sites)}: tells the site, and with it whatever differs between sites")
    named = [c for c in told.outcomes_by_name(rows) if c not in leaks]
    if named:
        found.notes.append(
            f"{name}: {counted(len(named), 'column', 'is', 'are')} called like outcomes or folds: "
            f"{some(named)}; leave out unless "
            f"known when the slide is taken (--set 'tables.leave_out.{table.name}=[...]')"
        )
    found.notes += [f"{name}, column {c}: two units? {what}" for c, what in units.items()]
    if flat:
        found.notes.append(
            f"{name}: {counted(len(flat), 'column', 'has', 'have')} one value only, which tells nothing: "
            f"{some(sorted(flat))}"
        )
    pairs = told.copies(rows)
    if pairs:
        found.notes.append(
            f"{name}: {counted(len(pairs), 'column', 'repeats', 'repeat')} another: "
            f"{some([f'{b} is {a}' for a, b in pairs], 3)}"
        )
    much = sorted((c for c, share in lacking.items() if share >= _MISSING), key=lambda c: (-lacking[c], c))
    if much:
        shares = [f"{c} {lacking[c]:.0%}" for c in much]
        found.notes.append(
            f"{name}: {counted(len(much), 'column', 'lacks', 'lack')} {_MISSING:.0%} of the cells or more: "
            f"{some(shares)}"
        )
    empty = [p for p, there in zip(table.patients, rows.present, strict=True) if not there]
    if empty:
        found.notes.append(
            f"{name}: {counted(len(empty), 'patient', 'has', 'have')} a row without a known cell: {some(empty)}"
        )
    _told_words(name, table, found)
    if 0 < len(ranges) <= _SHOWN:
        each = [f"{c} {low:.4g} to {high:.4g}" for c, (low, _, high) in ranges.items()]
        found.notes.append(f"{name}: ranges: {some(each, _SHOWN)}")
    elif ranges:
        low, high = min(r[0] for r in ranges.values()), max(r[2] for r in ranges.values())
        found.notes.append(f"{name}: {len(ranges)} columns of numbers from {low:.4g} to {high:.4g}")
    reasons = {c: [] for c in (*rows.columns, *rows.factors)}  # type: dict[str, list[str]]
    for what, of_columns in (("tells the outcome", leaks), ("tells the site", sites), ("two units", units)):
        for column, why in of_columns.items():
            reasons[column].append(f"{what}: {why}")
    for column in flat:
        reasons[column].append("one value only")
    for column in rows.columns:
        least, middle, most = ranges.get(column, ("", "", ""))
        n = int(np.isfinite(table.numbers[column]).sum())
        found.rows.append([table.name, column, "number", n, round(lacking[column], 4), least, middle, most, "",
                           "; ".join(reasons[column])])  # fmt: skip
    for column, words in rows.factors.items():
        here = [w for w in words if w is not None]
        counts = " ".join(f"{w}={here.count(w)}" for w in sorted(set(here)))
        found.rows.append([table.name, column, "factor", len(here), round(lacking[column], 4), "", "", "", counts,
                           "; ".join(reasons[column])])  # fmt: skip
    found.rows += [[table.name, c, "left out", "", "", "", "", "", "", why] for c, why in table.left_out.items()]


def _told_words(name: str, table: PatientTable, found: Checked) -> None:
    """Factors of few columns with their words; words that few patients have."""
    rare = []
    for column, words in table.factors.items():
        counts = {w: words.count(w) for w in sorted({w for w in words if w is not None})}
        rare += [f"{column} = {w} ({n})" for w, n in counts.items() if n < told.FEW]
    if rare:
        found.notes.append(
            f"{name}: {counted(len(rare), 'word')} of factors of fewer than {told.FEW} patients: {some(rare)}"
        )


def _leaks(table: PatientTable, of: Sequence[Row | None]) -> dict[str, str]:
    """Columns that tell the outcome by themselves: survival, numbers (more than ten different ones), or classes."""
    rows = table.rows
    found: dict[str, str] = {}
    if any(r is not None and r.time is not None for r in of):
        found |= told.leaks_of_survival(
            rows, [(r.time, r.event or 0) if r is not None and r.time is not None else None for r in of]
        )
    there = [r for r in of if r is not None]
    columns = {"": [r.label if r else None for r in of]}
    for name, _ in there[0].targets if there else ():
        columns[f"{name}: "] = [dict(r.targets)[name] if r else None for r in of]
    for name, labels in columns.items():
        different = {v for v in labels if v is not None}
        values = [None if v is None else outcomes.number(v, there[0].separator) for v in labels]
        made: dict[str, str] = {}
        if len(different) > 10 and sum(v is not None for v in values) == sum(v is not None for v in labels):
            made = told.leaks_of_numbers(rows, values)
        elif len(different) > 1:
            made = told.leaks_of_classes(rows, labels)
        found |= {c: name + why for c, why in made.items() if not name or c not in found}
    return found


def _named(columns: Mapping[str, str]) -> str:
    listed = [f"{c} ({why})" for c, why in columns.items()]
    return f"column{'s' * (len(listed) != 1)} {some(listed, 3)}"
