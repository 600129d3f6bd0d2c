"""What stands beside a run in its report: other runs on the same splits, and other cohorts that it has scored.

In: a scored run. Out: rows of tables. Numbers are those that `pipeline compare` and `pipeline score --labels` tell.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mhim.configs.schema import ScoreConfig
from mhim.pipeline.pictures.parts import DAMAGED, Parts, reason
from mhim.pipeline.results import compare, numbers, views
from mhim.pipeline.results.metrics_file import METRICS, ExternalMetrics, Metrics
from mhim.pipeline.results.present import NEW, Present
from mhim.pipeline.store import reading

MOST = 5  # runs that are compared with; each is a bootstrap
COMPARED = ("this run minus", "metric", "difference", "interval", "p", "so")
EXTERNAL = ("cohort", "metric", "internal", "external", "patients")


def comparisons(run: Path, found: Metrics, parts: Parts) -> tuple[list[tuple[str, ...]], int]:
    """Rows of COMPARED by the headline, for the runs of the same work folder that answered the same question about the
    same patients; and how many more there are than MOST."""
    config = ScoreConfig(bootstrap=found.bootstrap, confidence=float(found.confidence))
    rows: list[tuple[str, ...]] = []
    more = 0
    for other in sorted(p for p in run.parent.iterdir() if p.is_dir() and p != run):
        try:
            theirs = Metrics.read(other)
        except FileNotFoundError:
            continue  # not scored: it has no numbers to compare with
        except DAMAGED as error:
            parts.fail(f"the run {other.name}", error)
            continue
        if theirs.split_hash != found.split_hash or theirs.counted_otherwise:
            continue
        if len(rows) >= MOST:
            more += 1
            continue
        try:
            verdicts = _verdicts(other, run, config)
        except DAMAGED as error:
            rows.append((other.name, found.headline, "not comparable", "", "", reason(error)))
            continue
        for name, verdict in verdicts.items():
            d, metric = verdict["difference"], name.replace("_", " ")
            if d.value != d.value:  # not a number
                rows.append((other.name, metric, "undefined", "", "", ""))
                continue
            span = f"{d.low:+.3f} to {d.high:+.3f}"
            rows.append((other.name, metric, f"{d.value:+.3f}", span, f"{verdict['p']:.3f}", str(verdict["verdict"])))
    return rows, more


def _verdicts(other: Path, run: Path, config: ScoreConfig) -> dict[str, dict[str, Any]]:
    """Headline -> how the run's differs from the other's; of several targets also of each. Raises StoreError."""
    pairs = compare.views_of(other, run, None)
    if len(pairs) > 1:
        return compare.compare_together(other, run, config)
    ((theirs, mine),) = pairs
    name = Metrics.read(mine.folder).headline
    return {f"{mine.target}.{name}" if mine.target else name: compare.compare(theirs, mine, config, name)[name]}


def external(run: Path, parts: Parts) -> list[tuple[str, ...]]:
    """Rows of EXTERNAL: each other cohort with labels, its metrics beside the run's own."""
    rows: list[tuple[str, ...]] = []
    cohorts = sorted(p for p in (run / NEW).glob("*") if p.is_dir() and not p.name.startswith("."))
    for cohort in cohorts:
        rows += parts.make(f"the cohort {cohort.name}", partial(_of_cohort, cohort), [])
    return rows


def _of_cohort(cohort: Path) -> list[tuple[str, ...]]:
    """Raises StoreError where it was scored by trainings that are there no more."""
    rows: list[tuple[str, ...]] = []
    told = [view for view in views.of(cohort) if (view.folder / METRICS).exists()]  # others: scored without labels
    if told:
        Present(cohort).check()
    for view in told:
        path = view.folder / METRICS
        found = ExternalMetrics.of(reading.read_json(path), path)
        for name, value in found.external.items():
            inside = numbers.text_of(found.internal.get(name))
            rows.append((view.name, name.replace("_", " "), inside, numbers.text_of(value), str(found.patients)))
    return rows
