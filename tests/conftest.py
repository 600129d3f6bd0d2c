"""Shared fixtures: one small synthetic cohort per test session, and the command line called in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Bags of a few dozen instances gain nothing from threads, and two torch threads on busy cores wait for each other:
# one of the tests that train took 62 s with two and 8 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with slides/, labels.csv, truth/: eight small labelled slides and the three broken ones."""
    from pipeline.demo import make_cohort

    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, n=8, small=True)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call the command line here: arguments in; exit code, and standard output and error together, out."""
    from pipeline.cli import _main

    def call(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = _main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call
