"""`pipeline check`: what a cohort's files are worth, before any work. Reads slides; writes its report only.

In: a folder or manifest, the tile settings, perhaps labels and patients' tables. Out: a table on the terminal,
`check.csv`, `check.html` (thumbnails with tissue outlines, least tissue first), and `tables.csv`. Exit 1 if anything
needs a person. Pictures are made by extract.
"""

from __future__ import annotations

import queue
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mhim.configs.processes import usable_cores
from mhim.configs.schema import Config, TileConfig
from mhim.extract.images import encoded
from mhim.extract.units import Mpp
from mhim.pipeline.cohort import check_page
from mhim.pipeline.cohort.finding import EMPTY, NO_MPP, OK, UNFIT, UNREADABLE, UNSUPPORTED, Finding
from mhim.pipeline.cohort.labels import match, use
from mhim.pipeline.cohort.labels import table as label_table
from mhim.pipeline.cohort.labels.rows import CohortError
from mhim.pipeline.cohort.listing import SlideEntry
from mhim.pipeline.resume import console, leftovers
from mhim.pipeline.resume.child import Child, Died, Order
from mhim.pipeline.store import names, tables, writing

if TYPE_CHECKING:
    from mhim.pipeline.cohort.patient_tables.check import Checked

NO_SLIDE = "no slide"
_HARMLESS = frozenset(
    {".csv", ".tsv", ".txt", ".json", ".geojson", ".xml", ".md", ".yaml", ".yml", ".pdf", ".xlsx", ".log", ".html"}
)
_PERSONAL = {"label", "macro"}
_RATE_TILES = 24  # read per slide to measure the rate
_FEATURE_BYTES = 1024 * 2 + 8  # a 1024-d float16 feature and its corner
_THUMB_PX = 320


def check(source: Path | None, config: Config, out: Path, labels: Path | None = None) -> int:
    """Inspect every file, and every patients' table, and report; 0 if nothing needs a person, else 1. source: None for
    the tables alone. Raises CohortError."""
    tables_ = None
    if config.train.tables:  # imported here, since it imports torch, which a process that looks at slides needs not
        from mhim.pipeline.cohort.patient_tables import check as check_tables

        tables_ = check_tables.check(config, labels)
    if source is None:
        if tables_ is None:
            raise CohortError("nothing to check: name the slides, or patients' tables with --table NAME=FILE")
        out.mkdir(parents=True, exist_ok=True)
        _show_tables(tables_, out)
        return 1 if tables_.problems else 0
    if _inside(out, source) or any((out / mark).exists() for mark in ("cohort.csv", "tiles")):
        raise CohortError(f"--out {out} lies among the slides or in a work folder: check never writes there")
    wrong = ""
    try:
        listing = use.slides_of(source, config, labels)
    except CohortError as error:  # of the labels, which is one of the things to be told; or of the slides
        listing = use.slides_of(source, config)
        wrong = str(error)
    started = time.perf_counter()
    findings = list(_inspect_all(listing.slides, config))
    seconds = time.perf_counter() - started
    findings += [
        _no_slide(p, source, listing.what.get(p))
        for p in listing.others
        if p in listing.what or p.suffix.lower() not in _HARMLESS
    ]
    findings, cohort_problems = _compare(findings, None if wrong else labels, config)
    cohort_problems += [wrong] if wrong else []
    findings.sort(key=lambda f: (-1.0 if f.tissue_fraction is None else f.tissue_fraction, f.slide))
    workers = config.cluster.workers or usable_cores()
    summary = [*_summary(findings, workers, seconds), *listing.notes, *cohort_problems]
    out.mkdir(parents=True, exist_ok=True)
    leftovers.sweep(out)
    writing.write_atomic(out / "check.csv", _csv(findings))
    writing.write_atomic(out / "check.html", check_page.page(names.readable(str(source)), findings, summary))
    _show(findings, summary, out)
    if tables_ is not None:
        _show_tables(tables_, out)
        cohort_problems += tables_.problems
    return 1 if cohort_problems or any(f.problems for f in findings) else 0


