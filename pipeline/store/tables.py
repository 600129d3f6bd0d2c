"""CSV of the work folder: the one writer and the one reader. UTF-8, lines end with a line feed, floats in full.

In: rows. Out: text; a value that is None is an empty cell, and only what needs quotes has them. Tables of people, which
come in many encodings and separators, are read by `cohort/labels/cells.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def text_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The header and the rows, whose values stand in the order of `columns`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([repr(float(v)) if isinstance(v, float) else v for v in row] for row in rows)
    return text.getvalue()


def of_mappings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows that name their values; columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    return text_of(columns, ([row.get(c, "") for c in columns] for row in rows))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table that this program wrote, as text. Raises OSError, csv.Error, UnicodeDecodeError."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
