"""Which slides there are, and what is known of them: ids, paths, mpp, patients, labels, splits.

In: a folder of slides, or one CSV (manifest or labels). Out: validated entries, or one error that lists every wrong row
with its column. Nothing is dropped in silence: files that are no slides, slides without label and labels without slide
are all returned to be listed. Knows nothing of pixels.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mhim.configs.schema import LabelsConfig
from mhim.extract.slide.formats import OPENSLIDE_SUFFIXES, SUFFIXES
from mhim.pipeline.cohort import listing
from mhim.pipeline.cohort.labels.cells import is_table
from mhim.pipeline.cohort.labels.rows import CohortError, some
from mhim.pipeline.cohort.labels.table import read_table
from mhim.pipeline.cohort.listing import Listing, SlideEntry
from mhim.pipeline.resume.claims import alone
from mhim.pipeline.store import ids, layout, names, tables, writing

# ---------------------------------------------------------------------------------------------- folders


def list_slides(
    source: Path, plain_images: bool = False, table: LabelsConfig | None = None, bag: str = "patient"
) -> Listing:
    """Every slide below a folder, one slide file, or the slides of a manifest. Raises CohortError.

    plain_images: PNG and JPEG files of a folder count as slides too (they carry no mpp, so one must be given). table:
    how a manifest is read, where `train.bag` is `bag`."""
    if not source.exists():
        raise CohortError(f"{source} does not exist; give a folder with slides, a slide, or a manifest CSV")
    if source.is_file() and is_table(source):
        found_rows = read_table(source, table, bag=bag)
        slides = listing.of_rows(found_rows.rows, source)
        twice = [i for i, n in Counter(s.id for s in slides).items() if n > 1]
        if twice:
            raise CohortError(f"{source}: several slides would get the id {some(twice)}; keep them below its folder")
        return Listing(slides, notes=found_rows.notes)
    if source.is_file():
        return Listing([listing.of_file(source)])
    suffixes = SUFFIXES if plain_images else OPENSLIDE_SUFFIXES
    found = listing.walk(source, suffixes)
    if not found.slides:
        said = [f"{p} ({found.what[p]})" if p in found.what else str(p) for p in found.others]
        holds = f"; it holds {len(said)} other files ({some(said)})" if said else "; it is empty"
        raise CohortError(f"no slides in {source}{holds}. Slides are files ending in {' '.join(sorted(suffixes))}")
    return found


# ---------------------------------------------------------------------------------------------- the work folder's list


def remember(work: layout.Work, slides: list[SlideEntry]) -> list[SlideEntry]:
    """Add `slides` to the work folder's cohort.csv, where the later verbs find them. Returns the whole cohort.

    The file is read, added to and written under a claim, so that commands side by side lose no row. Raises CohortError
    when an id already stands for another file."""
    known, text = _merged(work, slides)
    if not work.cohort.exists() or work.cohort.read_text() != text:
        with alone(work.root / ".claims", "cohort.csv"):
            known, text = _merged(work, slides)
            writing.write_atomic(work.cohort, text)
    return known


def _merged(work: layout.Work, slides: list[SlideEntry]) -> tuple[list[SlideEntry], str]:
    """The slides of cohort.csv and `slides`, and the text of the file that names them all."""
    known = {s.id: s for s in read_cohort(work)} if work.cohort.exists() else {}
    for slide in slides:
        if slide.problem:
            continue  # it fails, and says why, before anything is made of it
        old = known.get(slide.id)
        if old is not None and _same_file(old.path, slide.path):
            slide = replace(slide, path=old.path)  # another spelling, or a link: the first one stays
        elif old is not None and old.path.exists():
            raise CohortError(
                f"slide id {slide.id} stands for {old.path} in {work.cohort}, not for {slide.path}; "
                "use another --work folder, or tile a common parent folder so that the ids differ"
            )
        known[slide.id] = slide
    text = tables.text_of(
        ("slide", "path", "mpp", "regions", "series"),
        ((s.id, names.of_path(s.path), s.mpp, names.of_path(s.regions), s.series) for _, s in sorted(known.items())),
    )
    return list(known.values()), text


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them is gone
        return False


def _inside(slide: str, work: layout.Work) -> str:
    """The id, unless its outputs would lie outside of the work folder (which may be a stranger's)."""
    if why := ids.leaves_the_folder(slide):
        raise CohortError(f"{work.cohort}: {slide!r} cannot be the id of a slide: {why}")
    return slide


def read_cohort(work: layout.Work) -> list[SlideEntry]:
    """The slides that `tile` has seen in this work folder. Raises CohortError when there are none."""
    try:
        with open(work.cohort, newline="") as f:
            rows = csv.DictReader(f)
            if not {"slide", "path", "mpp"} <= set(rows.fieldnames or ()):
                raise ValueError("its header is not whole")
            return [_entry(row, work) for row in rows]
    except CohortError:
        raise
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise CohortError(
            f"{work.cohort} is damaged ({type(error).__name__}: {error}); delete it and tile the same folders again: "
            "what is done stays done"
        ) from error
    except FileNotFoundError as error:
        raise CohortError(
            f"{work.root} holds no tiled cohort; run `pipeline tile SLIDES --work {work.root}` first"
        ) from error


def _entry(row: dict[str, str], work: layout.Work) -> SlideEntry:
    if None in row.values():
        raise ValueError(f"the row of {row['slide']} is not whole")
    mpp = float(row["mpp"]) if row["mpp"] else None
    regions = names.to_path(row["regions"]) if row.get("regions") else None
    return SlideEntry(_inside(row["slide"], work), names.to_path(row["path"]), mpp, regions, row.get("series") or "")
