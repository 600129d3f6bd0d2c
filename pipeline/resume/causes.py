"""Failures of the same cause, told once: what is wrong, then who it is wrong with.

In: keys and their messages. Out: groups. Two messages have one cause where they differ in nothing but the names of
their own items and in numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NAMED = 10  # so many keys of a group are named where not all are
_OTHER = "..."  # stands for an item's own name
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass
class Cause:
    """keys: in order. message: what is wrong with each, without its name where there are several."""

    keys: list[str]
    message: str

    def names(self, most: int | None = NAMED) -> str:
        """The keys, the first `most` of them; None: all."""
        some = self.keys if most is None else self.keys[:most]
        more = len(self.keys) - len(some)
        return ", ".join(some) + (f" and {more} more" if more else "")


def signature(key: str, message: str) -> str:
    """What messages of one cause have in common."""
    return _NUMBER.sub("#", without(key, message))


def without(key: str, message: str) -> str:
    """`message` with the item's own name, and files that are named after it, as `...`."""
    name = key.rsplit("/", 1)[-1]
    stem = name.rsplit(".", 1)[0] if "." in name[1:] else name
    for own in dict.fromkeys((key, name, stem)):
        # a word that has it in it, as a path has; a name as short as a number only where it is a file's
        tail = r"[^\s'\":;,]*" if len(own) > 2 else r"\.[^\s'\":;,]+"
        message = re.sub(rf"[^\s'\"(]*(?<![A-Za-z0-9]){re.escape(own)}(?![A-Za-z0-9]){tail}", _OTHER, message)
    return message.removeprefix(f"{_OTHER}: ")


def grouped(failures: Iterable[tuple[str, str]]) -> list[Cause]:
    """(key, message) of what failed, by cause; the largest group first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, message in sorted(failures):
        groups.setdefault(signature(key, message), []).append((key, message))
    found = []
    for members in groups.values():
        texts = list(dict.fromkeys(without(*member) for member in members))
        if len(members) == 1:
            message = members[0][1]
        else:
            message = texts[0] + (" (with other numbers for others)" if len(texts) > 1 else "")
        found.append(Cause([key for key, _ in members], message))
    return sorted(found, key=lambda cause: (-len(cause.keys), cause.keys))
