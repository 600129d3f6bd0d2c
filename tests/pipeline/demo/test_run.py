"""The demo command, quick: runs everything, accounts for the broken slides, and shows where to look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.extract import weights
from mhim.pipeline.demo import run as demo
from mhim.pipeline.store.layout import Work


@pytest.mark.parametrize(
    ("there", "begun", "typed", "right", "told"),
    [
        (False, "", {}, "texture", "mhim-pipeline[cnn]"),
        (True, "", {"extract": {"dtype": "float32"}}, "efficientnet-lite0", "--set extract.encoder=texture"),
        (True, "texture", {}, "texture", "features are of it"),
        (True, "efficientnet-lite0", {}, "efficientnet-lite0", "ImageNet"),
        (True, "texture", {"extract": {"encoder": "mine.py:own"}}, None, ""),
        (True, "", {"extract": 5}, None, ""),  # `--set extract=5`: refused as a setting, not a fault of the program
    ],
)
def test_the_demo_takes_the_encoder_with_weights_where_it_is_installed(
    there: bool, begun: str, typed: dict[str, object], right: str | None, told: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(weights, "installed", lambda wheel: tmp_path if there else None)
    if begun:
        (tmp_path / "work" / "features" / begun).mkdir(parents=True)
    assert demo.encoder_of(Work(tmp_path / "work"), typed) == right
    err = " ".join(capsys.readouterr().err.split())
    assert (told in err and f"encoder {right}" in err) if right else not err


def test_the_demo_runs_and_tells_what_happened(
    cli: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "installed", lambda wheel: None)  # the quicker one
    few = ["--set", "train.epochs=2", "--set", "train.folds=2", "--set", "score.bootstrap=20"]
    code, text = cli("demo", "--quick", "--to", tmp_path, *few)
    assert code == 0, text
    for words in ("no_mpp.svs", "truncated.svs", "no_tissue.svs", "Held-out results", "heatmaps"):
        assert words in text
    assert "encoder texture" in text
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
