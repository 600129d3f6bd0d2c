"""What people get wrong, and what machines do to them: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mhim.pipeline.resume import runner
from mhim.pipeline.store import reading

Cli = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tiled(tiled_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with the small cohort tiled and its features extracted."""
    return Path(shutil.copytree(tiled_cohort, tmp_path_factory.mktemp("tiled") / "work"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["frobnicate"], "frobnicate"),
        (["tile"], "slides"),
        (["tile", "slides", "--tile-px", "many"], "--tile-px"),
        (["tile", "slides", "--tile-pxl", "256"], "--tile-pxl"),
        (["extract", "--gpus", "first"], "--gpus"),
        (["tile", ".", "--mpp", "0.5,1,0.5"], "tile.mpp: each µm per px once"),
        (["tile", ".", "--set", "tile.segmenter=''"], "tile.segmenter"),
        (["tile", ".", "--segmenter", ""], "--segmenter is empty"),
        (["tile", ".", "--work", __file__], "--work"),
        (["status", "--work", __file__], "--work"),
        (["pack", "--work", "not_there"], "not_there does not exist"),
        (["unpack", "--work", "not_there"], "not_there does not exist"),
    ],
)
def test_a_mistyped_command_is_a_mistake_and_no_fault(cli: Cli, args: list[str], words: str) -> None:
    code, text = cli(*args)
    assert code == 2, text
    assert words in text
    assert "Traceback" not in text


def test_missing_and_empty_folders(cli: Cli, tmp_path: Path) -> None:
    code, text = cli("tile", tmp_path / "none", "--work", tmp_path / "w")
    assert code == 2
    assert "does not exist" in text
    (tmp_path / "empty").mkdir()
    code, text = cli("tile", tmp_path / "empty", "--work", tmp_path / "w")
    assert code == 2
    assert "it is empty" in text


def test_bad_slides_are_recorded_and_the_others_go_on(cli: Cli, demo_cohort: Path, tiled: Path) -> None:
    code, text = cli("tile", demo_cohort / "slides", "--work", tiled, "--workers", 1)
    assert code == 1
    assert "no_mpp.svs" in text
    assert "column `mpp`" in text
    assert "truncated.svs" in text
    empty = reading.read_attrs(tiled / "tiles" / "no_tissue.svs.zarr")
    assert empty["empty"]
    assert len(list((tiled / "tiles").glob("case_*.zarr"))) == 8


def test_status_names_each_failure_and_its_reason(cli: Cli, demo_cohort: Path, tiled: Path) -> None:
    cli("tile", demo_cohort / "slides", "--work", tiled, "--workers", 1)
    code, text = cli("status", "--work", tiled)
    assert code == 1
    assert "tile: failed no_mpp.svs" in text
    assert "column `mpp`" in text
    assert "tile: empty no_tissue.svs" in text


def test_a_manifest_row_rescues_the_slide_without_mpp(cli: Cli, demo_cohort: Path, tmp_path: Path) -> None:
    manifest = demo_cohort / "manifest.csv"
    manifest.write_text("slide,mpp\nslides/no_mpp.svs,0.5\n")
    code, text = cli("tile", manifest, "--work", tmp_path / "w", "--workers", 1)
    assert code == 0, text
    attrs = reading.read_attrs(tmp_path / "w" / "tiles" / "slides" / "no_mpp.svs.zarr")
    assert attrs["slide_mpp"] == [0.5, 0.5]
    assert "manifest" in attrs["mpp_source"]


def test_other_parameters_are_refused_and_named(cli: Cli, demo_cohort: Path, tiled: Path) -> None:
    before = (tiled / "tiles" / "case_01.svs.zarr" / "zarr.json").read_bytes()
    code, text = cli("tile", demo_cohort / "slides", "--work", tiled, "--tile-px", 128)
    assert code == 3
    assert "tile.tile_px: 256 there, 128 now" in text
    assert "--replace" in text
    assert (tiled / "tiles" / "case_01.svs.zarr" / "zarr.json").read_bytes() == before


def test_dry_run_changes_nothing_and_says_why(cli: Cli, demo_cohort: Path, tiled: Path) -> None:
    code, text = cli("tile", demo_cohort / "slides", "--work", tiled, "--min-tissue", 0.5, "--dry-run")
    assert code == 3
    assert "refuse  case_01.svs: tile.min_tissue: 0.3 there, 0.5 now" in text
    assert "make    no_mpp.svs: missing" in text
    assert "refuse  tile.min_tissue: 0.3 there, 0.5 now\n" in text  # the count's line


def test_dry_run_of_many_items_counts_and_lists_on_request(cli: Cli, tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"s{i:02}.svs").write_bytes(b"never opened by a plan")
    code, text = cli("tile", tmp_path, "--work", tmp_path / "w", "--dry-run")
    assert code == 0
    assert "tile: 25 items" in text
    assert "25 make    missing" in text
    assert "s07.svs" not in text
    assert len(text.splitlines()) < 8
    code, text = cli("tile", tmp_path, "--work", tmp_path / "w", "--dry-run", "--list")
    assert code == 0
    assert sum("make    s" in line for line in text.splitlines()) == 25
    assert not (tmp_path / "w").exists()


