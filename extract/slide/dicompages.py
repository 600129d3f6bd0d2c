"""The levels of a DICOM slide as pages: sizes, compression, and where each frame's bytes lie.

In: a file or folder of one series. Out: a `tiffpages.Page` for each VOLUME image of it. Only what lies as a TIFF's
tiles do: all frames there, row by row, one fragment each (TILED_FULL; one focal plane, one optical path). Everything
else is refused with ValueError. Reads headers and tables of offsets; decodes nothing.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mhim.extract import UnreadableSlide
from mhim.extract.slide import dicom
from mhim.extract.slide.tiffpages import Page

_TAGS = {
    "dimensions": 0x00209311, "samples": 0x00280002, "colours": 0x00280004, "frames": 0x00280008, "rows": 0x00280010,
    "columns": 0x00280011, "bits": 0x00280100, "offsets": 0x7FE00001, "lengths": 0x7FE00002,
}  # fmt: skip
_PIXELS = 0x7FE00010
_CODECS = {"1.2.840.10008.1.2.4.50": 7, "1.2.840.10008.1.2.4.90": 34712, "1.2.840.10008.1.2.4.91": 34712}  # as TIFF's
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def level_pages(path: Path) -> list[Page]:
    """The series' levels, largest first. Raises ValueError, with the reason."""
    try:
        opened = dicom.read(dicom.to_open(path))
        assert opened is not None
        found = (dicom.read(p) for p in dicom.candidates(opened.path.parent))
        same = [i for i in found if i is not None and (i.series, i.image) == (opened.series, "VOLUME")]
    except UnreadableSlide as error:
        raise ValueError(str(error)) from error
    return [_page(n, i) for n, i in enumerate(sorted(same, key=lambda i: i.size, reverse=True))]


def _page(index: int, instance: dicom.Instance) -> Page:
    from pydicom.filereader import read_partial

    with open(instance.path, "rb") as file:
        tags: list[Any] = list(_TAGS.values())
        try:
            found = read_partial(file, stop_when=lambda tag, vr, length: tag >= _PIXELS, specific_tags=tags)
        except Exception as error:  # a damaged header raises whatever the value at hand does
            raise ValueError(f"its DICOM header cannot be read ({type(error).__name__}: {error})") from error
        told = {name: found[tag].value if tag in found else None for name, tag in _TAGS.items()}
        w, h = instance.size
        tw, th, frames = (int(told[name] or 0) for name in ("columns", "rows", "frames"))
        if told["dimensions"] != "TILED_FULL" or not tw or not th or frames != -(-w // tw) * -(-h // th):
            raise ValueError(f"its {frames} DICOM frames are not one plane of tiles, row by row")
        codec = _CODECS.get(str(found.file_meta.get("TransferSyntaxUID", "")), 0)
        if not codec:
            raise ValueError("its DICOM frames are neither baseline JPEG nor JPEG 2000")
        offsets, counts = _encapsulated(file, frames, told["offsets"], told["lengths"])
    ycc = str(told["colours"]).startswith("YBR") and codec == 7
    return Page(
        index, index > 0, w, h, 1, tw, th, np.dtype(np.uint8) if told["bits"] == 8 else None, int(told["samples"] or 0),
        1, codec, 6 if ycc else 2, b"", offsets, counts, path=instance.path,
    )  # fmt: skip


def _encapsulated(file: BinaryIO, frames: int, offsets: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
    """int64 (frames,) each: where each frame's bytes lie in the file, and how many. The file stands at PixelData."""
    head = file.read(12)
    if len(head) < 12 or head[:4] != b"\xe0\x7f\x10\x00" or head[8:] != b"\xff" * 4:
        raise ValueError("its DICOM pixel data are not encapsulated")
    table = _item(file)
    basic = np.frombuffer(file.read(table), "<u4").astype(np.int64)
    first = file.tell()
    if offsets and lengths:  # the extended table: no padding counts
        at, count = (np.frombuffer(v, "<u8").astype(np.int64) for v in (offsets, lengths))
    elif len(basic):  # from one frame to the next, with its padding, which decoders pass over
        file.seek(first + int(basic[-1]))
        at, count = basic, np.append(np.diff(basic) - 8, _item(file))
    else:
        at, count = _walked(file, first)
    if len(at) != frames or len(count) != frames or (count < 0).any():
        raise ValueError(f"its table names {len(at)} DICOM fragments for {frames} frames")
    return at + first + 8, count


def _walked(file: BinaryIO, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The fragments one after the other, where no table tells them."""
    at, count, size = [], [], os.fstat(file.fileno()).st_size
    here = first
    while here + 8 <= size:
        file.seek(here)
        length = _item(file)
        if length < 0:
            break
        at.append(here - first)
        count.append(length)
        here += 8 + length
    return np.array(at, np.int64), np.array(count, np.int64)


def _item(file: BinaryIO) -> int:
    """The length of the item that begins here; -1 at the end of the sequence."""
    head = file.read(8)
    if head[:4] == _END:
        return -1
    if len(head) < 8 or head[:4] != _ITEM:
        raise ValueError("its DICOM fragments are cut off")
    return int(struct.unpack("<I", head[4:])[0])
