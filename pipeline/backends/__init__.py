"""Where items run: one file per kind of machine. It either makes items itself or hands verbs to a scheduler.

A file of this folder, or one of a user's own, is a back end by what it offers: `Params` and `run` (`ItemBackend`), or
`Params`, `submit` and `look` (`Scheduler`). Nothing else names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from mhim.configs.schema import ClusterConfig, Config
from mhim.pipeline.backends._submission import (
    ArrayState,
    JobFolder,
    SchedulerParams,
    Step,
    Submitted,
    follow,
    jobs,
    submits,
)
from mhim.pipeline.resume.stage import Item, Outcome, Stage
from mhim.pipeline.store.layout import Work

__all__ = [
    "ArrayState",
    "ItemBackend",
    "JobFolder",
    "Scheduler",
    "SchedulerParams",
    "Step",
    "Submitted",
    "follow",
    "jobs",
    "submits",
]


class ItemBackend(Protocol):
    """A back end that makes items."""

    Params: type[BaseModel]

    def run(
        self, stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig
    ) -> Iterator[Outcome]:
        """Make every item somewhere, by `mhim.pipeline.resume.runner.make_one`, and yield each outcome as it comes."""
        ...


class Scheduler(Protocol):
    """A back end that hands verbs to a scheduler. Its tasks give the program's own command, one share of the items
    each; `JobFolder` freezes what they read and has their arguments."""

    Params: type[SchedulerParams]

    def submit(
        self, work: Work, config: Config, steps: list[Step], replace: bool = False
    ) -> tuple[Path, list[Submitted]]:
        """Submit `steps`, each after the one before, and return at once: the path of the job folder, whose `job.json`
        names this back end (`JobFolder.remember`), and one array per step.

        Raises Stopped where the scheduler is absent or refuses (nothing is submitted then), LookupFailed for an unknown
        setting."""
        ...

    def look(self, states: list[ArrayState]) -> str:
        """Fill in which tasks are `running` and `waiting` now, and take out of `ended` those that were started again.
        Returns "", or why the scheduler cannot be asked on this machine. Raises Stopped where it does not answer."""
        ...
