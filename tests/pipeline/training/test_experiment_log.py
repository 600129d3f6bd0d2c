"""Experiment logs: the rows reach the service as it wants them; a missing extra is told before any work."""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from mhim.pipeline.training import experiment_log

ROWS = [{"epoch": 0, "lr": 0.1, "loss": 0.7}, {"epoch": 1, "lr": 0.1, "loss": 0.5}]


def fake(kind: str, calls: list[Any]) -> types.SimpleNamespace:
    """A stand-in with the few functions of the service that are used."""
    if kind == "tensorboard":
        writer = types.SimpleNamespace(
            add_scalar=lambda k, v, n: calls.append((n, k, v)), close=lambda: calls.append("end")
        )
        return types.SimpleNamespace(SummaryWriter=lambda log_dir: calls.append(Path(log_dir).name) or writer)
    if kind == "wandb":
        session = types.SimpleNamespace(
            log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("end")
        )
        return types.SimpleNamespace(init=lambda **what: calls.append(what["name"]) or session)
    return types.SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=lambda run_name: calls.append(run_name) or nullcontext(),
        log_metrics=lambda row, step: calls.append((step, row)),
    )


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_rows_reach_the_service(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, experiment_log.EXTRAS[kind], fake(kind, calls))
    with experiment_log.opened(kind, tmp_path / "run", "fold_0") as log:
        for row in ROWS:
            log(row)
    assert calls[0] == "fold_0"
    told = [c for c in calls[1:] if c != "end"]
    if kind == "tensorboard":
        assert told == [(0, "lr", 0.1), (0, "loss", 0.7), (1, "lr", 0.1), (1, "loss", 0.5)]
    else:
        assert told == [(0, {"lr": 0.1, "loss": 0.7}), (1, {"lr": 0.1, "loss": 0.5})]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_extra_says_how_to_get_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, experiment_log.EXTRAS[kind], None)
    with pytest.raises(experiment_log.LogError, match=rf'pip install "\.\[{kind}\]"'):
        experiment_log.check(kind)
    experiment_log.check("csv")
