"""Which slides there are, and what is known of them: ids, paths, mpp, patients, labels, splits.

In: a folder of slides, or one CSV (manifest or labels). Out: validated entries, or one error that lists every wrong row
with its column. Nothing is dropped in silence: files that are no slides, slides without label and labels without slide
are all returned to be listed. Knows nothing of pixels.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from extract.formats import OPENSLIDE_SUFFIXES, SUFFIXES
from pipeline import store
from pipeline.label_rows import CohortError, some
from pipeline.label_table import read_rows


@dataclass(frozen=True)
class SlideEntry:
    """One slide file. id: path relative to the cohort's folder, suffix kept, with `/` between folders."""

    id: str
    path: Path
    mpp: float | None = None
    regions: Path | None = None


@dataclass(frozen=True)
class Listing:
    """Slides of a folder or manifest. others: files that are no slides this program reads."""

    slides: list[SlideEntry]
    others: list[Path] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------- folders


def list_slides(source: Path, plain_images: bool = False) -> Listing:
    """Every slide below a folder, one slide file, or the slides of a manifest CSV. Raises CohortError.

    plain_images: PNG and JPEG files of a folder count as slides too (they carry no mpp, so one must be given)."""
    if not source.exists():
        raise CohortError(f"{source} does not exist; give a folder with slides, a slide, or a manifest CSV")
    if source.is_file() and source.suffix.lower() == ".csv":
        return _from_manifest(source)
    if source.is_file():
        return Listing([SlideEntry(source.name, source.resolve())])
    suffixes = SUFFIXES if plain_images else OPENSLIDE_SUFFIXES
    slides, others = _walk(source, suffixes)
    if not slides:
        found = f"; it holds {len(others)} other files ({some(others)})" if others else "; it is empty"
        raise CohortError(f"no slides in {source}{found}. Slides are files ending in {' '.join(sorted(suffixes))}")
    return Listing(slides, others)


def _walk(root: Path, suffixes: frozenset[str]) -> tuple[list[SlideEntry], list[Path]]:
    slides: list[SlideEntry] = []
    others: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path, prefix: str) -> None:
        info = folder.stat()
        if (info.st_dev, info.st_ino) in seen:
            return  # a symbolic link back to a folder above
        seen.add((info.st_dev, info.st_ino))
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
        companions = {Path(e.name).stem for e in entries if e.name.lower().endswith(".mrxs")}
        dicom = [e for e in entries if e.name.lower().endswith(".dcm") and e.is_file()]
        if dicom and prefix:
            # a DICOM slide is a folder of instances: OpenSlide opens any one and finds the others
            slides.append(SlideEntry(prefix.removesuffix("/"), Path(dicom[0].path).absolute()))
        for e in entries:
            if e.name.startswith("."):
                continue
            suffix = Path(e.name).suffix.lower()
            if suffix in suffixes and suffix != ".dcm":
                slides.append(SlideEntry(prefix + e.name, Path(e.path).absolute()))
            elif e.is_dir():
                if e.name not in companions:
                    visit(Path(e.path), f"{prefix}{e.name}/")
            elif suffix == ".dcm" and not prefix:
                slides.append(SlideEntry(e.name, Path(e.path).absolute()))
            elif suffix != ".dcm":
                others.append(Path(e.path))

    visit(root, "")
    return slides, others


def _from_manifest(source: Path) -> Listing:
    rows = read_rows(source)
    base = source.resolve().parent
    slides = []
    for row in rows:
        path = Path(row.slide)
        full = path if path.is_absolute() else base / path
        slide_id = path.relative_to(base).as_posix() if path.is_absolute() and path.is_relative_to(base) else None
        slide_id = slide_id or (path.name if path.is_absolute() or ".." in path.parts else path.as_posix())
        regions = base / row.regions if row.regions else None
        slides.append(SlideEntry(slide_id, full, row.mpp, regions))
    twice = [i for i, n in Counter(s.id for s in slides).items() if n > 1]
    if twice:
        raise CohortError(f"{source}: several slides would get the id {some(twice)}; keep them below the CSV's folder")
    return Listing(slides)


# ---------------------------------------------------------------------------------------------- the work folder's list


def remember(work: store.Work, slides: list[SlideEntry]) -> list[SlideEntry]:
    """Add `slides` to the work folder's cohort.csv, where the later verbs find them. Returns the whole cohort.

    Raises CohortError when an id already stands for another file."""
    known = {s.id: s for s in read_cohort(work)} if work.cohort.exists() else {}
    for slide in slides:
        old = known.get(slide.id)
        if old is not None and old.path != slide.path and old.path.exists():
            raise CohortError(
                f"slide id {slide.id} stands for {old.path} in {work.cohort}, not for {slide.path}; "
                "use another --work folder, or tile a common parent folder so that the ids differ"
            )
        known[slide.id] = slide
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", "path", "mpp", "regions"])
    for _, slide in sorted(known.items()):
        writer.writerow([slide.id, slide.path, "" if slide.mpp is None else repr(slide.mpp), slide.regions or ""])
    if not work.cohort.exists() or work.cohort.read_text() != text.getvalue():
        store.write_atomic(work.cohort, text.getvalue())
    return list(known.values())


def read_cohort(work: store.Work) -> list[SlideEntry]:
    """The slides that `tile` has seen in this work folder. Raises CohortError when there are none."""
    try:
        with open(work.cohort, newline="") as f:
            return [
                SlideEntry(
                    r["slide"],
                    Path(r["path"]),
                    float(r["mpp"]) if r["mpp"] else None,
                    Path(r["regions"]) if r.get("regions") else None,
                )
                for r in csv.DictReader(f)
            ]
    except FileNotFoundError as error:
        raise CohortError(
            f"{work.root} holds no tiled cohort; run `pipeline tile SLIDES --work {work.root}` first"
        ) from error
