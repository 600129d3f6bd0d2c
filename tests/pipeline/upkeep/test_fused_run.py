"""Upkeep of a run of slides and tables, whose folders `slide/inner/fold_k` hold folds and are none."""

from __future__ import annotations

from pathlib import Path

from mhim.pipeline.store import layout
from mhim.pipeline.upkeep import verify
from tests.pipeline.fused import cohort, config, trained


def test_a_sound_fused_run_is_found_sound_and_a_damaged_inner_fold_by_name(tmp_path: Path) -> None:
    work = layout.Work(tmp_path / "work")
    rows, tables = cohort(work)
    assert not trained(work, rows, tables, config(epochs=1, folds=2)).failures
    found = verify.verify(work, workers=1)
    assert not found.damaged
    inner = work.run("run") / "slide" / "inner" / "fold_0" / "fold_1"
    (inner / layout.SEAL).unlink()
    assert list(verify.verify(work, again=True, workers=1).damaged) == ["runs/run/slide/inner/fold_0/fold_1"]
