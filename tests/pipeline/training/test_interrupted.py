"""Trainings that are stopped, killed or whose checkpoint is damaged end in the bytes of undisturbed ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mhim.mil import train as loop
from mhim.pipeline.store import layout
from mhim.pipeline.training import fold as training
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import mhim, settings, trained


@pytest.fixture
def work(tmp_path: Path) -> layout.Work:
    return layout.Work(tmp_path / "work")


@pytest.mark.parametrize("student", ["abmil", "dsmil", "transmil"])
def test_mhim_stopped_at_any_epoch_ends_in_the_same_bytes(
    student: str, work: layout.Work, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = make_features(work, 8)
    config = settings(**mhim(student, merge="mca", teacher="ema", student_start="fresh"), epochs=3)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 1e9)  # a checkpoint after every epoch
    fit, left = loop.fit, [2, 1, 2, 1, 1, 2, 1]

    def killed(*args: Any) -> Any:
        stop = left.pop(0) if left else 99
        for n, state in enumerate(fit(*args), start=1):
            yield state
            if n == stop:
                raise SystemExit(143)  # what SIGTERM does

    monkeypatch.setattr(loop, "fit", killed)
    stops = 0
    for _ in range(12):
        try:
            report = trained(work, rows, config)
            break
        except SystemExit:
            stops += 1
    assert stops >= 4
    assert not report.failures
    assert tree(work.runs) == calm


def test_a_training_killed_inside_its_epochs_ends_in_the_same_bytes(
    work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_features(work, 12)
    config = settings(**mhim(student_start="fresh"), epochs=2, checkpoint_s=1e-9)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 1e9)  # a checkpoint after every step
    save, left = training._save, [3, 1, 4, 2, 5, 1, 3, 2]
    insides = []

    def killed(state: Any, file: Path) -> None:
        save(state, file)
        insides.append(state["within"] is not None)
        left[0] -= 1
        if left[0] == 0:
            left.pop(0)
            if left:
                raise SystemExit(143)
            left.append(10**9)

    monkeypatch.setattr(training, "_save", killed)
    stops = 0
    for _ in range(12):
        try:
            report = trained(work, rows, config)
            break
        except SystemExit:
            stops += 1
    assert stops >= 4  # what is told to end saves once more, which the list may also end
    assert insides.count(True) > 15
    assert not report.failures
    assert tree(work.runs) == calm


@pytest.mark.parametrize("how", [b"", b"\0" * 4000, b"PK\3\4 cut short"])
def test_a_damaged_checkpoint_costs_time_and_not_the_fold(
    how: bytes, work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, config = make_features(work), settings(epochs=2)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    read = training._checkpoint

    def damaged(file: Path) -> Any:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(how)
        return read(file)

    monkeypatch.setattr(training, "_checkpoint", damaged)
    assert not trained(work, rows, config).failures
    assert tree(work.runs) == calm
