"""A toy stage with cheap, checkable items, and a way to run it as a command that can be killed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhim.configs.schema import ClusterConfig
from mhim.pipeline.backends import local
from mhim.pipeline.resume import runner
from mhim.pipeline.resume.stage import Item, Made, Stage, plan
from mhim.pipeline.store import writing

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Toy(Stage):
    """Items of a few files each. bad: keys that fail; none: keys that are empty; deadly: keys whose process dies.

    calls: a folder in which each call of `make` leaves a file, so that double work can be counted."""

    root: Path
    n: int = 6
    seconds: float = 0.0
    value: int = 1
    bad: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    deadly: tuple[str, ...] = ()
    calls: Path | None = None
    steps: int = 1
    name = "toy"

    def items(self) -> list[Item]:
        return [Item(f"item_{i:03d}", self.root / f"item_{i:03d}", {"i": i}, i) for i in range(self.n)]

    def settings(self) -> dict[str, Any]:
        return {"toy.value": self.value}

    def make(self, item: Item, out: Path, partial: Path) -> Made:
        if self.calls is not None:
            self.calls.mkdir(parents=True, exist_ok=True)
            (self.calls / f"{item.key}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if item.key in self.bad:
            raise ValueError(f"{item.key} is bad; mend it")
        if item.key in self.deadly:
            os._exit(7)
        for step in range(self.steps):
            done = partial / f"{step}"
            if not done.exists():
                time.sleep(self.seconds / self.steps)
                writing.write_atomic(done, b"done")
        out.mkdir()
        for part in ("a", "b", "c"):
            text = f"{item.key}/{part}/{self.value}/{item.inputs['i']}"
            (out / part).write_bytes(hashlib.sha256(text.encode()).digest() * 40)
            time.sleep(self.seconds / 10)
        return Made(empty="nothing in it" if item.key in self.none else None, numbers={"parts": 3})


def run(stage: Stage, workers: int = 1, lease_s: float = 60.0, only: Any = list, **more: Any) -> Any:
    """The stage through the local back end, as the verbs do it."""
    cluster = ClusterConfig(workers=workers, lease_s=lease_s)

    def backend(stage: Stage, items: list[Item], replace: bool, remake: bool) -> Any:
        return local.run(stage, items, replace, remake, cluster)

    with runner.leaving():
        return runner.run(plan(stage, only(stage.items())), backend, lease_s=lease_s, **more)


def start(stage: Toy, workers: int = 1, lease_s: float = 60.0) -> subprocess.Popen[str]:
    """The same in a process of its own, leader of its own group; its exit code is the report's."""
    code = (
        "import sys; from pathlib import Path, PosixPath\n"
        "from tests.pipeline.toys import Toy, run\n"
        f"report = run({stage!r}, {workers}, {lease_s})\n"
        "print(report.stopped, file=sys.stderr); sys.exit(report.exit_code)"
    )
    # the tests are found by their path, whatever an earlier test left in the environment
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`, private ones included: a finished stage leaves none."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
