"""Pictures of a number: predicted against true values; the value and its signed contribution per tile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mhim.mil.tasks import Regression as Task
from mhim.pipeline.pictures import figures
from mhim.pipeline.pictures.kinds.kind import Drawing, Kind, Layer
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics


class Regression(Kind):
    """See the module."""

    titles: ClassVar[dict[str, str]] = {"scatter": "Predicted and true values, with intervals"}

    def figures(self, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Drawing]:
        columns = (np.array([float(r[k]) for r in rows]) for k in ("label", "predicted", "low", "high"))
        return {"scatter": figures.scatter(*columns)}

    @property
    def columns(self) -> list[str]:
        return ["true", "predicted", "low", "high", "error"]

    def cells(self, row: Row) -> list[tuple[str, str]]:
        error = float(row["predicted"]) - float(row["label"])
        wrong = "n wrong" if self.measure.said(row).wrong else "n"
        bounds = [("" if math.isinf(row[k]) else f"{row[k]:.4g}", "n") for k in ("low", "high")]
        return [(f"{float(row['label']):g}", "n"), (f"{row['predicted']:.4g}", "n"), *bounds, (f"{error:+.4g}", wrong)]

    def caption(self, row: Row) -> str:
        return f"true {float(row['label']):g}, {self.measure.answer(row, False)[0]}"

    def mistakes(self, rows: Sequence[Row]) -> list[float]:
        """The absolute error, in the labels' unit."""
        return [abs(float(row["predicted"]) - float(row["label"])) for row in rows]

    def layers(self, attention: np.ndarray, evidence: np.ndarray, which: str) -> list[Layer]:
        """value: of the tile, in the labels' unit, as the evidence is (`Task.of_tiles`). contribution: attention x how
        far that is from the mean of the first training's patients, one zero for all slides of a run: what the tile adds
        to the answer above 0, what it takes away below."""
        assert isinstance(self.task, Task)
        value = evidence[:, 0]
        made = [Layer("value", value)] if which in ("probability", "all") else []
        if which in ("contribution", "all"):
            made.append(Layer("contribution_value", attention * (value - self.task.mean), True))
        return made
