"""Trainings that are stopped, killed or whose checkpoint is damaged end in the bytes of undisturbed ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mhim.mil import train as loop
from mhim.pipeline.store import layout
from mhim.pipeline.training import fitting as training
from tests.pipeline.bags import make_features, tree
from tests.pipeline.trained import kill_after, mhim, settings, trained, until_done


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
    kill_after(monkeypatch, [2, 1, 2, 1, 1, 2, 1])
    report, stops = until_done(work, rows, config)
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
    insides = kill_at_saves(monkeypatch, [3, 1, 4, 2, 5, 1, 3, 2])
    report, stops = until_done(work, rows, config)
    assert stops >= 4  # what is told to end saves once more, which the list may also end
    assert insides.count(True) > 15
    assert not report.failures
    assert tree(work.runs) == calm


PREPARED: dict[str, dict[str, Any]] = {"mean_knn": {"k": 3}, "mean_linear": {}, "ibmil": {"clusters": 2}}


@pytest.mark.parametrize("model", PREPARED)
def test_what_is_prepared_before_the_first_step_survives_a_kill_in_it_and_in_the_first_epoch(
    model: str, work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_features(work, 12)
    config = settings(model=model, model_params=PREPARED[model], epochs=2, checkpoint_s=1e-9)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    prepare, left = loop._prepare, ["read", "done"]

    def killed(net: Any, feed: Any, *more: Any) -> None:
        how = left.pop(0) if left and PREPARED[model].get("clusters") == getattr(net.params, "clusters", None) else ""
        with monkeypatch.context() as inside:
            if how == "read":
                whole = feed.batches
                inside.setattr(feed, "batches", lambda *args: cut(whole(*args)), raising=True)
            prepare(net, feed, *more)
        if how == "done":
            raise SystemExit(143)

    def cut(batches: Any) -> Any:
        yield next(batches)
        raise SystemExit(143)

    monkeypatch.setattr(loop, "_prepare", killed)
    insides = kill_at_saves(monkeypatch, [1, 1, 3, 1, 2])
    report, stops = until_done(work, rows, config)
    assert stops >= 4
    assert not left
    assert insides[0]
    assert not report.failures
    assert tree(work.runs) == calm


def kill_at_saves(monkeypatch: pytest.MonkeyPatch, left: list[int]) -> list[bool]:
    """A checkpoint after every step, and an end after so many of them, again and again until the list is used up.
    Returned, and filled as it goes: whether each checkpoint lay inside an epoch."""
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 1e9)
    save, insides = training._save, list[bool]()

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
    return insides


@pytest.mark.parametrize("how", [b"", b"\0" * 4000, b"PK\3\4 cut short"])
def test_a_damaged_checkpoint_costs_time_and_not_the_fold(
    how: bytes, work: layout.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, config = make_features(work), settings(epochs=2)
    assert not trained(work, rows, config).failures
    calm = tree(work.runs)
    shutil.rmtree(work.runs)
    read = training.checkpoint

    def damaged(file: Path) -> Any:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(how)
        return read(file)

    monkeypatch.setattr(training, "checkpoint", damaged)
    assert not trained(work, rows, config).failures
    assert tree(work.runs) == calm
