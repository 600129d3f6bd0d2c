"""Each verb, killed with SIGKILL at random moments and started again, ends in the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mhim.pipeline.store.may_differ import results, unfinished

SETTINGS = ["--set", "train.epochs=4", "--set", "train.folds=2", "--set", "train.patience=0", "--set", "train.seed=3"]


def commands(cohort: Path) -> list[tuple[str, list[str], int, int]]:
    """Name, arguments, exit code (1: the broken slides) and number of kills of each verb."""
    train = ["--labels", str(cohort / "labels.csv"), "--model", "mhim", "--name", "mhim", *SETTINGS]
    return [
        ("tile", [str(cohort / "slides"), "--mpp", "1", "--tile-px", "112", "--workers", "2"], 1, 2),
        # small chunks, so that a slide is more than one and a kill can fall inside it
        ("extract", ["--workers", "2", "--set", "extract.chunk_rows=64"], 0, 2),
        # each of these imports torch, which takes longer than what it does then; more kills are in `test_chaos`
        ("train", train, 0, 1),
        ("score", ["--name", "mhim", "--set", "score.bootstrap=50", "--set", "score.heatmap_limit=2"], 0, 1),
    ]


def start(verb: str, args: list[str], work: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mhim.pipeline", verb, *args, "--work", str(work)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def killed_at_work(process: subprocess.Popen[str], work: Path, delay_s: float) -> bool:
    """Kill the command so long after it took its first item; False if it ended before. While it imports, nothing can be
    half-made."""
    began = time.time()
    while process.poll() is None and not any(claimed(work, since=began)):
        time.sleep(0.02)
    try:
        process.wait(timeout=delay_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def claimed(work: Path, since: float) -> Iterator[bool]:
    for claim in (*work.glob("*/.claims/*.json"), *work.glob("*/*/.claims/*.json")):
        with contextlib.suppress(FileNotFoundError):  # given back meanwhile
            yield claim.stat().st_mtime > since


@pytest.mark.timeout(900)
def test_killed_verbs_end_in_the_same_bytes(demo_cohort: Path, tmp_path: Path) -> None:
    calm, shot = tmp_path / "calm", tmp_path / "shot"
    for verb, args, code, _ in commands(demo_cohort):
        process = start(verb, args, calm)
        _, text = process.communicate(timeout=300)
        assert process.returncode == code, text
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    killed = 0
    for verb, args, code, kills in commands(demo_cohort):
        for _ in range(kills):
            killed += killed_at_work(start(verb, args, shot), shot, rng.uniform(0.0, 0.6))
        process = start(verb, args, shot)
        _, text = process.communicate(timeout=300)
        assert process.returncode == code, text
    assert killed >= 4, "the kills came too late to test anything"
    wanted, got = results(calm), results(shot)
    assert not unfinished(shot)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if wanted[name] != got[name]] == []
