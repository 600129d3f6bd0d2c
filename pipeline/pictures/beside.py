"""What stands beside a run in its report: other runs on the same splits, and other cohorts that it has scored.

In: a scored run. Out: rows of tables. Numbers are those that `pipeline compare` and `pipeline score --labels` tell.
"""

from __future__ import annotations

from pathlib import Path

from mhim.configs.schema import ScoreConfig
from mhim.pipeline.results import compare, numbers
from mhim.pipeline.results.metrics_file import METRICS, ExternalMetrics, Metrics
from mhim.pipeline.store import layout, reading

MOST = 5  # runs that are compared with; each is a bootstrap
COMPARED = ("this run minus", "metric", "difference", "interval", "p", "so")
EXTERNAL = ("cohort", "metric", "internal", "external", "patients")


def comparisons(run: Path, found: Metrics) -> tuple[list[tuple[str, ...]], int]:
    """Rows of COMPARED by the headline, for the runs of the same work folder that answered the same question about the
    same patients; and how many more there are than MOST."""
    config = ScoreConfig(bootstrap=found.bootstrap, confidence=float(found.confidence))
    rows: list[tuple[str, ...]] = []
    more = 0
    for other in sorted(p for p in run.parent.iterdir() if p.is_dir() and p != run):
        try:
            theirs = Metrics.read(other)
        except (layout.StoreError, FileNotFoundError):
            continue  # not scored, or by another version: it has no numbers to compare with
        if theirs.split_hash != found.split_hash or theirs.counted_otherwise or theirs.targets is not None:
            continue
        if len(rows) >= MOST:
            more += 1
            continue
        try:
            verdict = compare.compare(other, run, config, found.headline)[found.headline]
        except (layout.StoreError, FileNotFoundError) as error:
            rows.append((other.name, found.headline, "not comparable", "", "", str(error)))
            continue
        d = verdict["difference"]
        if d.value != d.value:  # not a number
            rows.append((other.name, found.headline, "undefined", "", "", ""))
            continue
        span = f"{d.low:+.3f} to {d.high:+.3f}"
        metric = found.headline.replace("_", " ")
        rows.append((other.name, metric, f"{d.value:+.3f}", span, f"{verdict['p']:.3f}", str(verdict["verdict"])))
    return rows, more


def external(run: Path) -> list[tuple[str, ...]]:
    """Rows of EXTERNAL: each other cohort with labels, its metrics beside the run's own."""
    rows: list[tuple[str, ...]] = []
    for path in sorted((run / "new").glob(f"*/{METRICS}")):
        try:
            found = ExternalMetrics.of(reading.read_json(path), path)
        except layout.StoreError as error:
            rows.append((path.parent.name, str(error), "", "", ""))
            continue
        for name, value in found.external.items():
            inside = numbers.text_of(found.internal.get(name))
            rows.append((path.parent.name, name.replace("_", " "), inside, numbers.text_of(value), str(found.patients)))
    return rows
