"""A page made of parts, each by itself: what is damaged costs its own part, and is told with its name.

In: a name and what makes the part. Out: the part, or an empty one, and a line on what is wrong with it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any, TypeVar

from mhim.pipeline.store.layout import StoreError

Part = TypeVar("Part")
# what files raise that are damaged, or are not what they are called
DAMAGED = (StoreError, OSError, LookupError, ValueError, TypeError, AttributeError, csv.Error)


class Parts:
    """Makes parts. wrong: a line for each that could not be made."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def make(self, name: str, make: Callable[[], Part], without: Any) -> Part:
        """What `make` gives, or `without`, an empty one, where a file that it reads is damaged."""
        try:
            return make()
        except DAMAGED as error:
            self.fail(name, error)
            empty: Part = without
            return empty

    def fail(self, name: str, error: Exception) -> None:
        """Tell that the part `name` could not be made."""
        self.wrong.append(f"{name}: {reason(error)}")


def reason(error: Exception) -> str:
    """What happened, in words: of an error that is no message to a person, its kind too."""
    if isinstance(error, StoreError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return f"its files are not as they were written ({type(error).__name__}: {error})"
