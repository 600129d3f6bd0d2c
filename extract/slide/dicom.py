"""DICOM: which files are images of one slide, told by their headers alone.

In: paths of files, or of a folder. Out: the slides in them (a slide is a series with VOLUME images) with the file to
open for each, and what the other files are. Reads the first kilobytes of each file, up to the size of its image; pixels
are OpenSlide's work. Knows nothing of cohorts and ids.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mhim.extract import UnreadableSlide
from mhim.extract.slide.formats import may_be_dicom, suffix

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # a data set that is compressed as a whole; no slide scanner writes it
_TAGS = {
    "image_type": 0x00080008, "class": 0x00080016, "uid": 0x00080018, "series": 0x0020000E, "samples": 0x00280002,
    "colours": 0x00280004, "columns": 0x00480006, "rows": 0x00480007,
}  # fmt: skip
_HEAD = 32 << 10  # bytes that hold nearly every header up to the size of the image
_AT_ONCE = 16  # files read side by side: on a shared file system each waits for the network, not for a core
_BATCH = 1024  # heads kept at a time: 32 MiB


@dataclass(frozen=True)
class Instance:
    """One DICOM file. image: VOLUME, LABEL, OVERVIEW or THUMBNAIL where it belongs to a whole-slide image, else "".
    what: the name of its class. series: SeriesInstanceUID, uid: SOPInstanceUID (both "" for objects without them).
    size: (w, h) of the whole image, px. colours: its samples per pixel and what they are, as 1 MONOCHROME2."""

    path: Path
    series: str
    uid: str
    image: str
    what: str
    size: tuple[int, int] = (0, 0)
    colours: str = ""

    def no_slide(self) -> str:
        """Why this file alone makes no slide."""
        if self.image:
            return f"a DICOM image of a slide's {self.image.lower()}, whose series has no VOLUME image: no slide"
        return f"a DICOM object of another kind ({self.what}): no slide"


@dataclass(frozen=True)
class Found:
    """What some files of one folder are.

    slides: series -> its largest VOLUME image, the one to open: a slide whose finest level is damaged then fails rather
    than go on without it, and names of files count nowhere. others: no slides, and what they are. broken: why they
    cannot be read. not_dicom: files that only have a name like one."""

    slides: dict[str, Instance] = field(default_factory=dict)
    others: dict[Path, str] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)
    not_dicom: list[Path] = field(default_factory=list)


def read(path: Path) -> Instance | None:
    """The header of one file; None for a file without DICOM's magic and without its suffix. Raises UnreadableSlide."""
    return _parsed(path, _head(path))


def _head(path: Path) -> bytes | OSError:
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        return error


def _parsed(path: Path, head: bytes | OSError) -> Instance | None:
    """What `read` says, from the first bytes of a file."""
    if isinstance(head, OSError):
        raise UnreadableSlide(f"{path.name}: cannot be read: {head.strerror or head}") from head
    if head[128:132] != b"DICM":
        if suffix(path) != ".dcm":
            return None
        raise UnreadableSlide(f"{path.name} is no DICOM file: the file is damaged, or its suffix is wrong")
    if _DEFLATED in head[:1024]:
        raise UnreadableSlide(f"{path.name} is a DICOM file that is deflated as a whole: inflate it")
    values = _tags(path.name, io.BytesIO(head))
    if len(head) == _HEAD and not values["rows"]:  # a long header, or one without an image
        with open(path, "rb") as file:
            values = _tags(path.name, file)
    return _instance(path, values)


def _tags(name: str, file: BinaryIO) -> dict[str, Any]:
    """The values of `_TAGS`, "" where one is missing; `class` also from the group that precedes the data set."""
    from pydicom import config
    from pydicom.filereader import read_partial

    config.settings.reading_validation_mode = config.IGNORE  # what matters is judged here, and told once
    try:
        last, wanted = max(_TAGS.values()), list(_TAGS.values())
        found = read_partial(file, stop_when=lambda tag, vr, length: tag > last, specific_tags=wanted)
        values = {key: found[tag].value if tag in found else "" for key, tag in _TAGS.items()}
        return values | {"class": values["class"] or found.file_meta.get("MediaStorageSOPClassUID", "")}
    except Exception as error:  # a damaged header raises whatever the value at hand does: struct, Key, Value, EOF ...
        raise UnreadableSlide(
            f"{name}: its DICOM header cannot be read ({type(error).__name__}: {error}): the file is damaged"
        ) from error


