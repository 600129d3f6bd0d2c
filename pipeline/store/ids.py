"""Ids of slides and bags: names of outputs, and therefore never a way out of the work folder.

In: an id as a table, a file name or a received work folder gives it. Out: what is wrong with it, in words, or nothing.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 240  # bytes of one part: file systems take 255, and `.zarr` and private names come on top


def leaves_the_folder(name: str) -> str:
    """Why an output of this id would lie outside its folder; "" if it would not."""
    if not name:
        return "it is empty"
    if "\0" in name:
        return "it holds a NUL character"
    if name[0] in "/\\" or re.match(r"[A-Za-z]:[/\\]", name):
        return "it is an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "it leads out of the folder (`..`)"
    return ""


def wrong(name: str) -> str:
    """What is wrong with the id of a new bag; "" if nothing is. Stricter than for slides, whose files exist already."""
    out = leaves_the_folder(name)
    if out:
        return out
    if re.match(r"[A-Za-z]:", name):
        return "it begins with a drive letter"
    odd = next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), "")
    if odd:
        return f"it holds the control character {odd!a}"
    if name != name.strip():
        return "it begins or ends with a blank, and tables of labels are read without those"
    for part in re.split(r"[/\\]", name):
        if not part.strip(". "):
            return "a part of its path is empty or a dot"
        if part[0] == ".":
            return "a part of it begins with a dot: such files are private to the program"
        if len(part.encode()) > LONGEST:
            return f"it is longer than {LONGEST} bytes"
    if any(part.endswith(".zarr") for part in re.split(r"[/\\]", name)[:-1]):
        return "a folder in it ends in .zarr, as if it lay inside of a store"
    return ""
