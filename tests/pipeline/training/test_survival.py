"""Survival from features to risk groups: several slides per patient, groups by the validation's medians."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mhim.mil import metrics
from mhim.pipeline.store import layout
from mhim.pipeline.training import bundle
from mhim.pipeline.training import fold as training
from tests.pipeline.bags import make_features
from tests.pipeline.trained import scored, settings, side_of, trained


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_survival_runs_with_several_slides_per_patient(work: layout.Work, loss: str) -> None:
    rng = np.random.default_rng(1)
    made = make_features(work, 24, 2)
    patients = {r.patient: (float(rng.exponential(9)) + 0.1, int(rng.random() < 0.7)) for r in made}
    rows = [replace(r, label=None, time=patients[r.patient][0], event=patients[r.patient][1]) for r in made]
    config = settings(task="auto", survival_loss=loss, survival_bins=3)
    assert not trained(work, rows, config).failures
    found = scored(work, config)
    assert found["headline"] == "c_index"
    assert 0 <= found["test"]["c_index"]["value"] <= 1
    assert found["test"]["c_index"]["low"] <= found["test"]["c_index"]["value"] <= found["test"]["c_index"]["high"]
    groups_match_the_validation_medians(work.run("run"), found, patients)
    card = json.loads((work.run("run") / "fold_0" / "model.json").read_text())
    assert sum(k.startswith("time_auc_") for k in card["test"]) == 3
    if loss == "nll":
        # edges come from the training part alone
        events = [t for p, (t, e) in patients.items() if e and p in side_of(work, "fold_0", "train")]
        np.testing.assert_allclose(card["task"]["edges"], np.quantile(events, [1 / 3, 2 / 3]))


def groups_match_the_validation_medians(run: Path, found: dict[str, Any], truth: dict[str, tuple[float, int]]) -> None:
    """The drawn groups are the test patients above and below the median risk of their fold's validation patients."""
    high: dict[str, bool] = {}
    for folder in sorted(run.glob("fold_*")):
        task = bundle.read(folder).task
        rows = training.read_predictions(folder)
        risks = task.risk(torch.from_numpy(training.logits_of(rows))).numpy()
        cut = np.median([r for r, row in zip(risks, rows, strict=True) if row["side"] == "val"])
        high |= {row["patient"]: r > cut for r, row in zip(risks, rows, strict=True) if row["side"] == "test"}
    names = sorted(truth)
    time, event = np.array([truth[n] for n in names]).T
    up = np.array([high[n] for n in names])
    assert found["log_rank_p"] == pytest.approx(metrics.log_rank(time, event, up), nan_ok=True)
    with open(run / "kaplan_meier.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    start = {r["group"]: int(r["at_risk"]) for r in rows if float(r["time"]) == 0}
    assert start == {k: n for k, n in (("low", int((~up).sum())), ("high", int(up.sum()))) if n}
    assert sum(int(r["events"]) for r in rows) == event.sum()
    assert (run / "kaplan_meier.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (run / "kaplan_meier.svg").read_bytes()


def test_survival_without_validation_has_no_groups(work: layout.Work) -> None:
    """The published protocol leaves no patients for a threshold: nothing is drawn, rather than on the test fold."""
    made = make_features(work, 12)
    rows = [replace(r, label=None, time=float(i % 7 + 1), event=int(i % 3 > 0)) for i, r in enumerate(made)]
    config = settings(survival_loss="cox", protocol="paper")
    assert not trained(work, rows, config).failures
    assert scored(work, config)["log_rank_p"] is None
    assert not (work.run("run") / "kaplan_meier.png").exists()
