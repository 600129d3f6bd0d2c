"""`status --watch`: whole pictures where something changed, a line a minute of what is under way, and the time left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mhim.pipeline import backends
from mhim.pipeline.backends import JobFolder, Submitted
from mhim.pipeline.resume import console, live
from mhim.pipeline.resume.live import Live
from mhim.pipeline.resume.stage import Stopped
from mhim.pipeline.store.layout import Work
from mhim.pipeline.upkeep import status, watch
from mhim.pipeline.upkeep.status import StageStatus
from mhim.pipeline.upkeep.watch import Rates, Watch


def stage(name: str = "train run", live: dict[str, Live] | None = None, **keys: str) -> StageStatus:
    """The keys of each state, separated by blanks."""
    return StageStatus(name, {s: keys.get(s, "").split() for s in status.STATES}, live=live or {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    for module in (live, watch):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_of_what_was_done_while_one_looked(clock: list[float]) -> None:
    rates = Rates()
    assert rates.seconds(stage(missing="a b c")) is None, "nothing is under way"
    first = stage(live={"a": Live("epoch", 8, 10)}, done="z", running="a b", missing="c")
    assert rates.seconds(first) is None
    clock[0] = 10.0
    # a tenth of one in 10 s (a was at 0.8 when it was first seen); of three, 0.1 and two are left
    second = stage(live={"a": Live("epoch", 9, 10)}, done="z", running="a b", missing="c")
    assert rates.seconds(second) == pytest.approx(2.1 * 10 / 0.1)
    clock[0] = 20.0
    third = stage(done="z a", running="b c")
    assert rates.seconds(third) == pytest.approx(2 * 20 / 0.2)
    assert rates.seconds(stage(done="z a b c")) is None


def test_a_stage_that_tells_nothing_of_its_items_has_a_rate_by_those_that_end(clock: list[float]) -> None:
    rates = Rates()
    assert rates.seconds(stage("tile", running="a b", missing="c d")) is None
    clock[0] = 30.0
    assert rates.seconds(stage("tile", done="a", empty="b", running="c", missing="d")) == pytest.approx(30.0)


def test_a_line_a_minute_of_all_side_by_side(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    told = Watch(Work(Path("nowhere")), lines.append)
    now = {f"fold_{i}": Live("epoch", i, 10, now={"loss": 0.5}) for i in range(10)}
    found = [stage("extract e", done="a b"), stage(live=now, done="x", failed="y", running=" ".join(now))]
    monkeypatch.setattr(watch.status, "read", lambda work: found)
    clock[0] = console.LINE_S - 1
    told.minute()
    assert lines == []
    clock[0] += 1
    told.minute()
    told.minute()
    (line,) = lines
    assert line.startswith("train run 1/12, 1 failed, 10 running; fold_0: epoch 0/10, loss 0.500; fold_1: epoch 1/10")
    assert line.endswith("fold_7: epoch 7/10, loss 0.500; and 2 more under way")


def test_elsewhere_a_picture_waits_for_its_minute_while_something_is_under_way(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """But the last one, when nothing is under way any more, comes at once."""
    now = {"fold_1": Live("epoch", 3, 9, each_s=2.0)}
    run = [
        stage(running="fold_0", missing="fold_1"),
        *[stage(live=now, done="fold_0", running="fold_1")] * 31,
        stage(done="fold_0 fold_1"),
    ]
    seen = iter(run)

    def read(work: Work) -> list[StageStatus]:
        try:
            return [next(seen)]
        except StopIteration:
            raise KeyboardInterrupt from None

    def slept(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(watch.status, "read", read)
    monkeypatch.setattr(watch.time, "sleep", slept)
    assert watch.watch(tmp_path) == 0
    text = capsys.readouterr().out
    assert text.count("stage") == 3, text
    said = [line for line in text.splitlines() if line.startswith("train run ")]
    assert said == [
        "train run 0/2, 0 failed, 1 running",
        "train run 1/2, 0 failed, 1 running; fold_1: epoch 3/9, 2.0 s each, about 12 s left; about 30 s left",
    ]
    assert text.rstrip().splitlines()[-2].split("│")[1:3] == [" train run ", "    2 "]


def silent(states: list[Any]) -> str:
    raise Stopped("squeue refuses: the controller is busy")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    folder = JobFolder.new(Work(tmp_path))
    folder.remember("slurm", [Submitted("tile", "7", 2, 2, "")])
    (folder.path / "ends").write_text("tile 1 0 1 node 2026\n")
    monkeypatch.setattr("mhim.pipeline.backends.slurm.look", silent)
    return folder


def test_a_scheduler_that_does_not_answer_ends_no_look(job: JobFolder, tmp_path: Path) -> None:
    (state,) = backends.jobs(Work(tmp_path))
    assert state.line() == (
        "job 7 tile: 1 not ended; its scheduler cannot be asked: squeue refuses: the controller is busy; "
        "1 ended, 1 of them not well"
    )
    assert state.lost == []


def test_a_scheduler_that_never_answers_is_not_followed_for_ever(job: JobFolder, tmp_path: Path) -> None:
    looks: list[int] = []
    with pytest.raises(Stopped, match="cannot be followed: squeue refuses"):
        backends.follow(Work(tmp_path), job.path, 0.001, print, lambda: looks.append(1))
    assert len(looks) == 30, "what the jobs do is in the folder, and told while the scheduler is silent"
