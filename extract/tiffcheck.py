"""Is a TIFF all there? Its directories say where the pixel data end; the file's size says whether they do.

In: a path. Out: the number of bytes missing at the end. Reads directories only (a few hundred KB), decodes nothing.
OpenSlide opens a slide whose pixels were cut off and fails at the first missing tile, hours later.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

_OFFSETS, _COUNTS = (273, 324), (279, 325)  # strip and tile; offsets, byte counts
_TYPES = {3: "u2", 4: "u4", 13: "u4", 16: "u8"}


def missing_bytes(path: Path) -> int:
    """Bytes that the directories promise beyond the end of the file; 0 for a whole TIFF and for anything else."""
    size = os.path.getsize(path)
    end = 0
    with open(path, "rb") as file:
        head = file.read(16)
        if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return 0
        order = "<" if head[:2] == b"II" else ">"
        big = b"+" in head[:4]
        if len(head) < (16 if big else 8):
            return 16 - len(head)
        (at,) = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])
        seen: set[int] = set()
        while at and at not in seen and len(seen) < 4096:
            seen.add(at)
            if at + 8 > size:
                return at + 8 - size
            at, data_end = _directory(file, at, order, big)
            end = max(end, data_end)
    return max(0, end - size)


def _directory(file: BinaryIO, at: int, order: str, big: bool) -> tuple[int, int]:
    """(offset of the next directory, where this one's pixel data end). Half a directory ends the walk."""
    file.seek(at)
    entry_size, count_form, value_form = (20, "Q", "Q") if big else (12, "H", "I")
    head = file.read(struct.calcsize(order + count_form))
    if len(head) < struct.calcsize(order + count_form):
        return 0, at + 8
    (count,) = struct.unpack(order + count_form, head)
    if count > 4096:
        return 0, 0  # no TIFF writer does that: a damaged header, which the reader will name
    body = file.read(count * entry_size)
    tail = file.read(struct.calcsize(order + value_form))
    if len(body) < count * entry_size or len(tail) < struct.calcsize(order + value_form):
        return 0, at + len(head) + count * entry_size + 8
    offsets = counts = None
    for i in range(count):
        entry = body[i * entry_size : (i + 1) * entry_size]
        tag, kind = struct.unpack(order + "HH", entry[:4])
        if tag in _OFFSETS or tag in _COUNTS:
            values = _values(file, entry, kind, order, value_form)
            if tag in _OFFSETS:
                offsets = values
            else:
                counts = values
    (following,) = struct.unpack(order + value_form, tail)
    if offsets is None or counts is None or len(offsets) != len(counts) or not len(offsets):
        return following, 0
    return following, int((offsets + counts).max())


def _values(file: BinaryIO, entry: bytes, kind: int, order: str, value_form: str) -> np.ndarray | None:
    """The integers of one directory entry as uint64, or None if they are no integers or cut off."""
    if kind not in _TYPES:
        return None
    dtype = np.dtype(order + _TYPES[kind])
    width = struct.calcsize(order + value_form)
    (n,) = struct.unpack(order + value_form, entry[4 : 4 + width])
    if n * dtype.itemsize > 1 << 28:
        return None
    if n * dtype.itemsize <= width:
        raw = entry[4 + width :][: n * dtype.itemsize]
    else:
        (where,) = struct.unpack(order + value_form, entry[4 + width :])
        file.seek(where)
        raw = file.read(n * dtype.itemsize)
    if len(raw) < n * dtype.itemsize:
        return None
    return np.frombuffer(raw, dtype).astype(np.uint64)
