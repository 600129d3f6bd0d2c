"""A scheduler in one file: the first verb of a submission is done at once, on this machine; the others wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from pydantic import Field

from mhim.configs import lookup
from mhim.configs.schema import Config
from mhim.pipeline.backends import ArrayState, JobFolder, SchedulerParams, Step, Submitted
from mhim.pipeline.store.layout import Work

NAME = __name__


class Params(SchedulerParams):
    """What `cluster.backend_params` may hold."""

    queue: str = Field("short", description="name of the queue")


def submit(work: Work, config: Config, steps: list[Step], replace: bool = False) -> tuple[Path, list[Submitted]]:
    """Do the first step's share, one task; the others only get a number."""
    params: Params = lookup.params(sys.modules[NAME], config.cluster.backend_params)
    folder = JobFolder.new(work)
    arrays = []
    for number, step in enumerate(steps, 1):
        folder.freeze(step, config, workers=1)
        arrays.append(Submitted(step.verb, f"{params.queue}-{number}", 1, step.most, ""))
    folder.remember(NAME, arrays)
    first = folder.arguments(steps[0], replace)
    task = subprocess.run(
        [sys.executable, "-P", "-m", "mhim.pipeline", *first, "--shard", "1/1"],
        env={**os.environ, "PIPELINE_SUBMITTED_BY": NAME},
        capture_output=True,
        check=False,
    )
    (folder.path / "logs" / "first.log").write_bytes(task.stdout + task.stderr)
    with open(folder.path / "ends", "a") as ends:
        ends.write(f"{steps[0].verb} 1 0 {task.returncode} here {time.time():.0f}\n")
    return folder.path, arrays


def look(states: list[ArrayState]) -> str:
    """The first of each submission has ended; the others wait for ever, unless the queue was closed."""
    for state in states:
        if not state.ended and not (state.folder / "closed").exists():
            state.waiting[1] = "the one before"
    return ""
