"""A labels table or manifest, from its file to its rows. In: a CSV. Out: rows, or one error that lists every wrong row
with its column.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pipeline import published
from pipeline.label_rows import COLUMNS, CohortError, Row, contradictions, row_of, some


def read_rows(path: Path) -> list[Row]:
    """All rows of a manifest or labels CSV. Raises CohortError naming every wrong row and column (at most 20)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CohortError(f"no such file: {path}") from error
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise CohortError(f"{path} cannot be read as a UTF-8 CSV: {error}") from error
    reader = csv.DictReader(io.StringIO(published.translate(text)))
    header = [h.strip() for h in reader.fieldnames or []]
    reader.fieldnames = header
    unknown = [h for h in header if h not in COLUMNS]
    if "slide" not in header or unknown:
        what = f"unknown column {some(unknown)}" if unknown else "no column `slide`"
        raise CohortError(f"{path}: {what}. Columns: {', '.join(f'{k} ({v})' for k, v in COLUMNS.items())}")
    if ("time" in header) != ("event" in header):
        raise CohortError(f"{path}: `time` and `event` belong together; one of the two columns is missing")
    rows: list[Row] = []
    wrong: list[str] = []
    for raw in reader:
        if None in raw or any(v is None for v in raw.values()):
            wrong.append(f"row {reader.line_num}: it has not as many fields as the header")
            continue
        cells = {k: v.strip() for k, v in raw.items()}
        if not any(cells.values()):
            continue
        try:
            rows.append(row_of(reader.line_num, cells))
        except ValueError as error:
            wrong.append(f"row {reader.line_num}, {error}")
    wrong += contradictions(rows)
    if wrong:
        more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CohortError(f"{path}:\n  " + "\n  ".join(wrong[:20]) + more)
    if not rows:
        raise CohortError(f"{path} has no rows")
    return rows