def _instance(path: Path, values: dict[str, Any]) -> Instance:
    from pydicom.uid import UID

    kind, series, uid = (str(values[t] or "") for t in ("class", "series", "uid"))
    name = str(UID(kind).name).removesuffix(" Storage") or "of no class"
    if kind != WHOLE_SLIDE:
        return Instance(path, series, uid, "", name)
    # it names an id, a folder of the work folder: only what the standard allows may come from a file
    if not re.fullmatch(r"\d+(\.\d+)*", series, re.ASCII) or len(series) > 64:
        raise UnreadableSlide(f"{path.name}: its DICOM SeriesInstanceUID is {series[:80]!r}: the file is damaged")
    w, h = values["columns"], values["rows"]
    if not (isinstance(w, int) and isinstance(h, int) and w > 0 and h > 0):
        raise UnreadableSlide(f"{path.name}: its DICOM header ends before the size of the image: the file is truncated")
    types = values["image_type"]
    words = [types] if isinstance(types, str) else [str(t) for t in types]
    image = words[2] if len(words) > 2 and words[2] else "UNKNOWN"
    return Instance(path, series, uid, image, name, (w, h), f"{values['samples']} {values['colours']}")


def survey(folders: Sequence[Sequence[Path]]) -> list[Found]:
    """What the files of each folder are, their first bytes read side by side. Damaged files are told, never raised."""
    paths = [path for files in folders for path in files]
    told: list[tuple[Path, Instance | str | None]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(paths), _BATCH):
            batch = paths[start : start + _BATCH]
            # waiting in threads, parsing in one: parsers side by side wait for the interpreter, ten times as long
            heads = zip(batch, pool.map(_head, batch), strict=True)
            told += [(path, _parsed_or_why(path, head)) for path, head in heads]
    each = iter(told)
    return [_sorted([next(each) for _ in files]) for files in folders]


def _parsed_or_why(path: Path, head: bytes | OSError) -> Instance | str | None:
    try:
        return _parsed(path, head)
    except UnreadableSlide as error:
        return str(error)


def _sorted(files: Iterable[tuple[Path, Instance | str | None]]) -> Found:
    found = Found()
    instances = []
    for path, told in files:
        if told is None:
            found.not_dicom.append(path)
        elif isinstance(told, str):
            found.broken[path] = told
        else:
            instances.append(told)
    for one in instances:
        if one.image == "VOLUME":
            best = found.slides.get(one.series)
            if best is None or (*one.size, one.uid) > (*best.size, best.uid):
                found.slides[one.series] = one
    found.others.update({i.path: i.no_slide() for i in instances if not i.image or i.series not in found.slides})
    return found


def look_into(folder: Path) -> Found:
    """What the DICOM files that lie right in `folder` are."""
    return survey([candidates(folder)])[0]


def candidates(folder: Path) -> list[Path]:
    """The files right in `folder` whose name may be that of a DICOM file, by name."""
    with os.scandir(folder) as entries:
        some = (e for e in entries if may_be_dicom(Path(e.name)) and not e.name.startswith("."))
        return sorted(Path(e.path) for e in some if e.is_file())


def to_open(path: Path) -> Path:
    """The file that OpenSlide is to open for `path`, a folder or a file. Raises UnreadableSlide where that is no slide,
    or a folder of several."""
    if not path.is_dir():
        one = read(path) if may_be_dicom(path) else None
        if one is not None and not one.image:
            raise UnreadableSlide(f"{path.name} is {one.no_slide()}")
        return path
    found = look_into(path)
    if len(found.slides) == 1:
        return next(iter(found.slides.values())).path
    raise UnreadableSlide(f"{path.name} {why_not_one(found, path.name)}")


def why_not_one(found: Found, folder: str) -> str:
    """Why a folder is not one slide, to be read after its name; tells what to write instead."""
    if found.slides:
        names = ", ".join(f"{folder}/{series}.dcm" for series in sorted(found.slides))
        return f"is a folder of {len(found.slides)} DICOM series, each a slide: name one of them ({names})"
    if found.broken:
        return "is a folder of damaged DICOM files: " + next(iter(found.broken.values()))
    if found.others:
        name, what = next(iter(found.others.items()))
        return f"is a folder without a slide: {name.name} is {what}"
    return "is a folder without .dcm files, not a slide"
