"""What a work folder holds: per stage what is done, empty, failed, running or missing, and why.

In: a work folder. Out: counts and reasons, read from the outputs themselves (which are the truth), the claims, and the
run logs (which only give the reasons of failures). Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from mhim.pipeline import backends
from mhim.pipeline.cohort import slides as cohort
from mhim.pipeline.exchange.imported import is_imported
from mhim.pipeline.maps.stored import names as maps_there
from mhim.pipeline.results.present import NEW, Present
from mhim.pipeline.results.present import told as told_of
from mhim.pipeline.resume import causes, console, live, runlog
from mhim.pipeline.resume.claims import running_keys
from mhim.pipeline.resume.live import Live
from mhim.pipeline.resume.stage import State
from mhim.pipeline.store import layout, reading, seals

STATES = ("done", "empty", "failed", "running", "missing")


@dataclass
class StageStatus:
    """Keys of one stage by state, and the reason of each empty or failed one."""

    name: str
    keys: dict[str, list[str]] = field(default_factory=lambda: {s: [] for s in STATES})
    reasons: dict[str, str] = field(default_factory=dict)
    live: dict[str, Live] = field(default_factory=dict)  # how far what is running has come, where it tells that


def read(work: layout.Work) -> list[StageStatus]:
    """The state of every stage of `work`, in order. Raises CohortError when there are neither slides nor features nor
    runs."""
    folders, runs = _folders(work.root / "features"), _folders(work.runs)
    brought = {f: imports for f in folders if (imports := _imported(f)) is not None}
    sliced = work.cohort.exists() or not (folders or runs)  # features may have come without slides
    slides = [s.id for s in cohort.read_cohort(work)] if sliced else []
    last = runlog.last_outcomes(work.runs)
    failed = {key: outcome.message for key, outcome in last.items() if outcome.state == State.FAILED}
    tile = _stage("tile", slides, work.tiles, {i: work.tile_store(i) for i in slides}, failed)
    stages = [tile]
    for folder in folders:
        if folder in brought:
            stages.append(_stage(f"import {folder.name}", brought[folder], folder, brought[folder], failed))
            continue
        outputs = {i: folder / f"{i}.zarr" for i in tile.keys["done"]} if sliced else layout.feature_stores(folder)
        stages.append(_stage(f"extract {folder.name}", outputs, folder, outputs, failed))
    wanted_folds = runlog.planned_keys(work.runs)
    for run in runs:
        stages.append(_run(run, failed, wanted_folds.get(f"train {run.name}", set())))
    tried = {key for name, key in failed if name == "map"} | runlog.planned_keys(work.runs).get("map", set())
    if maps := {*maps_there(work), *tried}:
        stages.append(_stage("map", sorted(maps), work.maps, {n: work.maps / n for n in maps}, failed))
    return stages


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def _imported(folder: Path) -> dict[str, Path] | None:
    """The stores of features that were brought in, by slide; None where they were extracted here."""
    stores = layout.feature_stores(folder)
    for path in stores.values():
        try:
            return stores if is_imported(reading.read_attrs(path)) else None
        except (layout.StoreError, ValueError, OSError):  # damaged: the next one tells
            continue
    return None


def _stage(
    name: str, keys: Iterable[str], root: Path, outputs: dict[str, Path], failed: dict[tuple[str, str], str]
) -> StageStatus:
    status = StageStatus(name)
    busy = running_keys(root / ".claims")
    for key in keys:
        found = seals.look(outputs[key])
        if found is not None and not found.wrong:
            reason = found.attrs.get("empty")
            status.keys["empty" if reason else "done"].append(key)
            if reason:
                status.reasons[key] = str(reason)
        elif key in busy:
            status.keys["running"].append(key)
        elif found is not None:
            status.keys["failed"].append(key)
            status.reasons[key] = reading.damage(outputs[key], found.wrong)
        elif (name, key) in failed:
            status.keys["failed"].append(key)
            status.reasons[key] = failed[name, key]
        else:
            status.keys["missing"].append(key)
    status.live = live.under_way(root, status.keys["running"])
    return status


def _folds(folder: Path) -> Iterator[tuple[str, str]]:
    """Folds below a run, as paths from it, and what is damaged in each. os.walk passes over what a training removes
    meanwhile."""
    for name, inner, _ in os.walk(folder):
        inner[:] = [n for n in inner if not n.startswith(".")]
        if any(n.startswith("fold_") for n in inner):
            continue  # it holds folds, as `inner/fold_0` of a fused run does
        if os.path.basename(name).startswith("fold_") and (found := seals.look(Path(name))) is not None:
            yield Path(name).relative_to(folder).as_posix(), found.wrong
            inner.clear()


def _run(folder: Path, failed: dict[tuple[str, str], str], planned: set[str]) -> StageStatus:
    """A training: its folds, and those that its last command wanted and that are not there yet."""
    status = StageStatus(f"train {folder.name}")
    folds = dict(_folds(folder))
    done = {key for key, wrong in folds.items() if not wrong}
    busy = running_keys(folder / ".claims")
    wrong = {k: m for (stage, k), m in failed.items() if stage == status.name and k not in done}
    wrong |= {key: reading.damage(folder / key, how) for key, how in folds.items() if how}
    for key in sorted(done | busy | wrong.keys() | planned):
        state = "done" if key in done else "running" if key in busy else "failed" if key in wrong else "missing"
        status.keys[state].append(key)
    status.reasons |= wrong
    status.live = live.under_way(folder, busy)
    return status


def old_results(work: layout.Work) -> list[str]:
    """A line for each scored run, or cohort that a run scored, whose results are not of the trainings that are there
    now, and for slides whose scores are not: nothing shows these."""
    told = []
    for run in _folders(work.runs):
        for folder in (run, *_folders(run / NEW)):
            own, name = Present(folder), folder.relative_to(work.runs).as_posix()
            try:
                own.check()
                told += [f"score {name}: {line}" for line in [told_of(own.stale())] if line]
            except layout.StoreError as error:
                told.append(f"score {name}: {error}")
    return told


def files(root: Path) -> Iterator[int]:
    """Size of every file below `root`; folders that vanish meanwhile are left out."""
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from files(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield entry.stat().st_size
    except FileNotFoundError:
        return


def show(root: Path, most: int | None = None) -> int:
    """Print the state of a work folder. Returns 1 if something failed. most: so many names of one cause of failures;
    None: all."""
    code = show_stages(root, read(layout.Work(root)), most, {})
    for line in old_results(layout.Work(root)):
        console.out.print(console.escape(line))
    sizes = list(files(root))
    console.out.print(f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")
    return code


def show_stages(root: Path, stages: list[StageStatus], most: int | None, left: dict[str, str] | None) -> int:
    """The same of `stages`, without counting files. left: what is known of the time that a stage still takes; None:
    what is under way is not told, either."""
    table = Table(title=f"{root}")
    table.add_column("stage")
    for state in STATES:
        table.add_column(state, justify="right")
    for stage in stages:
        table.add_row(stage.name, *(str(len(stage.keys[s])) for s in STATES))
    console.out.print(table)
    for stage in stages:
        for key, one in stage.live.items() if left is not None else ():
            console.out.print(console.escape(f"{stage.name}: running {key}: {one.told()}"))
        if left and stage.name in left:
            console.out.print(f"{console.escape(stage.name)}: {left[stage.name]}")
        for state in ("failed", "empty"):
            for cause in causes.grouped((key, stage.reasons.get(key, "")) for key in stage.keys[state]):
                told = f"{cause.keys[0]}: {cause.message}"
                if len(cause.keys) > 1:
                    told = f"{len(cause.keys)} items: {cause.message}: {cause.names(most)}"
                console.out.print(console.escape(f"{stage.name}: {state} {told}"))
        if stage.keys["missing"]:
            names = ", ".join(stage.keys["missing"][:5]) + (" ..." if len(stage.keys["missing"]) > 5 else "")
            console.out.print(f"{stage.name}: {len(stage.keys['missing'])} missing ({console.escape(names)})")
    for job in backends.jobs(layout.Work(root)):
        if not job.over or job.lost or any(job.ended.values()):
            console.out.print(console.escape(job.line()))
    return 1 if any(stage.keys["failed"] for stage in stages) else 0
