"""The demo command, quick: runs everything, accounts for the broken slides, and shows where to look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_the_demo_runs_and_tells_what_happened(cli: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    few = ["--set", "train.epochs=2", "--set", "train.folds=2", "--set", "score.bootstrap=20"]
    code, text = cli("demo", "--quick", "--to", tmp_path, *few)
    assert code == 0, text
    for words in ("no_mpp.svs", "truncated.svs", "no_tissue.svs", "Held-out results", "heatmaps"):
        assert words in text
    assert "table weigh" not in " ".join(text.split())  # quick, nothing is fused
    for model, pictures in (("abmil", 0), ("mhim", 12)):
        run = tmp_path / "work" / "runs" / model
        assert json.loads((run / "metrics.json").read_text())["test"]["auc"]["value"] is not None
        assert len(list((run / "heatmaps").rglob("*.png"))) == pictures
    share = tmp_path / "work" / "runs" / "share"  # the second target
    assert json.loads((share / "metrics.json").read_text())["task"]["kind"] == "regression"
    code, again = cli("demo", "--quick", "--to", tmp_path, *few)  # nothing is made twice
    assert code == 0
    assert "extract: 0 to do, 12 done before" in again
