"""A patients' table as numbers where cells are numbers and as texts where they are not, whatever the file is.

In: a file. Out: `Cells`: per column numbers (float64, NaN where a cell is missing) and what is no number, row by row.
Thousands of columns of a text table are read without keeping their texts: those are read again where they are needed.
Knows no patient. Dialects, encodings and Excel are read by the rules of the labels (`labels/cells.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mhim.configs.schema import TablesConfig
from mhim.pipeline.cohort.labels import cells as label_cells
from mhim.pipeline.cohort.labels.cells import Dialect, Line
from mhim.pipeline.cohort.labels.rows import CohortError, DoubtfulComma, plain_number, same

_NO_NUMBER = 5  # wrong cells kept per column, for messages
_KEPT = 200  # columns whose texts are kept in the first pass


@dataclass
class Column:
    """What the cells of one column are. known: cells that are not missing; strange: of these, how many are no number;
    doubtful: of these, how many are none only because their comma may mean two things; wrong, infinite: (row, text) of
    the first of each."""

    known: int = 0
    strange: int = 0
    doubtful: int = 0
    wrong: list[tuple[int, str]] = field(default_factory=list)
    infinite: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Cells:
    """header: names as they stand. rows: number of each row in the file. values: float64 (rows, columns), NaN for what
    is missing or no number. columns: one per name. separator: of a text table. texts: reads the texts of some columns,
    by their places; a missing cell is empty."""

    header: list[str]
    rows: list[int]
    values: np.ndarray
    columns: list[Column]
    separator: str
    notes: tuple[str, ...]
    texts: Callable[[Sequence[int]], dict[int, list[str]]]


def read(path: Path, raw: bytes, name: str, settings: TablesConfig, known: label_cells.Known) -> Cells:
    """The cells of the table called `name`. raw: its content. known: whether a header has the patient's column.

    Raises CohortError."""
    dialect = Dialect.of_table(settings, name)
    missing = frozenset(m.casefold() for m in settings.missing)
    if raw.startswith(b"PAR1"):
        return _of_parquet(path, missing)
    try:
        lines, separator, notes = label_cells.stream(path, raw, dialect, known)
    except label_cells.NotText:
        sheet = label_cells.trimmed(label_cells.read(path, dialect, known))
        return _of_lines(lambda: iter(sheet.lines), "", sheet.notes, missing, known, path)
    first = [lines]  # the rows that are already opened, then the same once more if texts are asked for

    def again() -> Iterator[Line]:
        return first.pop() if first else label_cells.stream(path, raw, dialect, known)[0]

    return _of_lines(again, separator, notes, missing, known, path)


def _of_lines(
    lines: Callable[[], Iterator[Line]],
    separator: str,
    notes: tuple[str, ...],
    missing: frozenset[str],
    known: label_cells.Known,
    path: Path,
) -> Cells:
    """Numbers in a first pass, which keeps the texts of columns that begin with none; a second one reads those of
    others that are asked for."""
    header, taken = _begun(lines(), known)
    columns = [Column() for _ in header]
    numbers: list[int] = []
    values: list[np.ndarray] = []
    reader = _Numbers(columns, separator, missing)
    uneven: list[str] = []
    kept: dict[int, list[str]] = {}

    def keep(into: dict[int, list[str]], cells: Sequence[str]) -> None:
        for i, of in into.items():
            text = same(cells[i].strip())
            of.append("" if text.casefold() in missing else text)

    for number, cells in taken:
        if len(cells) != len(header):
            uneven.append(f"row {number}: it has not as many fields as the header ({len(cells)}, not {len(header)})")
            continue
        numbers.append(number)
        values.append(reader.of(number, cells))
        if len(values) == 1:
            kept = {i: [] for i in sorted(reader.odd)[:_KEPT]}
        keep(kept, cells)
    if uneven:
        raise CohortError(listed(path, uneven))
    reader.counted()
    if reader.commas:
        notes = (*notes, f"{path.name}: {reader.commas} cells are numbers with a decimal comma")

    def texts(places: Sequence[int]) -> dict[int, list[str]]:
        more: dict[int, list[str]] = {i: [] for i in places if i not in kept}
        if more:
            for _, cells in _begun(lines(), known)[1]:
                keep(more, cells)
        return {i: kept[i] if i in kept else more[i] for i in places}

    block = np.stack(values) if values else np.empty((0, len(header)))
    return Cells(header, numbers, block, columns, separator, notes, texts)


def _begun(lines: Iterator[Line], known: label_cells.Known) -> tuple[list[str], Iterable[Line]]:
    """The header, and the rows, as wide as it where blank cells at the right, as spreadsheets write them, are all that
    they differ by. R writes no name above the names of its rows: the header gets an empty one."""
    header = [same(h.strip()) for h in next(lines)[1]]
    first = next(lines, None)
    if first is None:
        return header, ()
    if len(first[1]) == len(header) + 1 and all(header) and (first[1][-1].strip() or not known(header)):
        header = ["", *header]
    width = max((i for i, h in enumerate(header, 1) if h), default=len(header))

    def even(cells: list[str]) -> list[str]:
        if len(cells) == len(header) or len(cells) < width or any(map(str.strip, cells[width:])):
            return cells
        return cells[:width] + [""] * (len(header) - width)

    return header, ((number, even(cells)) for number, cells in itertools.chain([first], lines))


class _Numbers:
    """Rows as numbers, one after the other; what their cells are is counted in `columns`."""

    def __init__(self, columns: Sequence[Column], separator: str, missing: frozenset[str]) -> None:
        self.columns, self.separator, self.missing = columns, separator, missing
        self.plain = np.zeros(len(columns), dtype=np.int64)  # cells that were numbers at first sight
        self.odd: set[int] = set()  # columns that had another cell before
        self.commas = 0  # cells with a decimal comma

    def of(self, number: int, cells: list[str]) -> np.ndarray:
        """One row, float64; NaN for what is missing or no number."""
        quick = list(cells)
        for i in self.odd:
            quick[i] = "nan"
        try:  # thousands of cells at once; 1_000 is a number of Python alone
            made = np.fromiter(map(float, quick), np.float64, len(quick))
            finite = np.isfinite(made)
            if "_" in "".join(quick):
                raise ValueError
        except ValueError:
            made, finite = np.full(len(cells), np.nan), np.zeros(len(cells), dtype=bool)
        self.plain += finite
        for i in np.flatnonzero(~finite).tolist():
            made[i] = self._one(number, cells[i], i)
        return made

    def counted(self) -> None:
        """Add what was a number at first sight to the counts."""
        for column, n in zip(self.columns, self.plain.tolist(), strict=True):
            column.known += n

    def _one(self, number: int, cell: str, i: int) -> float:
        column, text = self.columns[i], cell.strip()
        if not text or text.casefold() in self.missing:
            self.odd.add(i)
            return np.nan
        try:
            value = plain_number("", text, self.separator)
        except ValueError as error:
            column.doubtful += isinstance(error, DoubtfulComma)
            self.odd.add(i)
            column.known += 1
            column.strange += 1
            if len(column.wrong) < _NO_NUMBER:
                column.wrong.append((number, text))
            return np.nan
        self.commas += "," in text
        if np.isinf(value):
            column.infinite.append((number, text))
        column.known += not np.isnan(value)
        return value if np.isfinite(value) else np.nan


def _of_parquet(path: Path, missing: frozenset[str]) -> Cells:
    """Typed columns as they are; texts by the rule of text tables. The name of an index without one is empty."""
    table = label_cells.open_parquet(path)
    import pyarrow.types as kinds  # which that found

    header = ["" if str(n).startswith("__index_level_") else same(str(n).strip()) for n in table.column_names]
    rows = list(range(1, table.num_rows + 1))
    columns = [Column() for _ in header]
    values = np.full((len(rows), len(header)), np.nan)
    for i, column in enumerate(columns):
        data = table.column(i)
        if kinds.is_floating(data.type) or kinds.is_integer(data.type):
            x = data.cast("float64").to_numpy().astype(np.float64)
            column.infinite = [(rows[k], str(x[k])) for k in np.flatnonzero(np.isinf(x))[:_NO_NUMBER]]
            column.known = int((~np.isnan(x)).sum())
            values[:, i] = np.where(np.isfinite(x), x, np.nan)
        else:
            reader = _Numbers([column], "", missing)
            values[:, i] = [
                reader.of(row, [label_cells.shown(v)])[0] for row, v in zip(rows, data.to_pylist(), strict=True)
            ]
            reader.counted()

    def texts(places: Sequence[int]) -> dict[int, list[str]]:
        shown = {i: [label_cells.shown(v) for v in table.column(i).to_pylist()] for i in places}
        return {i: ["" if t.casefold() in missing else same(t) for t in cells] for i, cells in shown.items()}

    return Cells(header, rows, values, columns, "", (), texts)


def listed(path: Path, wrong: Sequence[str]) -> str:
    """A table's faults, the first twenty of them."""
    more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
    return f"{path}:\n  " + "\n  ".join(wrong[:20]) + more
