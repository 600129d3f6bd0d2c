"""What the columns `mpp` and `regions` of a table do: to the slides that are listed, and, where tiles are there
already, what they can no longer do.

In: slides or features, and a table. Out: slides with their mpp and regions, and what has to be told. The one place
where slides are listed for `tile`, `check`, `run` and `score`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mhim.configs.schema import Config, LabelsConfig
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.cohort.labels import match
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError, Row, some
from mhim.pipeline.cohort.labels.table import Table
from mhim.pipeline.cohort.listing import Listing, SlideEntry, beside
from mhim.pipeline.store import layout, reading


def slides_of(source: Path, config: Config, labels: Path | None = None) -> Listing:
    """The slides of a folder, file or manifest with what the table `labels` tells of them. Raises CohortError."""
    bag = config.train.bag
    listing = cohort.list_slides(source, config.tile.mpp_of_slides is not None, config.labels, bag)
    if labels is None or (source.is_file() and labels.resolve() == source.resolve()):
        return listing
    table = label_table.read_table(labels, config.labels, bag=bag)
    return obeyed(listing, table)


def obeyed(listing: Listing, table: Table) -> Listing:
    """Slides with the mpp and the regions (paths relative to the table) of their rows. Raises CohortError where a
    manifest says otherwise."""
    if not {"mpp", "regions"} & table.columns.keys():
        return replace(listing, notes=(*listing.notes, *table.notes))
    matched = match.match(table.rows, [s.id for s in listing.slides])
    of = {slide: row for row, slide in matched.rows}
    slides = [_with(slide, of[slide.id], table) if slide.id in of else slide for slide in listing.slides]
    used = {"mpp": [i for i, r in of.items() if r.mpp is not None], "regions": [i for i, r in of.items() if r.regions]}
    told = [f"{column} of {len(of)} slide{'s' * (len(of) != 1)}" for column, of in used.items() if of]
    notes = [f"{table.path.name}: {' and '.join(told)} taken from it"] if told else []
    return replace(listing, slides=slides, notes=(*listing.notes, *table.notes, *matched.notes, *notes))


def _with(slide: SlideEntry, row: Row, table: Table) -> SlideEntry:
    regions = beside(table.path, row.regions) if row.regions else None
    for what, old, new in (("mpp", slide.mpp, row.mpp), ("regions", slide.regions, regions)):
        if old is not None and new is not None and old != new:
            raise CohortError(
                f"{table.path}, row {row.number}, column {what}: {new} of {slide.id}, but the manifest "
                f"says {old}: keep one of them"
            )
    return replace(slide, mpp=slide.mpp if row.mpp is None else row.mpp, regions=regions or slide.regions)


_DRAWN = (".geojson", ".geojson.gz")  # as QuPath exports regions


def drawn_on(slides: list[SlideEntry], folder: Path) -> tuple[list[SlideEntry], str]:
    """The slides with the regions of `folder`, a file `<slide id>.geojson` (or `.geojson.gz`) each, and what there is
    to tell. Raises CohortError where there is no such folder, where it fits no slide, where two files are of one, and
    where a table names other regions."""
    if not folder.is_dir():
        raise CohortError(f"--regions {folder} is no folder: it holds a file <slide id>.geojson for each drawn slide")
    made = []
    for slide in slides:
        found = [p for end in _DRAWN if (p := folder.resolve() / f"{slide.id}{end}").is_file()]
        if not found:
            made.append(slide)
            continue
        if len(found) > 1:
            raise CohortError(f"{' and '.join(p.name for p in found)} in {folder} are both of {slide.id}: keep one")
        own = found[0]
        if slide.regions is not None and slide.regions.resolve() != own.resolve():
            raise CohortError(f"{slide.id} has regions in {folder} and in {slide.regions}, named by a table: keep one")
        made.append(replace(slide, regions=own))
    used = [s.regions for s in made if s.regions is not None and s.regions.is_relative_to(folder.resolve())]
    if not used:
        like = f" (like {slides[0].id}.geojson)" if slides else ""
        raise CohortError(f"no file in {folder} is called as a slide is{like}")
    told = f"{folder}: regions of {len(used)} slide{'s' * (len(used) != 1)} taken from it"
    there = {p for end in _DRAWN for p in folder.resolve().rglob(f"*{end}")}
    idle = sorted(str(p.relative_to(folder.resolve())) for p in there - {*used})
    return made, told + (f"; files called as no slide here is: {len(idle)} ({some(idle)})" if idle else "")


def too_late(table: Table, features: Path, work: layout.Work) -> list[str]:
    """What `train` has to tell of columns that only tiling obeys: where tiles were made otherwise."""
    if not {"mpp", "regions"} & table.columns.keys():
        return []
    stores = layout.feature_stores(features)
    known = {s.id: s for s in cohort.read_cohort(work)} if work.cohort.exists() else {}
    other_mpp, unknown_mpp, other_regions = [], [], []
    for row, slide in match.match(table.rows, stores).rows:
        if row.mpp is not None:
            made = reading.read_attrs(stores[slide]).get("slide_mpp")
            if made is None:
                unknown_mpp.append(slide)
            elif abs(float(made[0]) - row.mpp) > 1e-6 * row.mpp:
                other_mpp.append(f"{slide} (tiles {float(made[0]):g}, the table {row.mpp:g})")
        if row.regions:
            entry, wanted = known.get(slide), beside(table.path, row.regions)
            if entry is None or entry.regions is None or entry.regions.resolve() != wanted.resolve():
                other_regions.append(slide)
    cure = f"tile again with --labels {table.path.name} --replace, then extract"
    notes = []
    if other_mpp:
        notes.append(
            f"{table.path.name}: its mpp of {len(other_mpp)} slides is not what their tiles were made with, "
            f"and training does not change that: {some(other_mpp, 3)}; {cure}"
        )
    if other_regions:
        notes.append(
            f"{table.path.name}: its regions of {len(other_regions)} slides were not there when these were "
            f"tiled, and training does not change that: {some(other_regions, 3)}; {cure}"
        )
    if unknown_mpp:
        notes.append(f"{table.path.name}: its mpp of {len(unknown_mpp)} slides is not used: imported features")
    return notes


def unused_by_score(table: Table, sliced: bool) -> list[str]:
    """What `score` has to tell: splits are of a training, and mpp and regions only of slides that it tiles itself."""
    idle = [c for c in ("split", "fold", "site", *(() if sliced else ("mpp", "regions"))) if c in table.columns]
    return [f"{table.path.name}: {' and '.join(idle)} not used by score"] if idle else []


def of_manifest(source: Path, settings: LabelsConfig) -> bool:
    """Whether what names the slides also tells their classes or times: then it is the table of labels too."""
    from mhim.pipeline.cohort.labels.cells import is_table

    return source.is_file() and is_table(source) and label_table.read_table(source, settings, bag="slide").has_outcome
