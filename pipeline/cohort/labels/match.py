"""Which row is whose: names of slides in a table matched with the slides, or features, that are there.

In: rows (or names) and slide ids. Out: pairs, and what is left over on both sides. One rule for every command: names
are compared whole, character by character (Unicode composed), and only the suffixes of known slide and feature files
come off, in any case and on both sides. `B1` never takes `B1.1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mhim.extract.slide.formats import SUFFIXES
from mhim.pipeline.cohort import tcga
from mhim.pipeline.cohort.labels.rows import CohortError, Row, same, some
from mhim.pipeline.cohort.slides import read_cohort
from mhim.pipeline.store import layout

# Slides that others convert or extract and that are not read here, and the files that features come in.
_OTHERS = (".isyntax", ".vsi", ".qptiff", ".btf", ".kfb", ".sdpc", ".mds", ".tmap", ".afi", ".lif", ".jp2", ".dicom")
_FEATURES = (".h5", ".hdf5", ".pt", ".npy", ".zarr")
_KNOWN = tuple(sorted({*(f".ome{s}" for s in (".tif", ".tiff", ".btf", ".zarr")), *SUFFIXES, *_OTHERS, *_FEATURES},
                      key=len, reverse=True))  # fmt: skip


@dataclass(frozen=True)
class Matched:
    """Rows with their slide ids, slides that no row names, rows whose slide is not there, and what is to be told."""

    rows: list[tuple[Row, str]]
    without_row: list[str]
    without_slide: list[Row]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Name:
    """A slide's name in parts: folders, stem, and the known suffix in small letters (empty without one)."""

    folders: tuple[str, ...]
    stem: str
    suffix: str
    whole: str
    anywhere: bool  # a path from the root, or relative to somewhere: its folders are not those of the cohort

    @classmethod
    def of(cls, text: str) -> _Name:
        whole = same(text)
        path = whole.replace("\\", "/") if "/" not in whole else whole  # written on Windows
        anywhere = path.startswith(("/", "./", "../")) or path[1:3] == ":/"
        parts = tuple(p for p in path.split("/") if p not in ("", ".", ".."))
        name = parts[-1] if parts else path
        stem = without_suffix(name)
        return cls(parts[:-1], stem, name[len(stem) :].lower(), whole, anywhere)


def without_suffix(name: str) -> str:
    """A file's name without the suffix of a known slide or feature file, in any case; all other points stay."""
    low = name.lower()
    cut = next((s for s in _KNOWN if low.endswith(s) and len(low) > len(s)), "")
    return name[: len(name) - len(cut)]


class Finder:
    """The slides that are there, to be found by the names that people write. ids: unique."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.by_stem: dict[str, list[tuple[_Name, str]]] = {}
        for i in ids:
            name = _Name.of(i)
            self.by_stem.setdefault(name.stem, []).append((name, i))

    def find(self, text: str) -> tuple[int, list[str]]:
        """How far the best fit is from being exact (0), and the ids that fit so well; none at all: no ids."""
        name = _Name.of(text)
        ranked: dict[int, list[str]] = {}
        for other, i in self.by_stem.get(name.stem, ()):
            rank = _rank(name, other)
            if rank is not None:
                ranked.setdefault(rank, []).append(i)
        return min(ranked.items(), default=(0, []))


_OTHER_SUFFIX = 6  # from here on, the file that is there is another one of the same name


def _rank(name: _Name, other: _Name) -> int | None:
    """How exactly two names of one stem fit; None: not at all. 0 is the id itself."""
    if name.whole == other.whole:
        return 0
    short, long = sorted((name.folders, other.folders), key=len)
    if name.folders == other.folders:
        place = 1
    elif not short or long[-len(short) :] == short:
        place = 2  # one is the end of the other: a path as seen from another folder
    elif name.anywhere:
        place = 3
    else:
        return None
    if name.suffix == other.suffix:
        return place
    if not name.suffix or not other.suffix:
        return place + 3
    return place + _OTHER_SUFFIX


def match(rows: Iterable[Row], slide_ids: Iterable[str]) -> Matched:
    """Match rows to slides. A row that names a TCGA patient takes all slides of that patient.

    A slide of another suffix (`a.svs` where only `a.tif` is there, a converted file) is taken where nothing fits better
    and no other row names it, and told. Raises CohortError when a name fits several slides or two rows fit one."""
    ids = list(slide_ids)
    finder = Finder(ids)
    taken: dict[str, Row] = {}
    pairs: list[tuple[Row, str]] = []
    lost: list[Row] = []
    others: list[tuple[Row, list[str]]] = []
    for row in of_patients(rows, ids):
        rank, hits = finder.find(row.slide)
        if not hits:
            lost.append(row)
        elif rank > _OTHER_SUFFIX:
            others.append((row, hits))
        else:
            _take(row, hits, taken, pairs)
    told: list[str] = []
    for row, hits in others:
        free = [i for i in hits if i not in taken or taken[i] is row]
        if len(free) == 1:
            _take(row, free, taken, pairs)
            told.append(f"{row.slide} (row {row.number}) is {free[0]}")
        else:
            lost.append(row)
    pairs.sort(key=lambda pair: pair[0].number)
    free = [i for i in ids if i not in taken]
    notes = (f"rows take files of another suffix: {some(told, 3)}",) if told else ()
    return Matched(pairs, free, lost, (*notes, *_almost(lost, free)))


def _almost(lost: Sequence[Row], free: Sequence[str]) -> list[str]:
    """Rows without slide that would have one if capitals were small letters, or numbers had no zeros in front: a line
    that says so, as they may be meant and may be two slides."""
    ways: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("capital letters", str.casefold),
        ("zeros in front, which a spreadsheet drops unless its cells are text,", _without_zeros),
    )
    told = []
    for differ, plain in ways if lost else ():
        finder = Finder(dict.fromkeys(plain(i) for i in free))
        whole = {plain(i): i for i in free}
        near = [(row, finder.find(plain(row.slide))[1]) for row in lost]
        pairs = [f"{row.slide} (row {row.number}) and {whole[hits[0]]}" for row, hits in near if len(hits) == 1]
        told += [f"names that differ in {differ} are not taken for one: {some(pairs, 3)}"] if pairs else []
    return told


def _without_zeros(name: str) -> str:
    """A name whose numbers have no zeros in front."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", name)


