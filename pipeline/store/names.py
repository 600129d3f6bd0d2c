"""Names of files as text: also those that are not UTF-8, which file systems allow and tables, pages and ids do not.

In: a name or path as Python gives it (bytes that are no UTF-8 stand in it as lone surrogates). Out: text that can be
written anywhere. In an id each such byte is `%` and two hexadecimal digits, a Latin-1 `ä` thus `%E4`: the same on every
machine, and what a table of labels writes. As a path, the whole is a `file://` address, from which the path comes back
byte by byte.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

_ADDRESS = "file://"


def readable(text: str) -> str:
    """`text` with each byte that is not UTF-8 as `%` and two digits; other text as it is."""
    if text.isascii():
        return text
    return "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)


def of_path(path: Path | None) -> str:
    """A path as a table holds it; "" for none. `to_path` gives it back."""
    text = "" if path is None else str(path)
    return text if readable(text) == text else path.absolute().as_uri()  # type: ignore[union-attr]


def to_path(text: str) -> Path:
    """The path that `of_path` wrote."""
    if not text.startswith(_ADDRESS + "/"):
        return Path(text)
    return Path(os.fsdecode(unquote_to_bytes(text.removeprefix(_ADDRESS))))


def free(name: str, taken: set[str]) -> str:
    """`readable(name)`, with `%` added until it is none of `taken`, to which it is added: another file may really be
    called so."""
    made = readable(name)
    while made in taken:
        made += "%"
    taken.add(made)
    return made
