"""Is a TIFF all there? Its directories say where the pixel data end; the file's size says whether they do.

In: a path, or an open file. Out: the number of bytes missing at the end; the entries of a directory and their numbers.
Reads directories only (a few hundred KB), decodes nothing. OpenSlide opens a slide whose pixels were cut off and fails
at the first missing tile, hours later; of one whose header promises a vast tile it ends the process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_OFFSETS, _COUNTS = (273, 324), (279, 325)  # strip and tile; offsets, byte counts
_TILE_SIDES, _SUB_DIRECTORIES = (322, 323), 330
_MOST_DIRECTORIES = 4096
MAX_TILE_PX = 1 << 26  # of one tile, which is unpacked as a whole: 256 MiB as RGBA. Scanners write 240 to 4,096 px
_TYPES = {1: "u1", 3: "u2", 4: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}  # byte, short, long, any, ifd, long8, ifd8


def missing_bytes(path: Path) -> int:
    """Bytes that the directories promise beyond the end of the file; 0 for a whole TIFF and for anything else."""
    size = os.path.getsize(path)
    end = 0
    with open(path, "rb") as file:
        try:
            order, big, at = header(file)
        except ValueError:
            return 0
        except struct.error:
            return 16 - size
        seen: set[int] = set()
        while at and at not in seen and len(seen) < 4096:
            seen.add(at)
            if at + 8 > size:
                return at + 8 - size
            at, data_end = _directory(file, at, order, big)
            end = max(end, data_end)
    return max(0, end - size)


def walk(file: BinaryIO) -> Iterator[tuple[dict[int, bytes], str, bool]]:
    """(tag -> its raw entry, byte order, whether BigTIFF) of every directory that can be read, sub-directories too;
    nothing of a file that is no TIFF."""
    size = os.fstat(file.fileno()).st_size
    try:
        order, big, first = header(file)
    except (ValueError, struct.error):
        return
    to_do, seen = [first], set[int]()
    while to_do and len(seen) < _MOST_DIRECTORIES:
        at = to_do.pop()
        if not 0 < at < size or at in seen:
            continue
        seen.add(at)
        try:
            tags, following = entries(file, at, order, big)
            subs = values(file, tags[_SUB_DIRECTORIES], order, big) if _SUB_DIRECTORIES in tags else None
        except (ValueError, struct.error, OverflowError):
            continue
        yield tags, order, big
        to_do += [following, *([int(s) for s in subs[:64]] if subs is not None else [])]


def vast_tile(path: Path) -> tuple[int, int] | None:
    """(w, h) of the first tile that has more than MAX_TILE_PX px; None if there is none, or the file is no TIFF."""
    with open(path, "rb") as file:
        for tags, order, big in walk(file):
            sides = [values(file, tags[t], order, big) if t in tags else None for t in _TILE_SIDES]
            w, h = (int(s[0]) if s is not None and len(s) else 0 for s in sides)
            if w * h > MAX_TILE_PX:
                return w, h
    return None


def header(file: BinaryIO) -> tuple[str, bool, int]:
    """(struct's byte order, whether BigTIFF, offset of the first directory). ValueError: no TIFF; struct.error: cut."""
    head = file.read(16)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise ValueError("no TIFF")
    order, big = "<" if head[:2] == b"II" else ">", b"+" in head[:4]
    (at,) = struct.unpack(order + "Q", head[8:16]) if big else struct.unpack(order + "I", head[4:8])
    return order, big, at


def entries(file: BinaryIO, at: int, order: str, big: bool) -> tuple[dict[int, bytes], int]:
    """(tag -> its raw entry, offset of the next directory) of the directory at `at`. struct.error: it is cut off;
    ValueError: more entries than any writer makes."""
    file.seek(at)
    entry_size, count_form, value_form = (20, "Q", "Q") if big else (12, "H", "I")
    (count,) = struct.unpack(order + count_form, file.read(struct.calcsize(order + count_form)))
    if count > 4096:
        raise ValueError(f"a TIFF directory of {count} entries")
    body = file.read(count * entry_size)
    (following,) = struct.unpack(order + value_form, file.read(struct.calcsize(order + value_form)))
    found = (body[i * entry_size : (i + 1) * entry_size] for i in range(count))
    return {struct.unpack(order + "H", entry[:2])[0]: entry for entry in found}, following


def values(file: BinaryIO, entry: bytes, order: str, big: bool) -> np.ndarray | None:
    """The integers of one directory entry as uint64, or None if they are no integers or cut off."""
    (kind,) = struct.unpack(order + "H", entry[2:4])
    if kind not in _TYPES:
        return None
    dtype = np.dtype(order + _TYPES[kind])
    form, width = ("Q", 8) if big else ("I", 4)
    (n,) = struct.unpack(order + form, entry[4 : 4 + width])
    if n * dtype.itemsize > 1 << 28:
        return None
    if n * dtype.itemsize <= width:
        raw = entry[4 + width :][: n * dtype.itemsize]
    else:
        (where,) = struct.unpack(order + form, entry[4 + width :])
        file.seek(where)
        raw = file.read(n * dtype.itemsize)
    if len(raw) < n * dtype.itemsize:
        return None
    return np.frombuffer(raw, dtype).astype(np.uint64)


def text(file: BinaryIO, entry: bytes, order: str, big: bool) -> str:
    """The text of one directory entry; "" if it is none, is cut off, or has more than 16 MiB."""
    kind = struct.unpack(order + "H", entry[2:4])[0]
    as_bytes = values(file, entry[:2] + struct.pack(order + "H", 1) + entry[4:], order, big) if kind == 2 else None
    if as_bytes is None or len(as_bytes) > 1 << 24:
        return ""
    return bytes(as_bytes.astype(np.uint8)).split(b"\0")[0].decode("utf-8", "replace")


def _directory(file: BinaryIO, at: int, order: str, big: bool) -> tuple[int, int]:
    """(offset of the next directory, where this one's pixel data end). Half a directory ends the walk."""
    try:
        tags, following = entries(file, at, order, big)
    except ValueError:
        return 0, 0  # a damaged header, which the reader will name
    except struct.error:
        return 0, at + 8 + _directory_bytes(file, at, order, big)
    found = [next((values(file, tags[t], order, big) for t in some if t in tags), None) for some in (_OFFSETS, _COUNTS)]
    offsets, counts = found
    if offsets is None or counts is None or len(offsets) != len(counts) or not len(offsets):
        return following, 0
    return following, int((offsets + counts).max())


def _directory_bytes(file: BinaryIO, at: int, order: str, big: bool) -> int:
    """How long the directory at `at` says it is, as far as that can be read."""
    form, entry_size = ("Q", 20) if big else ("H", 12)
    file.seek(at)
    head = file.read(struct.calcsize(order + form))
    whole = len(head) == struct.calcsize(order + form)
    return struct.unpack(order + form, head)[0] * entry_size + len(head) if whole else 0