def _take(row: Row, hits: list[str], taken: dict[str, Row], pairs: list[tuple[Row, str]]) -> None:
    if len(hits) > 1:
        raise CohortError(f"row {row.number}, column slide: {row.slide!r} fits {some(hits)}; write the whole id")
    other = taken.setdefault(hits[0], row)
    if other is not row:
        raise CohortError(
            f"row {row.number}, column slide: {row.slide!r} is the slide of row {other.number} already ({hits[0]})"
        )
    pairs.append((row, hits[0]))


def files_of(names: Iterable[str], ids: Iterable[str]) -> dict[str, str]:
    """Name -> the one id that it fits, by the rule of `match`: features of other programs and the slides at hand.

    What fits none, or several equally well, is left out."""
    finder = Finder(ids)
    found = {name: finder.find(name)[1] for name in names}
    return {name: hits[0] for name, hits in found.items() if len(hits) == 1}


def of_patients(rows: Iterable[Row], slides: Sequence[str]) -> list[Row]:
    """Rows that name a TCGA patient, one per slide of that patient; all other rows as they are."""
    of: dict[str, list[str]] = {}
    for slide in sorted(slides):
        if tcga.is_slide(slide):
            of.setdefault(tcga.patient(slide) or "", []).append(slide)
    made: list[Row] = []
    for row in rows:
        made += [replace(row, slide=s) for s in of[row.slide]] if row.slide in of else [row]
    return made


def by_barcode(rows: Iterable[Row], slides: Sequence[str]) -> list[Row]:
    """Rows for the TCGA slides that `rows` do not name: whose they are, and nothing else. Their number is 0."""
    return [
        Row(0, slide, patient)
        for slide in match(rows, slides).without_row
        if tcga.is_slide(slide) and (patient := tcga.patient(slide))
    ]


class NoLabels(CohortError):
    """None are given, and none lie where they are looked for."""


def find_labels(given: Path | None, work: layout.Work, features: Path | None = None) -> Path:
    """The labels CSV: as given, or labels.csv beside the `features` (bags from a table bring theirs along), in the work
    folder or beside the slides. Raises NoLabels; CohortError where cohort.csv does not tell where the slides are."""
    if given is not None:
        return given
    if features is not None and (features / "labels.csv").is_file():
        return features / "labels.csv"
    places = [work.root]
    if work.cohort.exists():
        roots = {s.root for s in read_cohort(work)}
        places += sorted(roots) + sorted({r.parent for r in roots})
    return _labels_in(places)


def labels_beside(source: Path, work: layout.Work) -> Path:
    """As `find_labels`, before anything is tiled: of a folder of slides, one slide, or a manifest."""
    root = source.resolve() if source.is_dir() else source.resolve().parent
    return _labels_in([work.root, root, root.parent])


def _labels_in(places: Sequence[Path]) -> Path:
    for place in places:
        if (place / "labels.csv").is_file():
            return place / "labels.csv"
    looked = ", ".join(str(p) for p in dict.fromkeys(places))
    raise NoLabels(
        f"no labels.csv in {looked}; give one with --labels (columns slide, patient, label or time and event)"
    )
