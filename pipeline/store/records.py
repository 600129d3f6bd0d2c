"""JSON files of the work folder as typed values: one base of all that reads a stranger's file and writes the same.

In: the plain values of a file, or the fields of a new one. Out: a frozen value whose `plain()` has the keys that were
given, in the order of its fields, and no other: what is read and written again is the same text. Keys that this version
does not know are kept, after the others. Not for attributes of stores, of which planning reads 100,000: see
`attributes.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mhim.pipeline.store.layout import StoreError

_ALTERNATIVES = ("int", "float", "str", "list[str]")  # of one key: pydantic tells each as an error of its own

Number = int | float  # an int of a file stays one: it is written as it was read


class Record(BaseModel):
    """Values of a JSON file, or of a part of one. Types are exact: no text becomes a number, no 1 becomes true."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=(), populate_by_name=True)

    @classmethod
    def of(cls, found: object, called: str | Path) -> Self:
        """`found`, the plain values of a file, as a record. Raises StoreError naming the file `called`, its first wrong
        key, and how many more there are."""
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            wrong: dict[str, str] = {}
            for one in error.errors(include_url=False, include_context=False):
                key = ".".join(str(part) for part in one["loc"] if part not in _ALTERNATIVES)
                wrong.setdefault(key or "the whole", one["msg"])
            (key, message), *more = wrong.items()
            others = f", and {len(more)} more" if more else ""
            raise StoreError(
                f"{called} does not hold what this program reads: {key}: {message}{others}. Copy it from its "
                "source once more; if a newer version wrote it, read it with that one"
            ) from error

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON: the keys that were given or read."""
        return self.model_dump(exclude_unset=True, by_alias=True)

    def text(self) -> str:
        """The file's text. NaN is written as Python's JSON writes it."""
        return json.dumps(self.plain(), indent=1) + "\n"
