"""A few rounds of chaos, for at most a minute; `python -m tests.benchmarks.chaos --rounds 200` goes on for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(sys.platform != "linux", reason="the rounds fork, stop and mount")
@pytest.mark.timeout(300)
def test_whatever_happens_to_a_work_folder_its_promises_hold() -> None:
    seed = os.environ.get("CHAOS_SEED", "suite")
    line = [
        sys.executable,
        "-m",
        "tests.benchmarks.chaos",
        "--rounds",
        "12",
        "--seconds",
        "35",
        "--seed",
        seed,
    ]
    ended = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert " rounds of seed " in ended.stdout
