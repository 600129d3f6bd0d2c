"""A table's file as cells: text in any usual encoding and with any usual separator, xlsx, or parquet.

In: a file. Out: a `Sheet`: header and lines of text cells, each line with the number that an editor or a spreadsheet
shows beside it, and what had to be guessed. Knows no column.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

from mhim.configs.schema import LabelsConfig
from mhim.pipeline.cohort.labels.rows import CohortError, some

SUFFIXES = frozenset({".csv", ".tsv", ".tab", ".txt", ".xlsx", ".xlsm", ".parquet"})
SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
EXTRA = 'pip install "mhim-pipeline[tables]", or save the table as CSV'
Line = tuple[int, list[str]]


@dataclass(frozen=True)
class Sheet:
    """Text cells as they stand. lines: (number in the file, cells), the header among them as the first, blank ones left
    out. separator: of a text table, else empty. notes: what was guessed."""

    lines: list[Line]
    separator: str = ""
    notes: tuple[str, ...] = ()


def is_table(path: Path) -> bool:
    """Whether a path names a table of slides, rather than a slide: by its suffix."""
    return path.suffix.lower() in SUFFIXES


def read(path: Path, settings: LabelsConfig, known: Callable[[Sequence[str]], bool]) -> Sheet:
    """The cells of a table. known: whether a header names the columns that are looked for; tells separators apart.

    Raises CohortError with what was found and the cure."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CohortError(f"no such file: {path}") from error
    except OSError as error:
        raise CohortError(f"{path} cannot be read: {error.strerror or error}") from error
    if raw.startswith(b"PAR1"):
        return _parquet(path)
    if raw.startswith(b"PK\x03\x04"):
        return _excel(path, settings.sheet)
    if raw.startswith(b"\xd0\xcf\x11\xe0"):
        raise CohortError(f"{path} is an old Excel file (xls): save it as xlsx or CSV")
    text, notes = decode(raw, settings.encoding, path)
    return _text(text, settings, known, path, notes)


# ---------------------------------------------------------------------------------------------- text


def decode(raw: bytes, encoding: str, path: Path) -> tuple[str, list[str]]:
    """The text of a file, and a note where its encoding had to be guessed. Raises CohortError."""
    if encoding != "auto":
        try:
            name = codecs.lookup(encoding).name
            return raw.decode("utf-8-sig" if name == "utf-8" else name), []
        except LookupError as error:
            raise CohortError(f"labels.encoding={encoding}: no such encoding; utf-8, utf-16 and latin-1 are") from error
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            byte = f"0x{raw[error.start]:02x}"
            raise CohortError(
                f"{path} is not written in {encoding}: row {line} holds the byte {byte}; leave "
                "--encoding away, or name the right one"
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
            "give --encoding"
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
    text: str, settings: LabelsConfig, known: Callable[[Sequence[str]], bool], path: Path, notes: list[str]
) -> Sheet:
    told = "" if settings.separator == "auto" else SEPARATORS[settings.separator]
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
            parsed[separator] = _lines(lines, separator, first, path)
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
        return known(found[0][1]), min(width, 2), same, width

    best = max(options, key=rank)  # the first of equals, which is the comma
    found = parsed[best]
    if isinstance(found, CohortError):
        raise found
    if not found:
        raise CohortError(f"{path} is empty; a table has a header line with the names of its columns, and rows")
    names = {v: k for k, v in SEPARATORS.items()}
    if best != "," and not told:
        notes = [*notes, f"{path.name}: columns apart by {names.get(best, best)}"]
    return Sheet(found, best, tuple(notes))


def _lines(lines: Sequence[str], separator: str, skip: int, path: Path) -> list[Line]:
    """Every row that is not blank, with the number of the line on which it begins; a quoted cell may hold lines."""
    reader = csv.reader(lines[skip:], delimiter=separator, strict=True)
    made: list[Line] = []
    before = skip
    try:
        for cells in reader:
            number, before = before + 1, skip + reader.line_num
            if any(cell.strip() for cell in cells):
                made.append((number, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise CohortError(f"{path}, row {before + 1}: {error}; is a quotation mark not closed?") from error
    return made


# ---------------------------------------------------------------------------------------------- xlsx, parquet


def _excel(path: Path, wanted: str) -> Sheet:
    try:
        import openpyxl
    except ImportError as error:
        raise CohortError(f"{path} is an xlsx file, which needs openpyxl: {EXTRA}") from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:  # zip, XML and openpyxl's own errors; all mean the same to the reader
        raise CohortError(f"{path} begins like xlsx and cannot be read as one ({error}): save it as CSV") from error
    try:
        names = [s.title for s in book.worksheets]
        if wanted and wanted not in names:
            raise CohortError(f"{path}: no sheet {wanted!r} (labels.sheet); there is: {', '.join(names)}")
        for sheet in book.worksheets:
            if wanted and sheet.title != wanted:
                continue
            lines = [
                (number, [_shown(c.value, getattr(c, "number_format", "")) for c in row])
                for number, row in enumerate(sheet.iter_rows(), start=1)
            ]
            lines = [line for line in lines if any(line[1])]
            if lines:
                width = max(len(cells) for _, cells in lines)
                padded = [(n, cells + [""] * (width - len(cells))) for n, cells in lines]
                note = f"{path.name}: sheet {sheet.title!r} of {len(names)} ({some(names)}; --set labels.sheet=NAME)"
                return Sheet(padded, notes=(note,) if len(names) > 1 and not wanted else ())
    finally:
        book.close()
    raise CohortError(f"{path} has no rows")


def _parquet(path: Path) -> Sheet:
    try:
        from pyarrow import ArrowException
        from pyarrow import parquet as format_
    except ImportError as error:
        raise CohortError(f"{path} is a parquet file, which needs pyarrow: {EXTRA}") from error
    try:
        table = format_.ParquetFile(path).read()
    except (ArrowException, OSError, ValueError) as error:
        raise CohortError(f"{path} cannot be read as parquet ({error}): copy it again, or save it as CSV") from error
    names = [n for n in table.column_names if not n.startswith("__index_level_")]
    columns = [[_shown(v) for v in table.column(n).to_pylist()] for n in names]
    rows: list[Line] = [(0, [str(n).strip() for n in names])]
    rows += [(n, list(cells)) for n, cells in enumerate(zip(*columns, strict=True), start=1)]
    return Sheet([rows[0], *(r for r in rows[1:] if any(r[1]))])


def _shown(value: Any, form: str = "") -> str:
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
