"""Which slide a file is: its size and a hash of its content, whatever it is called and whenever it was written.

In: a path. Out: a short text, equal for equal slides. Knows nothing of who keeps it (`pipeline/cohort/identities.py`).

- Slides of up to 64 MiB are hashed whole.
- Of a larger one: the first and the last 64 KiB, 1,024 blocks of 16 KiB spread over the whole file, one in each
  1,024th of it at a place that does not repeat with the rows of an uncompressed picture; and of a TIFF, sub-directories
  included, every directory with the offset and byte count of each of its tiles or strips, and all bytes of the images
  that take up to 4 MiB (thumbnail and coarse levels, which show the whole tissue).
- A slide of several files counts all of them, by content and not by name: the DICOM instances of its series, the data
  folder of an MRXS, the images that a VMS or VMU names.

What this cannot tell: a change in a file above 64 MiB that keeps its length, falls between the blocks (about 1 part in
64 of 1 GB is read), keeps the byte count of every compressed tile, and shows on no coarse level.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO, NamedTuple

import numpy as np

from mhim.extract import UnreadableSlide
from mhim.extract.slide import tiffcheck
from mhim.extract.slide.formats import may_be_dicom, suffix

WHOLE_BYTES = 64 << 20  # read in a tenth of a second, and most biopsies and all cores are smaller
BLOCKS, BLOCK_BYTES, END_BYTES = 1024, 16 << 10, 64 << 10
COARSE_BYTES = 4 << 20  # images of a TIFF up to this size are hashed whole
_DIRECTORY_BYTES = 64 << 20  # of offsets and byte counts at most: five million tiles
_RULE = "1"  # first character of every identity: raise when the rule changes, so that two rules are never compared
_SEVERAL_FILES = frozenset({".mrxs", ".vms", ".vmu"})
_GOLDEN = 0.6180339887498949
_READERS = 8  # blocks read at once: the way to a file server takes longer than the reading
_OFFSETS_AND_COUNTS = ((324, 325), (273, 279))  # of tiles, of strips


class Stamp(NamedTuple):
    """What the file system says of a slide's files. key: 32 hex digits. newest_ns: the last change of any, since 1970.

    Equal keys mean an equal slide, provided that it had not changed just before: two changes within one tick of the
    file system's clock look alike."""

    key: str
    newest_ns: int


def identity(path: Path) -> str:
    """`1-<bytes>-<32 hex digits>` of the slide at `path`. Raises OSError when it cannot be read."""
    files = [(file, file.stat().st_size) for file in _parts(path)]
    total = sum(size for _, size in files)
    digests = sorted(_digest(file, size, total) for file, size in files)
    if len(digests) > 1:
        digests = [hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()]
    return f"{_RULE}-{total}-{digests[0]}"


def same(one: str | None, other: str | None) -> bool | None:
    """Whether two identities are of the same slide; None where one is unknown or made by another rule.

    Equal means equal files: a slide that was converted or compressed again is another file."""
    if not one or not other or one.split("-")[0] != other.split("-")[0]:
        return None
    return one == other


