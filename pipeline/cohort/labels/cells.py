"""A table's file as cells: text in any usual encoding and with any usual separator, xlsx, or parquet.

In: a file. Out: a `Sheet`: header and lines of text cells, each line with the number that an editor or a spreadsheet
shows beside it, and what had to be guessed. Knows no column.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from mhim.configs.schema import LabelsConfig, TablesConfig
from mhim.pipeline.cohort.labels.rows import CohortError, some

SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".txt", ".xlsx", ".xlsm", ".parquet"})
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
EXTRA = 'pip install "mhim-pipeline[tables]", or save the table as CSV'
SNIFFED_ROWS = 50  # of a table that is read row by row: what its separator is judged by
Line = tuple[int, list[str]]
Known = Callable[[Sequence[str]], bool]


class NotText(Exception):
    """A file that `stream` does not read: `what` it is (xlsx, parquet)."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


@dataclass(frozen=True)
class Dialect:
    """How a table is written. section: of the settings that say so, for messages."""

    encoding: str = "auto"
    separator: str = "auto"
    sheet: str = ""
    section: str = "labels"
    sheet_setting: str = "labels.sheet"

    @classmethod
    def of_labels(cls, settings: LabelsConfig) -> Dialect:
        return cls(settings.encoding, settings.separator, settings.sheet)

    @classmethod
    def of_table(cls, settings: TablesConfig, name: str) -> Dialect:
        """Of the patients' table called `name`."""
        sheet = settings.sheet.get(name, "")
        return cls(settings.encoding, settings.separator, sheet, "tables", f"tables.sheet.{name}")


@dataclass(frozen=True)
class Sheet:
    """Text cells as they stand. lines: (number in the file, cells), the header among them as the first, blank ones left
    out. separator: of a text table, else empty. notes: what was guessed."""

    lines: list[Line]
    separator: str = ""
    notes: tuple[str, ...] = ()


