"""Tiny models and runs that the tests of training share."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from mhim.configs.schema import Config
from mhim.mil import train as loop
from mhim.pipeline.cohort import patients
from mhim.pipeline.resume import runner, stage
from mhim.pipeline.stages import runs
from mhim.pipeline.stages.train import Train
from mhim.pipeline.store import layout
from mhim.pipeline.training import fitting

SMALL: dict[str, dict[str, Any]] = {
    "abmil": {"width": 8, "attention_width": 8},
    "dsmil": {"width": 8},
    "transmil": {"width": 64, "landmarks": 16},
}


def settings(**train: Any) -> Config:
    base = {"model": "abmil", "model_params": SMALL["abmil"], "folds": 2, "epochs": 4, "lr": 0.01, "patience": 0}
    return Config.model_validate({"train": base | train, "score": {"bootstrap": 20, "heatmaps": "none"}})


def mhim(student: str = "abmil", **params: Any) -> dict[str, Any]:
    """The guarded form alone, which is one training less: `published_within` tries the published one before it."""
    base = {"student": student, "student_params": SMALL[student], "published_within": None}
    return {"model": "mhim", "model_params": base | params}


def in_turn(stage_: stage.Stage, items: list[stage.Item], again: bool, redo: bool) -> Any:
    return runner.run_items(stage_, items, 60.0, again, redo)


def carried_out(made: stage.Stage) -> stage.Report:
    return runner.run(stage.plan(made, made.items()), in_turn)


def trained(work: layout.Work, rows: Any, config: Config, name: str = "run", replace_: bool = False) -> stage.Report:
    data = patients.labelled(rows, work.features("texture"), config.train)
    made = Train(work, config, name, data, patients.make_folds(data, config.train))
    return runner.run(stage.plan(made, made.items()), in_turn, replace=replace_)


def scored(work: layout.Work, config: Config, name: str = "run") -> dict[str, Any]:
    report = carried_out(runs.held_out(work, config, work.run(name)))
    assert not report.failures, report.failures
    found: dict[str, Any] = json.loads((work.run(name) / "metrics.json").read_text())
    return found


def kill_after(monkeypatch: pytest.MonkeyPatch, states: list[int]) -> None:
    """A checkpoint after every epoch; the next trainings are ended after so many states, later ones run through."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SHARE", 1e9)
    fit = loop.fit

    def killed(*args: Any) -> Any:
        stop = states.pop(0) if states else 99
        for n, state in enumerate(fit(*args), start=1):
            yield state
            if n == stop:
                raise SystemExit(143)  # what SIGTERM does

    monkeypatch.setattr(loop, "fit", killed)


def until_done(work: layout.Work, rows: Any, config: Config) -> tuple[stage.Report, int]:
    """The report of the first run that nothing ends, and how many were ended before it."""
    for stops in range(12):
        with contextlib.suppress(SystemExit):
            return trained(work, rows, config), stops
    raise AssertionError("it never ends")


def side_of(work: layout.Work, fold: str, side: str) -> set[str]:
    lines = [line.split(",") for line in (work.run("run") / "splits.csv").read_text().splitlines()[1:]]
    return {p for repeat, k, p, s, _ in lines if f"fold_{k}" == fold and s == side}
