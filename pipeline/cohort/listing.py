"""Which files are slides: a folder walked, or the rows of a manifest looked up; and the ids they get.

In: a folder, or rows that name files. Out: one entry per slide, and every file that is none, with what it is. Damage of
one file is that entry's failure, told when it is made. Opens DICOM headers only; knows nothing of labels.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mhim.extract.slide.formats import SUFFIXES, may_be_dicom
from mhim.pipeline.store.names import free, readable

if TYPE_CHECKING:
    from mhim.extract.slide.dicom import Found
    from mhim.pipeline.cohort.labels.rows import Row


@dataclass(frozen=True)
class SlideEntry:
    """One slide. id: path relative to the cohort's folder, suffix kept, with `/` between folders. series: the DICOM
    series that it is, or "". problem: why it cannot be made a slide, where that is known before it is opened."""

    id: str
    path: Path
    mpp: float | None = None
    regions: Path | None = None
    series: str = ""
    problem: str = ""

    @property
    def root(self) -> Path:
        """The folder from which the id counts. A DICOM slide may go by its folder: its file lies one deeper."""
        name = Path(self.id).name
        deeper = bool(self.series) and name == self.path.parent.name
        return self.path.parents[min(len(Path(self.id).parts) - 1 + deeper, len(self.path.parents) - 1)]


@dataclass(frozen=True)
class Listing:
    """Slides of a folder or manifest. others: files that are no slides this program reads; what: what some of them are
    (DICOM objects that are no images), where that is known. notes: to be told."""

    slides: list[SlideEntry]
    others: list[Path] = field(default_factory=list)
    what: Mapping[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class _Dicom:
    """The files of one folder that may be DICOM. prefix: the folder's id with a `/`, or "" for the cohort's own."""

    prefix: str
    files: list[Path]


def walk(root: Path, suffixes: frozenset[str]) -> Listing:
    """Every slide below `root`, folder by folder, by name."""
    listed: list[SlideEntry | _Dicom] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path, prefix: str) -> None:
        info = folder.stat()
        if (info.st_dev, info.st_ino) in seen:
            return  # a symbolic link back to a folder above
        seen.add((info.st_dev, info.st_ino))
        entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
        companions = {Path(e.name).stem for e in entries if e.name.lower().endswith(".mrxs")}
        dicom = _Dicom(prefix, [Path(e.path).absolute() for e in entries if may_be_dicom(Path(e.name)) and e.is_file()])
        if dicom.files:
            listed.append(dicom)
        taken = {p.name for p in dicom.files}
        for e in entries:
            if e.name in taken:
                continue
            suffix = Path(e.name).suffix.lower()
            if suffix in suffixes and suffix != ".dcm":
                listed.append(SlideEntry(prefix + e.name, Path(e.path).absolute()))
            elif e.is_dir():
                if e.name not in companions:
                    visit(Path(e.path), f"{prefix}{e.name}/")
            else:
                others.append(Path(e.path))

    visit(root, "")
    what: dict[Path, str] = {}
    folders = [d for d in listed if isinstance(d, _Dicom)]
    surveyed = _survey([d.files for d in folders])
    found = iter(surveyed)
    slides: list[SlideEntry] = []
    for one in listed:
        if isinstance(one, SlideEntry):
            slides.append(one)
            continue
        here = next(found)
        slides += _of_folder(one, here)
        what |= here.others
        others += [*here.others, *here.not_dicom]
    apart = _in_pieces(surveyed)
    taken = {s.id for s in slides if readable(s.id) == s.id}
    slides = [s if s.id in taken else replace(s, id=free(s.id, taken)) for s in slides]
    return Listing([replace(s, problem=apart.get(s.series, "")) for s in slides], others, what)


def _in_pieces(folders: Sequence[Found]) -> dict[str, str]:
    """Series whose images lie in several folders, and what to do: OpenSlide looks into one, and would take what is
    there for the whole slide. (A copy of a whole series is a slide of its own, which `check` calls the same.)"""
    places: dict[str, dict[str, Path]] = {}  # series -> the finest image in a folder -> that folder
    for found in folders:
        for series, one in found.slides.items():
            places.setdefault(series, {}).setdefault(one.uid, one.path.parent)
    return {
        series: f"the images of DICOM series {series} lie in several folders "
        f"({', '.join(str(p) for p in sorted(by_image.values()))}): put them into one"
        for series, by_image in places.items()
        if len(by_image) > 1
    }


def _survey(folders: Sequence[Sequence[Path]]) -> list[Found]:
    if not folders:
        return []
    from mhim.extract.slide import dicom  # only where there is something to read

    return dicom.survey(folders)


def _of_folder(folder: _Dicom, found: Found) -> list[SlideEntry]:
    """One entry per series. A series that has a folder for itself goes by the folder's name, several by their own UIDs:
    names of files count nowhere, so that renaming them changes no id."""
    whole = folder.prefix.removesuffix("/")
    if whole and not found.slides and found.broken and not found.others:
        return [SlideEntry(whole, next(iter(found.broken)))]  # as a whole the slide that it was meant to be
    alone = whole if len(found.slides) == 1 else ""
    slides = [
        SlideEntry(alone or f"{folder.prefix}{series}.dcm", one.path, series=series)
        for series, one in sorted(found.slides.items())
    ]
    return slides + [SlideEntry(folder.prefix + path.name, path) for path in found.broken]


# ---------------------------------------------------------------------------------------------- manifests


def of_rows(rows: Iterable[Row], source: Path) -> list[SlideEntry]:
    """The slides that the rows of the manifest `source` name; a path that is not absolute counts from its folder."""
    base = source.resolve().parent
    slides = []
    row_of: dict[tuple[Path, str], int] = {}
    for row in rows:
        path = Path(row.slide)
        full = beside(source, row.slide)
        slide_id = path.relative_to(base).as_posix() if path.is_absolute() and path.is_relative_to(base) else None
        slide_id = slide_id or (path.name if path.is_absolute() or ".." in path.parts else path.as_posix())
        regions = beside(source, row.regions) if row.regions else None
        slide = SlideEntry(slide_id, full, row.mpp, regions)
        if may_be_dicom(full) or full.suffix.lower() not in SUFFIXES:
            slide = _dicom_of(slide)
        if slide.series:
            first = row_of.setdefault(_place(slide), row.number)
            if first != row.number:
                why = f"{row.slide} (row {row.number}) is of the same DICOM series as row {first}: keep one of the rows"
                slide = replace(slide, problem=why)
        slides.append(slide)
    return slides


def beside(table: Path, name: str) -> Path:
    """A path that a table names, relative to it; in the spelling (Unicode, separators) under which it is there."""
    base = table.resolve().parent
    spelled = [name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name), name.replace("\\", "/")]
    # not Path.exists, which raises for a name that is too long
    return next((base / s for s in spelled if os.path.exists(base / s)), base / name)


def _dicom_of(slide: SlideEntry) -> SlideEntry:
    """`slide` with its series and the file to open, if its path is a folder, a file of a series, or named as `walk`
    names a series of several (`<folder>/<series>.dcm`)."""
    from mhim.extract import UnreadableSlide
    from mhim.extract.slide import dicom

    path = slide.path
    if path.is_file():
        try:
            one = dicom.read(path)
        except UnreadableSlide:
            return slide  # told when it is opened
        if one is None or not one.image:
            return slide
        found = dicom.look_into(path.parent) if one.image != "VOLUME" else None
        best = found.slides.get(one.series) if found else one
        return replace(slide, path=best.path, series=one.series) if best else slide
    if path.is_dir():
        found = dicom.look_into(path)
        if len(found.slides) != 1:
            return replace(slide, problem=f"{path.name} {dicom.why_not_one(found, path.name)}")
        series, best = next(iter(found.slides.items()))
        return replace(slide, path=best.path, series=series)
    if path.parent.is_dir() and (path.suffix == ".dcm" or path.suffix[1:].isdigit()):
        series = path.name.removesuffix(".dcm")
        best = dicom.look_into(path.parent).slides.get(series)
        return replace(slide, path=best.path, series=series) if best else slide
    return slide


def of_file(path: Path) -> SlideEntry:
    """The one slide that was given as a file."""
    slide = SlideEntry(readable(path.name), path.resolve())
    return _dicom_of(slide) if may_be_dicom(path) else slide


# ---------------------------------------------------------------------------------------------- known before


def settled(listed: Sequence[SlideEntry], known: Sequence[SlideEntry]) -> list[SlideEntry]:
    """`listed` with the ids, and the files to open, that the work folder has known their DICOM series by.

    What a series is called depends on how many lie beside it. One that was tiled keeps its id when others come or go,
    and one file stands for it as long as it is there: nothing is made twice under two names."""
    if not any(s.series for s in listed):
        return list(listed)
    before: dict[tuple[Path, str], list[SlideEntry]] = {}
    for old in map(_with_series, known):
        if old.series:
            before.setdefault(_place(old), []).append(old)
    ids = {s.id for s in known}
    return [_settle(s, before.get(_place(s), []), ids) if s.series else s for s in listed]


def _settle(slide: SlideEntry, before: list[SlideEntry], ids: set[str]) -> SlideEntry:
    if len(before) > 1:  # as versions did that took each file in the given folder for a slide
        names = ", ".join(s.id for s in before[:5])
        why = f"this work folder holds DICOM series {slide.series} several times ({names}): tile it into a fresh --work"
        return replace(slide, problem=slide.problem or why)
    if before:
        there = before[0].path.exists()
        return replace(slide, id=before[0].id, path=before[0].path if there else slide.path)
    folder = slide.id.rpartition("/")[0]
    if folder in ids and slide.id == f"{folder}/{slide.series}.dcm":
        why = (
            f"{folder} was tiled as one slide when it held one DICOM series; {slide.series} has come to it. Move the "
            "files of this series to a folder of their own, or tile into a fresh --work, where each series gets its id"
        )
        return replace(slide, problem=slide.problem or why)
    return slide


def _place(slide: SlideEntry) -> tuple[Path, str]:
    """What makes two entries the same series: the folder of its files, and the UID."""
    return slide.path if slide.path.is_dir() else slide.path.parent, slide.series


def _with_series(slide: SlideEntry) -> SlideEntry:
    """An entry of a work folder that is older than the column `series`, with the series of its file."""
    if slide.series or not (may_be_dicom(slide.path) or slide.path.is_dir()):
        return slide
    return replace(_dicom_of(slide), path=slide.path)