def inspect(entry: SlideEntry, config: TileConfig) -> Finding:
    """One slide, read only. Never raises for what is wrong with the slide."""
    import cv2

    from mhim.extract import MissingMpp, SlideError, UnreadableSlide
    from mhim.extract.slide.slide import open_slide
    from mhim.extract.tiles.tiling import tile_slide

    found = Finding(entry.id, OK)
    try:
        if entry.problem:
            raise SlideError(entry.problem)
        found = replace(found, megabytes=round(entry.path.stat().st_size / 1e6, 3))
        with open_slide(entry.path, entry.mpp, config, require_mpp=False) as slide:
            x, y = slide.slide_mpp if slide.has_mpp else (None, None)
            found = replace(
                found, vendor=slide.vendor, width=slide.size_l0[0], height=slide.size_l0[1], mpp_x=x, mpp_y=y,
                levels=len(slide.level_downsamples), mpp_source=slide.mpp_source, quickhash=slide.quickhash,
                images=" ".join(slide.associated), warnings=_warnings(slide),
            )  # fmt: skip
        looking = config.model_copy(update={"save_tiles": "none", "overlay": True})
        tiled = tile_slide(entry.path, looking, entry.mpp, entry.regions)
        coords = tiled.arrays["coords"]
        picture = tiled.overlay
        assert picture is not None
        scale = min(1.0, _THUMB_PX / max(picture.shape[:2]))
        size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        jpeg = encoded(picture, ".jpg", 75)
        rate = 0.0
        if len(coords):
            rate = _rate(entry, config, coords[:: max(1, len(coords) // _RATE_TILES)][:_RATE_TILES].tolist())
        return replace(
            found, tiles=len(coords), tissue_fraction=round(tiled.attrs["tissue_fraction"], 5), thumbnail=jpeg,
            tiles_per_s=rate, state=EMPTY if tiled.empty else OK, problems=(tiled.empty,) if tiled.empty else (),
            warnings=(*found.warnings, *(n for n in tiled.notes if n not in found.warnings)),
        )  # fmt: skip
    except SlideError as error:
        states = {MissingMpp: NO_MPP, UnreadableSlide: UNREADABLE}
        return replace(found, state=states.get(type(error), UNFIT), problems=(names.readable(str(error)),))
    except Exception as error:  # decoders raise whatever the bytes at hand do
        return replace(found, state=UNREADABLE, problems=(names.readable(f"{type(error).__name__}: {error}"),))


def _rate(entry: SlideEntry, config: TileConfig, corners: list[list[int]]) -> float:
    """Tiles read per second by one process, as the extraction would read them."""
    from mhim.extract.slide.slide import open_slide

    with open_slide(entry.path, entry.mpp, config, file_tiles=True) as slide:
        started = time.perf_counter()
        for x, y in corners:
            slide.read_region(x, y, config.tile_px, Mpp(config.mpp[0]))
        return round(len(corners) / max(time.perf_counter() - started, 1e-6), 1)


def _warnings(slide: object) -> tuple[str, ...]:
    out = list(slide.notes)  # type: ignore[attr-defined]
    personal = sorted(_PERSONAL & set(slide.associated))  # type: ignore[attr-defined]
    if personal:
        out.append(f"holds a {' and a '.join(personal)} image: it may show a name or number of the patient")
    w, h = slide.size_l0  # type: ignore[attr-defined]
    if len(slide.level_downsamples) == 1 and w * h > 100_000_000:  # type: ignore[attr-defined]
        out.append("has no pyramid: finding its tissue reads every pixel")
    return tuple(out)


def _inspect_all(slides: list[SlideEntry], config: Config) -> Iterator[Finding]:
    """All slides, in order, in processes that are not this one: a damaged file may abort whoever reads it."""
    workers = max(1, min(config.cluster.workers or usable_cores(), len(slides)))
    team: queue.SimpleQueue[Child] = queue.SimpleQueue()
    children = [Child(Order(None, call=_job)) for _ in range(workers)]
    for child in children:
        team.put(child)

    def looked_at(entry: SlideEntry) -> Finding:
        child = team.get()
        try:
            finding: Finding = child.ask((entry, config.tile))
            return finding
        except Died as error:
            why = f"the process that reads it {error}: its file is damaged: copy it anew, or leave it out"
            return Finding(entry.id, UNREADABLE, problems=(why,))
        finally:
            team.put(child)

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(looked_at, slides)
    except BaseException:
        for child in children:
            child.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for child in children:
            child.close()


def _job(pair: tuple[SlideEntry, TileConfig]) -> Finding:
    return inspect(*pair)


def _no_slide(path: Path, source: Path, what: str | None) -> Finding:
    """A file that is no slide. what: what it is, if that is known; it is then where it may well be."""
    from mhim.extract.slide.formats import is_plain_image

    absolute = source.absolute()
    name = path.absolute().relative_to(absolute).as_posix() if path.absolute().is_relative_to(absolute) else path.name
    name = names.readable(name)
    if what is not None:
        return Finding(name, NO_SLIDE, warnings=(what,))
    plain = "a plain image: list it in a manifest with its mpp, or give --mpp-of-slides"
    other = f"{path.suffix or 'no suffix'} is no format that is read; convert or remove it"
    why = plain if is_plain_image(path) else other
    return Finding(name, UNSUPPORTED, problems=(why,))


def _compare(findings: list[Finding], labels: Path | None, config: Config) -> tuple[list[Finding], list[str]]:
    """Add what only the whole cohort shows: duplicates, equal names, labels without slide and the reverse."""
    by_hash: dict[str, list[str]] = defaultdict(list)
    for f in findings:
        if f.quickhash:
            by_hash[f.quickhash].append(f.slide)
    stems = Counter(Path(f.slide).stem for f in findings)
    out, problems = [], []
    for f in findings:
        twins = [s for s in by_hash.get(f.quickhash, []) if s != f.slide]
        if twins:
            f = replace(f, problems=(*f.problems, f"the same slide as {', '.join(twins)}: keep one, or folds may leak"))
        if stems[Path(f.slide).stem] > 1:
            f = replace(f, warnings=(*f.warnings, "another file has the same name: labels must name its folder too"))
        out.append(f)
    if labels is not None:
        try:
            readable = [f.slide for f in findings if f.state not in (UNSUPPORTED, NO_SLIDE)]
            matched = match.match(label_table.read_rows(labels, config.labels, config.train.bag), readable)
        except CohortError as error:
            return out, [str(error)]
        problems += [f"{labels.name}, row {r.number}: there is no slide {r.slide}" for r in matched.without_slide]
        lone = set(matched.without_row)
        out = [replace(f, warnings=(*f.warnings, f"no row in {labels.name}")) if f.slide in lone else f for f in out]
        if lone:
            some = ", ".join(sorted(lone)[:5]) + (" ..." if len(lone) > 5 else "")
            problems.append(f"{len(lone)} slides have no row in {labels.name}: {some}")
    return out, problems


def _summary(findings: list[Finding], workers: int, seconds: float) -> list[str]:
    states = Counter(f.state for f in findings)
    tiles = sum(f.tiles for f in findings)
    reading_s = sum(f.tiles / f.tiles_per_s for f in findings if f.tiles_per_s)
    person = sum(bool(f.problems) for f in findings)
    hours = "no tile could be read, so no time is estimated"
    if reading_s:
        hours = f"reading the tiles takes about {reading_s / 3600 / workers:.2f} h with {workers} processes"
        hours += f" at the rate measured here ({tiles / reading_s:.0f} tiles/s each)"
    return [
        f"{len(findings)} files: " + ", ".join(f"{n} {s}" for s, n in states.most_common()),
        f"{person} need a person" if person else "nothing needs a person",
        f"{sum(f.megabytes for f in findings) / 1e3:.2f} GB of slides, {tiles:,} tiles expected",
        f"features of 1024 numbers (float16) would take {tiles * _FEATURE_BYTES / 1e9:.2f} GB",
        hours,
        f"tissue was looked for at {len(findings) / max(seconds, 1e-9):.1f} files/s",
    ]


def _csv(findings: Iterable[Finding]) -> str:
    names = [f.name for f in fields(Finding) if f.name != "thumbnail"]
    rows = ([getattr(finding, n) for n in names] for finding in findings)
    return tables.text_of(names, (["; ".join(v) if isinstance(v, tuple) else v for v in row] for row in rows))


def _show(findings: list[Finding], summary: list[str], out: Path) -> None:
    """The table in numbers, then what there is to say, each thing once with the slides it is true of."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in ("slide", "state", "vendor", "size px", "levels", "µm/px", "from", "tissue", "tiles"):
        table.add_column(name, overflow="fold", no_wrap=name not in ("slide", "from", "vendor"))
    for f in findings:
        mpp = "" if f.mpp_x is None else f"{f.mpp_x:.4g}"
        if f.mpp_y not in (None, f.mpp_x):
            mpp += f" x {f.mpp_y:.4g}"
        size = f"{f.width} x {f.height}" if f.width else ""
        tissue, tiles = ("", "") if f.tissue_fraction is None else (f"{f.tissue_fraction:.1%}", str(f.tiles))
        row = (f.slide, f.state, f.vendor, size, str(f.levels or ""), mpp, f.mpp_source, tissue, tiles)
        table.add_row(*(Text(cell) for cell in row), style="yellow" if f.problems else "")
    Console(highlight=False, width=None if console.out.is_terminal else 160).print(table)  # a file has no width
    for heading, kind in (("needs a person", "problems"), ("to be known", "warnings")):
        said: dict[str, list[str]] = defaultdict(list)
        for f in findings:
            for text in getattr(f, kind):
                said[text].append(f.slide)
        if said:
            console.out.print(f"{heading}:", style="bold", markup=False)
        for text, slides in said.items():
            more = f" and {len(slides) - 3} more (check.csv lists them)" if len(slides) > 3 else ""
            named = len(slides) == 1 and text.startswith(Path(slides[0]).name)
            console.out.print(f"  {'' if named else ', '.join(slides[:3]) + more + ': '}{text}", markup=False)
    for line in summary:
        console.out.print(line, markup=False)
    console.out.print(f"{out / 'check.csv'} and {out / 'check.html'} hold all of it", markup=False)


def _show_tables(found: Checked, out: Path) -> None:
    """What there is to say of patients' tables, and their columns as a file."""
    from mhim.pipeline.cohort.patient_tables.check import FILE

    writing.write_atomic(out / FILE, found.csv())
    for heading, lines in (("needs a person", found.problems), ("to be known", found.notes)):
        if lines:
            console.out.print(f"patients' tables, {heading}:", style="bold", markup=False)
        for line in lines:
            console.out.print(f"  {line}", markup=False)
    if not found.problems:
        console.out.print("patients' tables: nothing needs a person", markup=False)
    console.out.print(f"{out / FILE} holds every column", markup=False)


def _inside(out: Path, source: Path) -> bool:
    folder = source.resolve() if source.is_dir() else None
    return folder is not None and out.resolve().is_relative_to(folder)
