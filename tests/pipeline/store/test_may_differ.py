"""The one list of files that may differ between two runs of the same commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhim.pipeline.store.may_differ import MAY_DIFFER, reason, results, unfinished


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("runs/20260101T000000-tile-abc.jsonl", True),
        ("runs/20260101T000000-tile-abc.summary.md", True),
        ("jobs/x/tile.sh", True),
        ("features/uni/.partial/a.svs/01/state.pt", True),
        ("tiles/.tmp/host-1-ab/out/x", True),
        ("tiles/.tmp-host-1-ab", True),
        ("tiles/.claims/0.json", True),
        ("cohort.csv", False),
        ("tiles/a.svs.zarr/zarr.json", False),
        ("runs/mhim/metrics.json", False),
        ("runs/mhim/fold_0/model.json", False),
        ("runs/table.md", False),
        ("overlays/a.svs.jpg", False),
        ("runs/mhim/history.jsonl.csv", False),
    ],
)
def test_results_never_differ_and_logs_may(name: str, may: bool) -> None:
    assert (reason(name) is not None) == may


def test_every_entry_says_why() -> None:
    assert all(len(why.split()) >= 2 for why in MAY_DIFFER.values())


def test_results_and_what_is_unfinished(tmp_path: Path) -> None:
    for name in ("cohort.csv", "runs/x.jsonl", "tiles/.tmp/host-1-ab/half", "runs/r/.partial/fold_0/f/.tmp-host-1-x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert results(tmp_path) == {"cohort.csv": b"cohort.csv"}
    assert unfinished(tmp_path) == ["tiles/.tmp"]
