"""Shared fixtures: one small synthetic cohort per test session, its tiles and features, and the command line called in
this process. The processes among which the tests are shared out make each of these once, not once each."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Bags of a few dozen instances gain nothing from threads, and two torch threads on busy cores wait for each other:
# one of the tests that train took 62 s with two and 8 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell that runs the tests in the background has them, and every command they start, ignore Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Folder `name`, filled by `make` in the first process that wants it; the others wait for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each process has a folder of its own in one that they share
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def demo_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with slides/, labels.csv, truth/: eight small labelled slides and the three broken ones. Not to be
    changed."""
    from mhim.pipeline.demo.cohort import make_cohort

    return once(tmp_path_factory, "cohort", lambda folder: make_cohort(folder, n=8, small=True))


@pytest.fixture(scope="session")
def tiled_cohort(tmp_path_factory: pytest.TempPathFactory, demo_cohort: Path) -> Path:
    """Work folder of that cohort after tile and extract with the default settings. Not to be changed: copy it."""
    from mhim.pipeline.cli.main import _main

    def make(work: Path) -> None:
        assert _main(["tile", str(demo_cohort / "slides"), "--work", str(work), "--workers", "1"]) == 1
        assert _main(["extract", "--work", str(work), "--workers", "1"]) == 0

    return once(tmp_path_factory, "tiled", make)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Call the command line here: arguments in; exit code, and standard output and error together, out."""
    from mhim.pipeline.cli.main import _main

    def call(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = _main([str(a) for a in args])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture(autouse=True)
def _trusted() -> None:
    """A test that calls no command may name the plug-ins of these folders, as a program that uses the modules would
    allow them; each command begins with nothing allowed."""
    from mhim.configs import trust

    trust.adopt(trust.Trust(frozenset({"tests"})))
