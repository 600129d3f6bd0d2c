"""The resumable stage on a toy: plans, refusals, isolation of failures, workers that die, disks that are full."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mhim.pipeline.resume import runner
from mhim.pipeline.resume.stage import Outcome, Plan, Refused, State, plan
from mhim.pipeline.store import layout, writing
from tests.pipeline.toys import Toy, run, tree


def states(report: object) -> dict[str, str]:
    return {o.key[-1]: str(o.state) for o in report.outcomes}  # type: ignore[attr-defined]


def test_same_command_again_does_only_what_is_missing(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=4, calls=tmp_path / "calls")
    assert states(run(stage)) == dict.fromkeys("0123", "done")
    before = tree(stage.root)
    writing.remove_store(stage.root / "item_002")
    assert states(run(stage)) == {"0": "skipped", "1": "skipped", "2": "done", "3": "skipped"}
    assert tree(stage.root) == before
    assert len(list((tmp_path / "calls").iterdir())) == 5


def test_every_output_says_what_made_it(tmp_path: Path) -> None:
    run(Toy(tmp_path / "t", n=1, value=5))
    seal = json.loads((tmp_path / "t" / "item_000" / "manifest.json").read_text())
    assert seal["settings"] == {"stage": "toy", "format": layout.FORMAT, "toy.value": 5, "input.i": 0}
    assert seal["fingerprint"] == layout.fingerprint(seal["settings"])


def test_other_parameters_are_refused_before_any_work(tmp_path: Path) -> None:
    run(Toy(tmp_path / "t", n=2))
    before = tree(tmp_path / "t")
    with pytest.raises(Refused, match=r"item_000, item_001: toy.value: 1 there, 2 now(.|\n)*--replace"):
        run(Toy(tmp_path / "t", n=3, value=2))
    assert tree(tmp_path / "t") == before, "not even the missing item was made"


def test_replace_makes_anew_and_leaves_what_fits(tmp_path: Path) -> None:
    run(Toy(tmp_path / "t", n=2))
    run(Toy(tmp_path / "fresh", n=3, value=2))
    report = run(Toy(tmp_path / "t", n=3, value=2), replace=True)
    assert states(report) == dict.fromkeys("012", "done")
    assert tree(tmp_path / "t") == tree(tmp_path / "fresh")
    assert states(run(Toy(tmp_path / "t", n=3, value=2), replace=True)) == dict.fromkeys("012", "skipped")


def test_one_bad_item_never_stops_the_others(tmp_path: Path) -> None:
    seen: list[Outcome] = []
    report = run(Toy(tmp_path / "t", n=4, bad=("item_001",)), watch=seen.append)
    assert states(report) == {"0": "done", "1": "failed", "2": "done", "3": "done"}
    assert report.exit_code == 1
    failure = report.failures[0]
    assert failure.message == "ValueError: item_001 is bad; mend it"
    assert "toys.py" in failure.trace
    assert seen == report.outcomes
    assert run(Toy(tmp_path / "t", n=4)).exit_code == 0, "mended, the same command makes just that one"


def test_empty_is_a_committed_result(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=2, none=("item_000",))
    assert states(run(stage)) == {"0": "empty", "1": "done"}
    again = run(stage)
    assert states(again) == {"0": "empty", "1": "skipped"}
    assert again.outcomes[0].message == "nothing in it"


def test_a_damaged_seal_is_made_anew(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=2)
    run(stage)
    (stage.root / "item_001" / "manifest.json").write_text('{"fingerprint": "12')
    assert "manifest.json is damaged" in plan(stage, stage.items()).damaged["item_001"]
    assert states(run(stage)) == {"0": "skipped", "1": "done"}
    run(Toy(tmp_path / "fresh", n=2))
    assert tree(stage.root) == tree(tmp_path / "fresh")


def test_the_plan_is_told_before_the_work(tmp_path: Path) -> None:
    told: list[Plan] = []
    stage = Toy(tmp_path / "t", n=3)
    run(stage, only=lambda items: items[1::2])
    run(stage, planned=told.append)
    assert [i.key for i in told[0].todo] == ["item_000", "item_002"]
    assert [o.key for o in told[0].done] == ["item_001"]


def test_a_worker_that_dies_costs_its_item_and_is_replaced(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=6, deadly=("item_000", "item_003"), bad=("item_005",))
    report = run(stage, workers=2)
    assert states(report) == {"0": "failed", "1": "done", "2": "done", "3": "failed", "4": "done", "5": "failed"}
    assert sorted(o.message for o in report.failures)[0] == "ValueError: item_005 is bad; mend it"
    assert sum("died (exit code 7)" in o.message for o in report.failures) == 2
    assert run(Toy(tmp_path / "t", n=6), workers=2).exit_code == 0
    run(Toy(tmp_path / "fresh", n=6))
    assert tree(stage.root) == tree(tmp_path / "fresh")


def test_commands_sweep_at_the_same_time(tmp_path: Path) -> None:
    """Each finds folders that the other removes under its eyes."""
    stage = Toy(tmp_path / "t", n=1)
    for _ in range(10):
        for i in range(150):
            (stage.root / ".partial" / f"item_{i % 50:03d}" / f"part_{i}").mkdir(parents=True)
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(runner.sweep, stage, 60.0) for _ in range(3)]:
                done.result()
        assert not (stage.root / ".partial").exists()


def test_the_sweep_spares_the_living(tmp_path: Path) -> None:
    stage = Toy(tmp_path / "t", n=1)
    mine = stage.root / ".tmp" / f"{layout.owner()}-aaaa"
    theirs = stage.root / ".tmp" / "elsewhere-1-bbbb"
    dead = stage.root / ".tmp" / f"{layout.machine()}-{2**22 + 1}-cccc"
    for folder in (mine, theirs, dead):
        folder.mkdir(parents=True)
    file = stage.root / f".tmp-{layout.machine()}-{2**22 + 1}-dddd"
    file.touch()
    runner.sweep(stage, 60.0)
    assert mine.exists()
    assert theirs.exists()
    assert not dead.exists()
    assert not file.exists()
    os.utime(theirs, (0, 0))
    runner.sweep(stage, 60.0)
    assert not theirs.exists(), "another machine's folder untouched for longer than a day is an orphan"


# ------------------------------------------------------------------------------------------------ disks


def mount(kind: str, target: Path, options: str, flags: int = 0) -> None:
    """A mount, or a skip where this process may not make one."""
    libc = ctypes.CDLL(None, use_errno=True)
    source = str(target).encode() if flags else kind.encode()
    if libc.mount(source, str(target).encode(), kind.encode(), flags, options.encode()) != 0:
        pytest.skip(f"needs the right to mount: {os.strerror(ctypes.get_errno())}")


@pytest.fixture
def mounted(tmp_path: Path) -> object:
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    libc = ctypes.CDLL(None)
    while libc.umount2(str(folder).encode(), 2) == 0:
        continue


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_stops_the_stage_and_keeps_what_is_finished(mounted: Path, workers: int) -> None:
    mount("tmpfs", mounted, "size=160k")
    stage = Toy(mounted / "t", n=40)
    report = run(stage, workers=workers)
    assert report.exit_code == 1
    assert "the disk is full" in report.stopped
    assert "run the same command again" in report.stopped
    made = report.count(State.DONE)
    assert 0 < made < 40
    mount("tmpfs", mounted, "size=2m", flags=32)  # MS_REMOUNT: make room
    again = run(stage, workers=workers)
    assert again.exit_code == 0
    assert again.count(State.SKIPPED) >= made
    run(Toy(mounted.parent / "fresh", n=40))
    assert tree(stage.root) == tree(mounted.parent / "fresh")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_read_only_folder_stops_the_stage(mounted: Path, workers: int) -> None:
    mount("tmpfs", mounted, "size=2m")
    run(Toy(mounted / "t", n=2))
    mount("tmpfs", mounted, "ro,size=2m", flags=32 | 1)  # MS_REMOUNT | MS_RDONLY
    report = run(Toy(mounted / "t", n=4), workers=workers)
    assert report.exit_code == 1
    assert "read-only" in report.stopped
    assert report.count(State.SKIPPED) == 2
    assert report.count(State.FAILED) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_fatal_errors_stop_where_nothing_can_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(out: Path, final: Path) -> bool:
        if final.name == "item_002":
            raise OSError(number, os.strerror(number), str(final))
        return real(out, final)

    real = writing.commit
    monkeypatch.setattr(writing, "commit", refuse)
    report = run(Toy(tmp_path / "t", n=4))
    assert report.count(State.DONE) == 2
    assert "item_002" in report.stopped
    assert not (tmp_path / "t" / "item_002").exists()


def test_other_errors_of_the_system_are_the_items_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(out: Path, final: Path) -> bool:
        if final.name == "item_002":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(final))
        return real(out, final)

    real = writing.commit
    monkeypatch.setattr(writing, "commit", refuse)
    report = run(Toy(tmp_path / "t", n=4))
    assert (report.count(State.DONE), report.count(State.FAILED), report.stopped) == (3, 1, "")
