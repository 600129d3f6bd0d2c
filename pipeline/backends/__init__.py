"""Where items run: one file per kind of machine, each offering `Params` and `run`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from pydantic import BaseModel

from mhim.configs.schema import ClusterConfig
from mhim.pipeline.resume.stage import Item, Outcome, Stage


class BackendModule(Protocol):
    """What a file of this folder offers."""

    Params: type[BaseModel]

    def run(
        self, stage: Stage, items: list[Item], replace: bool, remake: bool, cluster: ClusterConfig
    ) -> Iterator[Outcome]:
        """Make every item somewhere, by `mhim.pipeline.resume.runner.make_one`, and yield each outcome as it comes."""
        ...
