"""Packing and unpacking stores, trying failures again, logs as JSON, and the state as it changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mhim.pipeline.resume import runlog
from mhim.pipeline.resume.claims import Claims
from mhim.pipeline.resume.stage import Item, Outcome, Plan, Report, State
from mhim.pipeline.store import layout, reading, writing
from mhim.pipeline.upkeep import pack
from tests.pipeline.toys import Toy

Cli = Callable[..., tuple[int, str]]


def stocked(root: Path, n: int = 3) -> layout.Work:
    """A work folder with `n` tile and feature stores, one of them in a folder of its own."""
    work = layout.Work(root)
    for i in range(n):
        slide = f"site/{i}.svs" if i == 0 else f"{i}.svs"
        for path in (work.tile_store(slide), work.feature_store("texture", slide)):
            writer = writing.StoreWriter(path, {"fingerprint": f"{i:016x}"})
            writer.write("coords", np.arange(20 * (i + 1), dtype=np.int32).reshape(-1, 2), chunk_rows=4)
            writer.write("features", np.full((5, 3), i, np.float16))
    return work


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_packed_stores_read_the_same_and_come_back_byte_equal(cli: Cli, tmp_path: Path) -> None:
    work = stocked(tmp_path / "w")
    before = tree(work.root)
    path = work.tile_store("site/0.svs")
    attrs, coords = reading.read_attrs(path), reading.read_array(path, "coords").copy()
    code, text = cli("pack", "--work", work.root)
    assert code == 0
    assert f"{len(before)} files became 6" in text
    slides = ("site/0.svs", "1.svs", "2.svs")
    assert tree(work.root).keys() == {f"{f}/{s}.zarr.zip" for f in ("tiles", "features/texture") for s in slides}
    assert reading.read_attrs(path) == attrs
    assert np.array_equal(reading.read_array(path, "coords"), coords)
    assert reading.array_names(path) == ["coords", "features"]
    assert not os.stat(f"{path}.zip").st_mode & 0o222
    code, text = cli("unpack", "--work", work.root)
    assert code == 0
    assert tree(work.root) == before


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = stocked(tmp_path / "one"), stocked(tmp_path / "two")
    assert pack.pack(one).stores == 6
    assert pack.pack(one).stores == 0
    for path in two.root.rglob("*"):
        os.utime(path, (1, 1))
    pack.pack(two)
    assert tree(one.root) == tree(two.root)


def test_a_store_that_is_being_made_is_left(cli: Cli, tmp_path: Path) -> None:
    work = stocked(tmp_path / "w")
    with Claims(work.tiles / ".claims", 60) as claims:
        assert claims.take("1.svs") is None
        code, text = cli("pack", "--work", work.root)
        assert code == 1
        assert "1 are being made" in text
        assert work.tile_store("1.svs").is_dir()
    assert cli("pack", "--work", work.root)[0] == 0
    assert not work.tile_store("1.svs").is_dir()


def test_pack_that_was_killed_between_its_two_renames_goes_on(tmp_path: Path) -> None:
    work = stocked(tmp_path / "w", n=1)
    before = tree(work.root)
    path = work.tile_store("site/0.svs")
    shutil.copytree(path, tmp_path / "kept")
    pack.pack(work)
    shutil.copytree(tmp_path / "kept", path)  # the zip has its name, the folder still is there
    assert pack.pack(work).stores == 1
    assert not path.exists()
    shutil.copytree(tmp_path / "kept", path)
    pack.unpack(work)
    assert tree(work.root) == before


def test_a_damaged_pack_is_named(tmp_path: Path) -> None:
    work = stocked(tmp_path / "w", n=1)
    pack.pack(work)
    packed = Path(f"{work.tile_store('site/0.svs')}.zip")
    packed.chmod(0o644)
    packed.write_bytes(packed.read_bytes()[:200])
    assert re.search(r"0\.svs\.zarr\.zip is damaged", pack.unpack(work).damaged[0])
    assert packed.exists()


def call(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mhim.pipeline", *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=200)


def test_retry_makes_only_what_failed(demo_cohort: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    good = sorted((demo_cohort / "slides").glob("case_*.svs"))[:2]
    shutil.copy(good[0], slides / "good.svs")
    (slides / "bad.svs").write_text("not a slide")
    tiled = call("--log-json", "tile", "slides", "--work", "w", "--workers", "1", cwd=tmp_path)
    assert tiled.returncode == 1, tiled.stderr
    events = [json.loads(line) for line in tiled.stderr.splitlines() if line.startswith("{")]
    assert {e["key"]: e["state"] for e in events if e["event"] == "item"} == {"bad.svs": "failed", "good.svs": "done"}
    assert [e["event"] for e in events][:: len(events) - 1] == ["start", "end"]

    writing.remove_store(layout.Work(tmp_path / "w").tile_store("good.svs"))  # missing now, and not failed
    shutil.copy(good[1], slides / "bad.svs")
    shown = call("retry", "--failed", "--work", tmp_path / "w", "--dry-run")
    assert shown.returncode == 0
    assert "1 failed: pipeline --log-json tile slides --work w --workers 1" in shown.stderr
    again = call("retry", "--failed", "--work", tmp_path / "w")
    assert again.returncode == 0, again.stderr
    assert [p.name for p in (tmp_path / "w" / "tiles").iterdir()] == ["bad.svs.zarr"]
    assert "nothing failed" in call("retry", "--failed", "--work", tmp_path / "w").stderr


def test_the_newest_outcome_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    def log(name: str, t: str, state: str) -> None:
        start = json.dumps({"event": "start", "t": t, "command": ["pipeline", name]})
        line = json.dumps({"event": "item", "t": t, "stage": "tile", "key": "a", "state": state})
        (tmp_path / f"{name}.jsonl").write_text(f'{start}\n{line}\n{{"event": "item", "t": "9999", "sta')

    log("2", "2026-01-02", "failed")
    log("1", "2026-01-01", "done")
    assert runlog.last_outcomes(tmp_path) == {("tile", "a"): Outcome("a", State.FAILED)}
    assert runlog.last_failures(tmp_path)["tile", "a"]["command"] == ["pipeline", "2"]
    log("3", "2026-01-03", "done")
    assert runlog.last_failures(tmp_path) == {}


def test_status_tells_the_folds_that_an_interrupted_training_misses(tmp_path: Path) -> None:
    from mhim.configs.schema import Config
    from mhim.pipeline.upkeep import status

    work = stocked(tmp_path / "w", n=1)
    work.cohort.write_text("slide,path,mpp\nsite/0.svs,/a/0.svs,0.5\n")
    writing.StoreWriter(work.run("abmil") / "fold_0", {})
    writing.seal(work.run("abmil") / "fold_0", {})

    def command(epochs: int, todo: list[str]) -> None:
        config = Config.model_validate({"train": {"epochs": epochs}})
        log = runlog.RunLog(work.runs, "train abmil", config)
        log.planned(Plan(Toy(tmp_path), todo=[Item(key, work.run("abmil") / key) for key in todo]))

    command(1, ["fold_0", "fold_8"])  # an older command, of other settings: what it wanted is nobody's wish any more
    time.sleep(0.01)
    for shard in (["fold_0", "fold_2"], ["fold_1"]):
        command(2, shard)
    (run,) = (s for s in status.read(work) if s.name == "train abmil")
    assert run.keys["done"] == ["fold_0"]
    assert run.keys["missing"] == ["fold_1", "fold_2"]


def test_status_of_features_that_came_without_slides(tmp_path: Path) -> None:
    from mhim.pipeline.cohort.labels.rows import CohortError
    from mhim.pipeline.upkeep import status

    work = layout.Work(tmp_path / "w")
    with pytest.raises(CohortError, match="holds no tiled cohort"):
        status.read(work)
    for path in (work.feature_store("texture", "a.svs"), work.run("abmil") / "fold_0"):
        writing.StoreWriter(path, {})
        writing.seal(path, {})
    found = {s.name: s.keys for s in status.read(work)}
    assert found["tile"] == {state: [] for state in status.STATES}
    assert found["extract texture"]["done"] == ["a.svs"]
    assert found["train abmil"]["done"] == ["fold_0"]
    assert status.show(work.root) == 0


def test_watched_status_shows_what_changes(tmp_path: Path) -> None:
    work = stocked(tmp_path / "w", n=2)
    work.cohort.write_text("slide,path,mpp\n1.svs,/a/1.svs,0.5\n7.svs,/a/7.svs,0.5\n")
    command = [sys.executable, "-m", "mhim.pipeline", "status", "--watch", "--work", str(work.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    while "└" not in text:
        text = process.stdout.readline()
    work.tile_store("1.svs").rename(work.tile_store("7.svs"))
    writing.StoreWriter(work.tile_store("1.svs"), {"fingerprint": "1"})
    text = ""
    while "└" not in text:
        text += process.stdout.readline()
    assert "tile" in text
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_a_log_and_its_summary_tell_what_ran_and_what_failed(tmp_path: Path) -> None:
    from mhim.configs.schema import Config

    outcomes = [
        Outcome("a.svs", State.DONE, 2.0, numbers={"tiles": 10}),
        Outcome("b.svs", State.DONE, 4.0, numbers={"tiles": 5}),
        Outcome("c|d.svs", State.FAILED, 1.0, "cannot be\nread", trace="Traceback ..."),
    ]
    with runlog.RunLog(tmp_path, "tile", Config()) as log:
        log.planned(Plan(Toy(tmp_path), todo=[Item(o.key, tmp_path / o.key) for o in outcomes]))
        for outcome in outcomes:
            log.watch(outcome)
        log.finished(Report("tile", [*outcomes, Outcome("e.svs", State.SKIPPED)]))
    (path,) = tmp_path.glob("*.jsonl")
    start, planned, *items, end = runlog.events(path)
    assert (start["event"], planned["todo"], len(items), end["event"]) == ("start", 3, 3, "end")
    assert start["settings"] == layout.fingerprint(Config().model_dump(mode="json"))
    assert start["versions"]["numpy"] == np.__version__
    summary = path.with_suffix(".summary.md").read_text()
    assert "2 done, 1 failed; 1 done before" in summary
    assert "| sum of tiles | 15 |" in summary
    assert "| c\\|d.svs | cannot be read |" in summary
    found = runlog.last_outcomes(tmp_path)
    assert found["tile", "c|d.svs"] == outcomes[2]


def test_a_command_with_nothing_to_do_leaves_no_log(tmp_path: Path) -> None:
    with runlog.RunLog(tmp_path / "runs", "tile") as log:
        log.planned(Plan(Toy(tmp_path)))
    assert not (tmp_path / "runs").exists()


def test_a_log_that_cannot_be_written_says_so_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with runlog.RunLog(tmp_path / "runs", "tile") as log:
        log.watch(Outcome("a", State.DONE))
    assert "runs" in log.broken
