"""Which slides there are, and what is known of them: ids, paths, mpp, patients, labels, splits.

In: a folder of slides, or one CSV (manifest or labels). Out: validated entries, or one error that lists every wrong row
with its column. Nothing is dropped in silence: files that are no slides, slides without label and labels without slide
are all returned to be listed. Knows nothing of pixels.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from extract.formats import OPENSLIDE_SUFFIXES, SUFFIXES
from pipeline import store

COLUMNS = {
    "slide": "path or id of a slide (required)",
    "patient": "patient id; default: the slide itself",
    "label": "class of the patient",
    "time": "survival time",
    "event": "1 if the event happened at `time`, 0 if censored",
    "mpp": "µm per px of level 0",
    "split": "train, val or test",
    "fold": "number of the test fold",
    "site": "where the slide comes from",
    "regions": "QuPath GeoJSON of regions to include or exclude",
}


class CohortError(ValueError):
    """Something is wrong with the folder or CSV; the message names every row and column, and what to do."""


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


@dataclass(frozen=True)
class Row:
    """One labelled slide as the CSV gives it. number: line in the file as an editor counts it."""

    number: int
    slide: str
    patient: str
    label: str | None = None
    time: float | None = None
    event: int | None = None
    mpp: float | None = None
    split: str | None = None
    fold: int | None = None
    site: str | None = None
    regions: str | None = None


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
        found = f"; it holds {len(others)} other files ({_some(others)})" if others else "; it is empty"
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
        raise CohortError(f"{source}: several slides would get the id {_some(twice)}; keep them below the CSV's folder")
    return Listing(slides)


# ---------------------------------------------------------------------------------------------- CSV


def read_rows(path: Path) -> list[Row]:
    """All rows of a manifest or labels CSV. Raises CohortError naming every wrong row and column (at most 20)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CohortError(f"no such file: {path}") from error
    except (UnicodeDecodeError, IsADirectoryError, PermissionError) as error:
        raise CohortError(f"{path} cannot be read as a UTF-8 CSV: {error}") from error
    from pipeline import published

    reader = csv.DictReader(io.StringIO(published.translate(text)))
    header = [h.strip() for h in reader.fieldnames or []]
    reader.fieldnames = header
    unknown = [h for h in header if h not in COLUMNS]
    if "slide" not in header or unknown:
        what = f"unknown column {_some(unknown)}" if unknown else "no column `slide`"
        raise CohortError(f"{path}: {what}. Columns: {', '.join(f'{k} ({v})' for k, v in COLUMNS.items())}")
    if ("time" in header) != ("event" in header):
        raise CohortError(f"{path}: `time` and `event` belong together; one of the two columns is missing")
    rows: list[Row] = []
    wrong: list[str] = []
    for raw in reader:
        if None in raw or any(v is None for v in raw.values()):
            wrong.append(f"row {reader.line_num}: it has not as many fields as the header")
            continue
        cells = {k: v.strip() for k, v in raw.items()}
        if not any(cells.values()):
            continue
        try:
            rows.append(_row(reader.line_num, cells))
        except ValueError as error:
            wrong.append(f"row {reader.line_num}, {error}")
    wrong += _contradictions(rows)
    if wrong:
        more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CohortError(f"{path}:\n  " + "\n  ".join(wrong[:20]) + more)
    if not rows:
        raise CohortError(f"{path} has no rows")
    return rows


def _row(number: int, cells: dict[str, str]) -> Row:
    def number_of(column: str, low: float) -> float | None:
        text = cells.get(column, "")
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"column {column}: {text!r} is not a number") from None
        if not math.isfinite(value) or value < low:
            raise ValueError(f"column {column}: {text!r} must be a number of at least {low:g}")
        return value

    if not cells["slide"]:
        raise ValueError("column slide: it is empty")
    mpp = number_of("mpp", 0.0)
    if mpp == 0:
        raise ValueError("column mpp: it must be above 0")
    event = cells.get("event", "")
    if event not in ("", "0", "1"):
        raise ValueError(f"column event: {event!r} must be 0 or 1")
    fold = cells.get("fold", "")
    if fold and not fold.isdigit():
        raise ValueError(f"column fold: {fold!r} must be a whole number from 0")
    split = cells.get("split", "")
    if split not in ("", "train", "val", "test"):
        raise ValueError(f"column split: {split!r} must be train, val or test")
    time = number_of("time", 0.0)
    if (time is None) != (event == ""):
        raise ValueError("columns time and event: give both or none")
    return Row(
        number=number,
        slide=cells["slide"],
        patient=cells.get("patient") or cells["slide"],
        label=cells.get("label") or None,
        time=time,
        event=int(event) if event else None,
        mpp=mpp,
        split=split or None,
        fold=int(fold) if fold else None,
        site=cells.get("site") or None,
        regions=cells.get("regions") or None,
    )


