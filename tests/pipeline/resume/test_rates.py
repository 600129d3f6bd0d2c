"""Tiles per second and the side that limits, as bar, log and summary tell them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mhim.pipeline.resume import console, rates
from mhim.pipeline.resume.runlog import RunLog
from mhim.pipeline.resume.stage import Item, Outcome, Plan, Report, State
from tests.pipeline.toys import Toy

SLOW_MODEL = {"tiles": 1000, "read_s": 0.25, "encode_s": 40.0, "waited_s": 0.1, "work_s": 40.5}
SLOW_DISK = {"tiles": 1000, "read_s": 19.0, "encode_s": 4.0, "waited_s": 16.0, "work_s": 20.0}


def test_rates_and_the_limiting_side() -> None:
    assert rates.told(SLOW_MODEL) == "24.7 tiles/s (reading 4000/s, encoding 25/s, limited by the encoder)"
    assert rates.told(SLOW_DISK) == "50 tiles/s (reading 52.6/s, encoding 250/s, limited by reading)"
    assert rates.told({**SLOW_MODEL, "waited_s": 40.0}).endswith("the encoder)"), "encoded by the reading threads"
    assert rates.told({"tiles": 12}) == "", "tiling has no such rates"
    assert rates.told({**SLOW_MODEL, "tiles": 0}) == ""
    assert rates.told(dict.fromkeys(SLOW_MODEL, 0.0) | {"tiles": 3}).startswith("3000 tiles/s"), "no time measured"


def test_log_summary_and_lines_tell_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates of all slides come from sums: rates themselves cannot be added."""
    outcomes = [Outcome("a", State.DONE, 40.5, numbers=SLOW_MODEL), Outcome("b", State.DONE, 20, numbers=SLOW_DISK)]
    console.err.file = sys.stderr
    try:
        with RunLog(tmp_path, "extract") as log, console.Progressing("extract") as progress:
            todo = Plan(Toy(tmp_path))
            todo.todo = [Item(o.key, tmp_path / o.key) for o in outcomes]
            log.planned(todo)
            progress.planned(todo)
            for outcome in outcomes:
                log.watch(outcome)
                progress.watch(outcome)
            log.finished(Report("extract", outcomes))
    finally:
        console.err.file = None  # type: ignore[assignment]
    items = [e for e in map(json.loads, log.path.read_text().splitlines()) if e["event"] == "item"]
    assert [e["rates"].rsplit(" ", 1)[-1] for e in items] == ["encoder)", "reading)"]
    both = "33.1 tiles/s (reading 104/s, encoding 45.5/s, limited by the encoder)"
    assert f"| rates | {both} |" in log.path.with_suffix(".summary.md").read_text()
    assert f"extract 2/2, 0 failed; {both}" in capsys.readouterr().err
