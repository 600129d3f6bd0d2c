"""Shared fixtures: one small synthetic cohort per test session, its tiles and features, and the command line called in
this process. The processes among which the tests are shared out make each of these once, not once each."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# no test asserts a time
settings.register_profile("any_time", deadline=None)
settings.load_profile("any_time")
# Bags of a few dozen instances gain nothing from threads, and two torch threads on busy cores wait for each other:
# one of the tests that train took 62 s with two and 8 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A command that is not told how many processes to work with takes one: the cores have tests of their own, and each
# process more imports torch for 3 s to train three tiny bags. What is done by several is tested where it says so.
os.environ.setdefault("PYTHON_CPU_COUNT", "1")
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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, of each file of GPU tests one is skipped and stands for all that were asked for."""
    of_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            of_file.setdefault(item.path, []).append(item)
    if not of_file:
        return
    import torch

    if torch.cuda.is_available():
        return
    left_out: set[pytest.Item] = set()
    for path, tests in of_file.items():
        tests[0].add_marker(pytest.mark.skip(reason=f"needs a GPU: all {len(tests)} tests of {path.name}"))
        tests[0].user_properties.append(("stands_for", len(tests)))
        left_out.update(tests[1:])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line that counts the tests that were skipped, by what they need: reasons read `needs WHAT: details`."""
    skipped = terminalreporter.stats.get("skipped", [])
    lines: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith("needs "):
            reason = reason.partition(":")[0]
        lines[reason] += 1
        tests[reason] += dict(report.user_properties).get("stands_for", 1)
    told = [f"{n} {reason}{f', for {tests[reason]} tests' * (tests[reason] > n)}" for reason, n in lines.most_common()]
    terminalreporter.write_line(f"skipped: {len(skipped)}" + f" ({'; '.join(told)})" * bool(told))


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