def _contradictions(rows: list[Row]) -> list[str]:
    """Slides named twice, and patients whose rows disagree."""
    wrong = []
    first_slide: dict[str, Row] = {}
    first_patient: dict[str, Row] = {}
    for row in rows:
        other = first_slide.setdefault(row.slide, row)
        if other is not row:
            wrong.append(f"row {row.number}, column slide: {row.slide!r} stands in row {other.number} already")
        patient = first_patient.setdefault(row.patient, row)
        for column in ("label", "time", "event", "split", "fold"):
            a, b = getattr(patient, column), getattr(row, column)
            if a != b:
                wrong.append(
                    f"row {row.number}, column {column}: patient {row.patient!r} has {b!r} here "
                    f"and {a!r} in row {patient.number}"
                )
    return wrong


@dataclass(frozen=True)
class Matched:
    """Rows with their slide ids, slides that no row names, and rows whose slide is not there."""

    rows: list[tuple[Row, str]]
    without_row: list[str]
    without_slide: list[Row]


def match(rows: Iterable[Row], slide_ids: Iterable[str]) -> Matched:
    """Match rows to slides exactly: by id, id without suffix, file name, or file name without suffix, never by a part.

    Raises CohortError when a name fits several slides or two rows fit one slide."""
    ids = list(slide_ids)
    forms: list[dict[str, list[str]]] = []
    for form in (str, _stem, lambda i: Path(i).name, lambda i: Path(i).stem):
        table: dict[str, list[str]] = {}
        for i in ids:
            table.setdefault(form(i), []).append(i)
        forms.append(table)
    known = set(ids)
    matched: list[tuple[Row, str]] = []
    lost: list[Row] = []
    taken: dict[str, Row] = {}
    for row in rows:
        hits = next((t[row.slide] for t in forms if row.slide in t), [])
        if not hits and (Path(row.slide).is_absolute() or row.slide.startswith(("./", "../"))):
            hits = forms[2].get(Path(row.slide).name, [])
        elif not hits and "/" in row.slide:
            # a path as seen from the CSV's folder: its tail may be the id
            parts = Path(row.slide).parts
            hits = next(([t] for k in range(1, len(parts)) if (t := "/".join(parts[k:])) in known), [])
        if len(hits) > 1:
            raise CohortError(f"row {row.number}, column slide: {row.slide!r} fits {_some(hits)}; write the whole id")
        if not hits:
            lost.append(row)
            continue
        if hits[0] in taken:
            raise CohortError(
                f"row {row.number}, column slide: {row.slide!r} is the slide of row {taken[hits[0]].number} "
                f"already ({hits[0]})"
            )
        taken[hits[0]] = row
        matched.append((row, hits[0]))
    return Matched(matched, [i for i in ids if i not in taken], lost)


def _stem(slide_id: str) -> str:
    return Path(slide_id).with_suffix("").as_posix()


def find_labels(given: Path | None, work: store.Work) -> Path:
    """The labels CSV: as given, or labels.csv beside the slides or in the work folder. Raises CohortError."""
    if given is not None:
        return given
    places = [work.root]
    if work.cohort.exists():
        roots = {s.path.parents[len(Path(s.id).parts) - 1] for s in read_cohort(work)}
        places += sorted(roots) + sorted({r.parent for r in roots})
    for place in places:
        if (place / "labels.csv").is_file():
            return place / "labels.csv"
    looked = ", ".join(str(p) for p in places)
    raise CohortError(
        f"no labels.csv in {looked}; give one with --labels (columns slide, patient, label or time and event)"
    )


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


def _some(things: Iterable[object], most: int = 5) -> str:
    listed = [str(t) for t in things]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