def is_table(path: Path) -> bool:
    """Whether a path names a table of slides, rather than a slide: by its suffix."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.suffix.lower() in SUFFIXES


def read(path: Path, dialect: Dialect, known: Known) -> Sheet:
    """The cells of a table. known: whether a header names the columns that are looked for; tells separators apart.

    Raises CohortError with what was found and the cure."""
    raw = content(path)
    try:
        lines, separator, notes = _text(raw, dialect, known, path)
    except NotText as error:
        return _parquet(path) if error.what == "parquet" else _excel(path, raw, dialect)
    return Sheet([(n, [c.strip() for c in cells]) for n, cells in lines], separator, notes)


def stream(path: Path, raw: bytes, dialect: Dialect, known: Known) -> tuple[Iterator[Line], str, tuple[str, ...]]:
    """A text table row by row, the header first, with its separator and what was guessed: for tables so wide that all
    their cells as texts would not fit. The separator is judged by the first rows, and the blanks around cells stay.

    Raises NotText for xlsx and parquet, and CohortError, also while rows are taken."""
    return _text(raw, dialect, known, path, SNIFFED_ROWS)


def content(path: Path) -> bytes:
    """A file's bytes, unpacked if it is gzipped. Raises CohortError."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except FileNotFoundError as error:
        raise CohortError(f"no such file: {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CohortError(f"{path} is gzipped and damaged ({error}): copy it again") from error
    except OSError as error:
        raise CohortError(f"{path} cannot be read: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------- text


def decode(raw: bytes, encoding: str, path: Path, section: str = "labels") -> tuple[str, list[str]]:
    """The text of a file, and a note where its encoding had to be guessed. Raises CohortError."""
    cure = "--encoding" if section == "labels" else f"--set {section}.encoding=..."
    if encoding != "auto":
        try:
            name = codecs.lookup(encoding).name
            return raw.decode("utf-8-sig" if name == "utf-8" else name), []
        except LookupError as error:
            raise CohortError(
                f"{section}.encoding={encoding}: no such encoding; utf-8, utf-16 and latin-1 are"
            ) from error
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            byte = f"0x{raw[error.start]:02x}"
            raise CohortError(
                f"{path} is not written in {encoding}: row {line} holds the byte {byte}; leave "
                f"{cure} away, or name the right one"
            ) from error
    name = _marked(raw)
    try:
        text = raw.decode(name or "utf-8-sig")
        notes = [f"{path.name}: read as {name.upper()}"] if name else []
    except UnicodeDecodeError as error:
        if name:
            raise CohortError(f"{path} begins as {name.upper()} and is damaged: save it again as UTF-8") from error
        name = "cp1252" if not any(byte in raw for byte in b"\x81\x8d\x8f\x90\x9d") else "latin-1"
        text = raw.decode(name)
        line = raw[: error.start].count(b"\n") + 1
        shown = text.split("\n")[line - 1].strip()[:60]
        called = "Windows-1252 (Latin-1)" if name == "cp1252" else "Latin-1"
        notes = [
            f"{path.name}: not UTF-8, read as {called}, which makes {shown!r} of row {line}; if that is wrong, "
            f"give {cure}"
        ]
    if "\x00" in text:
        raise CohortError(f"{path} is no table: it holds NUL characters; save it as CSV (UTF-8)")
    return text, notes


def _marked(raw: bytes) -> str:
    """UTF-16 or UTF-32, by the mark at the beginning or by every second byte; empty for anything else."""
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    some_bytes = raw[: 2 * (min(len(raw), 4096) // 2)]
    zeros = some_bytes[0::2].count(0), some_bytes[1::2].count(0)
    half = len(some_bytes) // 2
    if half and max(zeros) > 0.7 * half and min(zeros) < 0.1 * half:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    return ""


def _text(
    raw: bytes, dialect: Dialect, known: Known, path: Path, most: int | None = None
) -> tuple[Iterator[Line], str, tuple[str, ...]]:
    """The rows of a text table; its separator is judged by the first `most` of them, or by all."""
    if raw.startswith(b"PAR1"):
        raise NotText("parquet")
    if raw.startswith(b"PK\x03\x04"):
        raise NotText("xlsx")
    if raw.startswith(b"\xd0\xcf\x11\xe0"):
        raise CohortError(f"{path} is an old Excel file (xls): save it as xlsx or CSV")
    text, notes = decode(raw, dialect.encoding, path, dialect.section)
    told = "" if dialect.separator == "auto" else SEPARATORS[dialect.separator]
    first = 0  # of the lines above the header: Excel's `sep=;`, cBioPortal's comments
    lines = list(io.StringIO(text, newline=""))
    while first < len(lines) and (not lines[first].strip() or lines[first].lstrip().startswith("#")):
        first += 1
    if first < len(lines) and lines[first].strip().lower().startswith("sep=") and len(lines[first].strip()) == 5:
        told, first = told or lines[first].strip()[4], first + 1
    options = [told] if told else list(SEPARATORS.values())
    parsed: dict[str, list[Line] | CohortError] = {}
    for separator in options:
        try:
            parsed[separator] = list(itertools.islice(_lines(lines, separator, first, path), most))
        except CohortError as error:
            parsed[separator] = error

    def rank(separator: str) -> tuple[bool, int, float, int]:
        found = parsed[separator]
        if isinstance(found, CohortError):  # told only if this is the separator, which the first line says
            return known([c.strip() for c in lines[first].split(separator)]), 0, 0.0, 0
        if not found:
            return False, 0, 0.0, 0
        width = len(found[0][1])
        same = sum(len(cells) == width for _, cells in found) / len(found)
        return known([c.strip() for c in found[0][1]]), min(width, 2), same, width

    best = max(options, key=rank)  # the first of equals, which is the comma
    found = parsed[best]
    if isinstance(found, CohortError):
        raise found
    if not found:
        raise CohortError(f"{path} is empty; a table has a header line with the names of its columns, and rows")
    names = {v: k for k, v in SEPARATORS.items()}
    if best != "," and not told:
        notes = [*notes, f"{path.name}: columns apart by {names.get(best, best)}"]
    rows = iter(found) if most is None else _lines(lines, best, first, path)
    return rows, best, tuple(notes)


def _lines(lines: Sequence[str], separator: str, skip: int, path: Path) -> Iterator[Line]:
    """Every row that is not blank, with the number of the line on which it begins; a quoted cell may hold lines."""
    reader = csv.reader(itertools.islice(lines, skip, None), delimiter=separator, strict=True)
    before = skip
    try:
        for cells in reader:
            number, before = before + 1, skip + reader.line_num
            if any(cell.strip() for cell in cells):
                yield number, cells
    except csv.Error as error:
        raise CohortError(f"{path}, row {before + 1}: {error}; is a quotation mark not closed?") from error


# ---------------------------------------------------------------------------------------------- xlsx, parquet


def _excel(path: Path, raw: bytes, dialect: Dialect) -> Sheet:
    wanted = dialect.sheet
    try:
        import openpyxl
    except ImportError as error:
        raise CohortError(f"{path} is an xlsx file, which needs openpyxl: {EXTRA}") from error
    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
    except Exception as error:  # zip, XML and openpyxl's own errors; all mean the same to the reader
        raise CohortError(f"{path} begins like xlsx and cannot be read as one ({error}): save it as CSV") from error
    try:
        names = [s.title for s in book.worksheets]
        if wanted and wanted not in names:
            raise CohortError(f"{path}: no sheet {wanted!r} ({dialect.sheet_setting}); there is: {', '.join(names)}")
        for sheet in book.worksheets:
            if wanted and sheet.title != wanted:
                continue
            lines = [
                (number, [shown(c.value, getattr(c, "number_format", "")) for c in row])
                for number, row in enumerate(sheet.iter_rows(), start=1)
            ]
            lines = [line for line in lines if any(line[1])]
            if lines:
                width = max(len(cells) for _, cells in lines)
                padded = [(n, cells + [""] * (width - len(cells))) for n, cells in lines]
                how = f"--set {dialect.sheet_setting}=NAME"
                note = f"{path.name}: sheet {sheet.title!r} of {len(names)} ({some(names)}; {how})"
                return Sheet(padded, notes=(note,) if len(names) > 1 and not wanted else ())
    finally:
        book.close()
    raise CohortError(f"{path} has no rows")


def open_parquet(path: Path) -> Any:
    """A parquet file as an Arrow table. Raises CohortError, also where pyarrow is not installed."""
    try:
        from pyarrow import ArrowException
        from pyarrow import parquet as format_
    except ImportError as error:
        raise CohortError(f"{path} is a parquet file, which needs pyarrow: {EXTRA}") from error
    try:
        return format_.ParquetFile(path).read()
    except (ArrowException, OSError, ValueError) as error:
        raise CohortError(f"{path} cannot be read as parquet ({error}): copy it again, or save it as CSV") from error


def _parquet(path: Path) -> Sheet:
    table = open_parquet(path)
    names = [n for n in table.column_names if not n.startswith("__index_level_")]
    columns = [[shown(v) for v in table.column(n).to_pylist()] for n in names]
    rows: list[Line] = [(0, [str(n).strip() for n in names])]
    rows += [(n, list(cells)) for n, cells in enumerate(zip(*columns, strict=True), start=1)]
    return Sheet([rows[0], *(r for r in rows[1:] if any(r[1]))])


def shown(value: Any, form: str = "") -> str:
    """A typed cell as the text that a CSV would hold."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int) and set(form) == {"0"}:
        return str(value).zfill(len(form))  # shown with leading zeros, as ids often are
    if isinstance(value, (datetime, date)):
        return value.isoformat()
    return str(value).strip()


def trimmed(sheet: Sheet) -> Sheet:
    """Without columns that have neither a name nor a value, as spreadsheets write them at the right."""
    header = sheet.lines[0][1]
    width = len(header)
    while width and not header[width - 1] and not any(any(cells[width - 1 :]) for _, cells in sheet.lines[1:]):
        width -= 1
    lines = [(n, cells[:width] if not any(cells[width:]) else cells) for n, cells in sheet.lines]
    return replace(sheet, lines=lines)
