"""The Kaplan-Meier curves of a run's risk groups, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mhim.mil import metrics
from mhim.pipeline.pictures import figures
from mhim.pipeline.results.measures.measure import of_slides
from mhim.pipeline.results.risk_groups import NAME, Row, groups, steps
from mhim.pipeline.store import tables


def draw(out: Path, rows: Sequence[Row]) -> None:
    """Write the picture and its numbers into `out`; nothing where there are no groups."""
    found = groups(rows)
    if found is None:
        return
    tested = None if counted(rows) else metrics.log_rank(*found)
    figures.save_all(out, {NAME: figures.kaplan_meier(*found, tested, counted(rows))})
    (out / f"{NAME}.csv").write_text(tables.of_mappings(steps(*found)))


def counted(rows: Sequence[Row]) -> str:
    """What the curves count, where it is not patients: the slides of train.bag=slide, several of which are of one."""
    return "slides" if any(of_slides(r) for r in rows) else ""
