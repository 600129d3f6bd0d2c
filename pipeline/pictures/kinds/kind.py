"""What the pictures of one kind of outcome are: the interface that a kind fills.

In: a scored run's rows and numbers, or a slide's tile scores. Out: figures and table cells of the report, and layers of
one number per tile. A new kind of outcome is one more file beside this one, as in `results/measures`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mhim.mil import heatmap
from mhim.mil.heatmap import Scaled
from mhim.mil.tasks import Task
from mhim.pipeline.results import measures
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics

Drawing = Callable[[Any], None]


@dataclass(frozen=True)
class Layer:
    """One number per tile. signed: its zero divides for from against. share: it is one of a whole, and so drawn; of
    what, `means` tells."""

    name: str
    scores: np.ndarray
    signed: bool = False
    share: bool = False
    means: str = "share of the training"

    def scaled(self, how: Literal["percentile", "raw"]) -> Scaled:
        """Its scores as positions on the colour scale."""
        return heatmap.scaled(self.scores, "share" if self.share else how, self.signed)


class Kind(ABC):
    """The pictures of one kind of outcome, for one task. titles: figure -> what stands above it in the report.
    columns: of the report's table of patients, after patient, slides and fold."""

    titles: ClassVar[dict[str, str]]

    def __init__(self, task: Task) -> None:
        self.task, self.measure = task, measures.of(task)

    @abstractmethod
    def figures(self, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Drawing]:
        """Name -> drawing. rows: one per patient; each: one per patient and training."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Of the table of patients, after patient, slides and fold."""

    @abstractmethod
    def cells(self, row: Row) -> list[tuple[str, str]]:
        """A row's text below each of `columns`, and its mark: `n` for numbers, `wrong` for mistakes."""

    @abstractmethod
    def caption(self, row: Row) -> str:
        """What stands below the picture of a slide."""

    @abstractmethod
    def mistakes(self, rows: Sequence[Row]) -> list[float]:
        """How wrong each of `rows`, one per patient, is, from 0."""

    @abstractmethod
    def layers(self, attention: np.ndarray, evidence: np.ndarray, which: str) -> list[Layer]:
        """Layers out of a model's evidence. attention: (n,), the tile's share in the answer; evidence: float64
        (n, n_out), what the models say of the tile, as `Task.of_tiles` gives it. which: a value of score.heatmaps."""

    def files(self, out: Path, together: Sequence[Row]) -> None:
        """Pictures that stand beside the numbers of a scored run."""