def test_verbs_out_of_order_say_what_comes_first(cli: Cli, tmp_path: Path) -> None:
    for verb in ("extract", "train"):
        code, text = cli(verb, "--work", tmp_path / "nothing")
        assert code == 2
        assert "pipeline tile" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--encoder", "nonesuch"], "nonesuch"),
        (["--set", "extract.nonesuch=1"], "extract.nonesuch: unknown key"),
        (["--shard", "5/3"], "--shard"),
        (["--backend", "nonesuch"], "pipeline/backends/nonesuch.py"),
        (["--config", "nonesuch"], "no preset"),
    ],
)
def test_unknown_names_list_what_exists(cli: Cli, tiled: Path, args: list[str], words: str) -> None:
    code, text = cli("extract", "--work", tiled, *args)
    assert code == 2, text
    assert words in text


def test_gpu_on_a_machine_without_one_stops(cli: Cli, tiled: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    work = tmp_path / "w"
    shutil.copytree(tiled, work, ignore=shutil.ignore_patterns("features"))
    code, text = cli("extract", "--gpu", "--work", work)
    assert code == 2, text
    assert "GPU" in text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("slide,label\ncase_01.svs,a\ncase_01.svs,b\n", "stands in row 2"),
        ("slide,stage\ncase_01.svs,a\n", "neither a class nor time and event; it has the columns slide, stage"),
        ("slide,patient,label\ncase_01.svs,p,a\ncase_02.svs,p,b\n", "patient 'p'"),
        ("slide,label\n" + "".join(f"case_0{i}.svs,a\n" for i in range(1, 9)), "class"),
        ("slide,label\ncase_01.svs,a\ncase_02.svs,b\ncase_03.svs,a\n", "folds"),
    ],
)
def test_labels_that_cannot_be_trained_on(cli: Cli, tiled: Path, tmp_path: Path, rows: str, words: str) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(rows)
    code, text = cli("train", "--work", tiled, "--labels", labels, "--model", "abmil", "--name", "bad")
    assert code == 2, text
    assert words in text


def test_a_full_disk_stops_with_one_message_and_keeps_what_is_done(demo_cohort: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount: a small file system")
    try:
        args = ["tile", demo_cohort / "slides", "--work", disk / "w", "--workers", "1"]
        command = [sys.executable, "-m", "mhim.pipeline", *args]
        ran = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert ran.returncode == 1
        assert "disk is full" in ran.stderr or "No space left" in ran.stderr
        assert "Traceback" not in ran.stderr
        for done in (disk / "w" / "tiles").glob("*.zarr"):
            assert reading.read_array(done, "coords").shape[1] == 2
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert again.returncode == 1  # the two broken slides
        assert len(list((disk / "w" / "tiles").glob("*.zarr"))) == 9
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_work_folder_stops_with_one_message(demo_cohort: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount: a read-only file system")
    try:
        command = [sys.executable, "-m", "mhim.pipeline", "tile", demo_cohort / "slides", "--work", disk / "w"]
        ran = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert ran.returncode == 1
        assert "the file system is read-only" in ran.stderr
        assert "--work" in ran.stderr
        assert "Traceback" not in ran.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_who_is_told_to_end_says_so(
    cli: Cli, tiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mhim.pipeline.stages import session as session_
    from mhim.pipeline.stages import verbs

    def told(session: session_.Session) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    with runner.leaving():
        monkeypatch.setattr(verbs, "extract", told)
        with pytest.raises(SystemExit, match="143"):
            cli("extract", "--work", tiled)
    assert "the same command goes on from there" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done_and_says_so(demo_cohort: Path, tmp_path: Path) -> None:
    work = tmp_path / "w"
    command = [sys.executable, "-m", "mhim.pipeline", "tile", demo_cohort / "slides", "--work", work, "--workers", "2"]
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((work / "tiles").glob("*.zarr")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=60)
    if process.returncode == 1:
        pytest.skip("it was done before the interruption came")
    assert process.returncode == 130, text
    assert "interrupted" in text
    assert "Traceback" not in text
    for done in (work / "tiles").glob("*.zarr"):
        reading.read_array(done, "coords")
    assert subprocess.run([str(c) for c in command], capture_output=True).returncode == 1
    assert len(list((work / "tiles").glob("*.zarr"))) == 9


@pytest.mark.parametrize(
    "line",
    [
        ["status", "--work", ""],
        ["tile", ""],
        ["tile", "slides", "--work="],
        ["weights", "fetch", "uni", "--to", ""],
        ["train", "--labels", "", "--work", "w"],
    ],
)
def test_an_empty_path_is_refused_and_is_not_the_working_folder(
    cli: Cli, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = cli(*line)
    assert code == 2
    assert "is empty (a shell variable that is not set?)" in text
    assert list(tmp_path.iterdir()) == []


def test_a_setting_may_be_set_to_nothing(cli: Cli) -> None:
    assert "is empty (a shell variable" not in cli("config", "--set", "cluster.backend=")[1]


def test_settings_that_the_local_back_end_does_not_have_are_told(cli: Cli, tiled: Path) -> None:
    code, text = cli("extract", "--work", tiled, "--workers", "1", "--wait")
    assert code == 0
    assert "the back end local has no settings; not used of cluster.backend_params: wait" in " ".join(text.split())


def test_a_stage_that_cannot_begin_leaves_no_folder(cli: Cli, tiled: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_enc.py").write_text("def encoder(missing):\n    return missing\n")
    code, text = cli("extract", "--work", tiled, "--encoder", f"{tmp_path}/broken_enc.py", "--workers", "1")
    assert code != 0, text
    assert [p.name for p in (tiled / "features").iterdir()] == ["texture"]