def stamp(path: Path) -> Stamp | None:
    """The slide's stamp, or None if there is no such file. Costs one `stat` a file.

    The device's number is left out, as in git: it changes when a file server is mounted again, and inode and change
    time cannot be set by a program that puts another file in place."""
    key = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16)
    newest = 0
    try:
        own = os.stat(path)
        if not (S_ISREG(own.st_mode) or S_ISDIR(own.st_mode)):
            return None  # a pipe, whose reader would wait for ever
        several = suffix(path) in _SEVERAL_FILES or may_be_dicom(path) or S_ISDIR(own.st_mode)
        for file in _candidates(path) if several else [path]:
            info = os.stat(file) if several else own
            key.update(os.fsencode(file.name))
            key.update(struct.pack("<QQqq", info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
            newest = max(newest, info.st_ctime_ns, info.st_mtime_ns)
    except OSError:
        return None
    return Stamp(key.hexdigest(), newest)


# ---------------------------------------------------------------------------------------------- a slide's files


def _candidates(path: Path) -> list[Path]:
    """Every file whose change may change the slide, in the order of their names; the named one at least."""
    if path.is_dir() or may_be_dicom(path):
        from mhim.extract.slide.dicom import candidates  # where a file may be one: the library takes long to import

        return candidates(path if path.is_dir() else path.parent) or [path]
    if suffix(path) == ".mrxs" and path.with_suffix("").is_dir():
        return [path, *sorted(p for p in path.with_suffix("").rglob("*") if p.is_file())]
    if suffix(path) in (".vms", ".vmu"):
        return [path, *_named_images(path)]
    return [path]


def _parts(path: Path) -> list[Path]:
    """The files that make up the slide."""
    found = _candidates(path)
    if not (path.is_dir() or may_be_dicom(path)):
        return found
    series = [_series_of(file) for file in found]
    wanted = next((s for s, file in zip(series, found, strict=True) if s and (path.is_dir() or file == path)), "")
    return [f for f, s in zip(found, series, strict=True) if s == wanted] if wanted else [path]


def _series_of(file: Path) -> str:
    """The SeriesInstanceUID of an image of a DICOM slide; "" of any other file."""
    from mhim.extract.slide.dicom import read

    try:
        one = read(file)
    except UnreadableSlide:
        return ""  # told when it is opened
    return one.series if one is not None and one.image else ""


def _named_images(path: Path) -> list[Path]:
    """The files beside a VMS or VMU that it names as values."""
    with open(path, "rb") as f:
        lines = f.read(1 << 20).decode("utf-8", "replace").splitlines()
    names = {line.partition("=")[2].strip() for line in lines}
    there = {entry.name for entry in path.parent.iterdir() if entry.is_file()}
    return [path.parent / name for name in sorted(names & there - {path.name})]


# ---------------------------------------------------------------------------------------------- one file


def _digest(file: Path, size: int, total: int) -> str:
    """32 hex digits over the length and bytes of one file of a slide of `total` bytes."""
    found = hashlib.blake2b(struct.pack("<Q", size), digest_size=16)
    with open(file, "rb") as f:
        if total <= WHOLE_BYTES or size <= 2 * END_BYTES:
            while some := f.read(1 << 20):
                found.update(some)
            return found.hexdigest()
        for part in _directories(f):
            found.update(part)
        n = max(4, -(-BLOCKS * size // total))
        with ThreadPoolExecutor(_READERS) as pool:
            read = [pool.submit(os.pread, f.fileno(), length, at) for at, length in _places(size, n)]
            for one in read:
                found.update(one.result())
    return found.hexdigest()


def _places(size: int, blocks: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of both ends and of `blocks` blocks, one in each equal part of the file."""
    yield 0, END_BYTES
    part = size / blocks
    for i in range(blocks):
        # where in its part: golden-ratio steps fill the part evenly and never fall into step with rows of pixels
        within = (i * _GOLDEN) % 1.0
        yield int(part * i + within * max(0.0, part - BLOCK_BYTES)), BLOCK_BYTES
    yield size - END_BYTES, END_BYTES


def _directories(file: BinaryIO) -> Iterator[bytes]:
    """Of a TIFF: its directories, their offsets and byte counts, and the bytes of its small images. Else nothing.

    A damaged structure ends the walk; the blocks still count."""
    left = _DIRECTORY_BYTES
    for tags, order, big in tiffcheck.walk(file):
        if left <= 0:
            return
        yield b"".join(tags[t] for t in sorted(tags))
        arrays = [
            [tiffcheck.values(file, tags[t], order, big) if t in tags else None for t in pair]
            for pair in _OFFSETS_AND_COUNTS
        ]
        for offsets, counts in arrays:
            for array in (offsets, counts):
                if array is not None:
                    left -= array.nbytes
                    yield np.ascontiguousarray(array).tobytes()
            if offsets is not None and counts is not None:
                yield from _small_image(file, offsets, counts)


def _small_image(file: BinaryIO, offsets: np.ndarray, counts: np.ndarray) -> Iterator[bytes]:
    """The bytes of the tiles or strips at `offsets`, uint64 (N,), if all of them take up to COARSE_BYTES."""
    if len(offsets) != len(counts) or len(counts) > 1 << 16 or counts.sum(dtype=np.float64) > COARSE_BYTES:
        return
    for at, n in zip(offsets.tolist(), counts.tolist(), strict=True):
        if at < 1 << 62:  # beyond, a damaged number that no file system takes
            yield os.pread(file.fileno(), n, at)
