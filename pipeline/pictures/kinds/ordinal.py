"""Pictures of ordered levels: confusion and calibration; expected level and its contribution per tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from mhim.mil.tasks import Ordinal as Task
from mhim.pipeline.pictures import figures
from mhim.pipeline.pictures.kinds.classification import Classification
from mhim.pipeline.pictures.kinds.kind import Drawing, Layer
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics


class Ordinal(Classification):
    """See the module."""

    titles: ClassVar[dict[str, str]] = {
        "confusion": "Confusion of levels (decisions)",
        "reliability": "Calibration before and after temperature scaling",
    }

    def figures(self, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Drawing]:
        made = {"confusion": figures.confusion(found.confusion or [], self.task.classes)}
        if found.reliability:
            made["reliability"] = figures.reliability(found.reliability)
        return made

    @property
    def columns(self) -> list[str]:
        return [*super().columns, "expected level"]

    def cells(self, row: Row) -> list[tuple[str, str]]:
        return [*super().cells(row), (f"{row['expected_level']:.2f}", "n")]

    def caption(self, row: Row) -> str:
        return f"{row['label']}, called {row['decision']}, expected level {row['expected_level']:.2f}"

    def mistakes(self, rows: Sequence[Row]) -> list[float]:
        """The expected distance in levels from the true one."""
        classes = self.task.classes
        return [
            float(sum(abs(k - classes.index(row["label"])) * row[f"p_{c}"] for k, c in enumerate(classes)))
            for row in rows
        ]

    def layers(self, attention: np.ndarray, evidence: np.ndarray, which: str) -> list[Layer]:
        """expected_level: of the tile. contribution: attention x the expected level, relative to the mean of the
        slide's tiles weighted by their attention: for a higher level above 0, for a lower one below."""
        assert isinstance(self.task, Task)
        level = self.task.risk(torch.from_numpy(evidence)).numpy()
        made = [Layer("expected_level", level)] if which in ("probability", "all") else []
        if which in ("contribution", "all"):
            made.append(Layer("contribution_level", attention * (level - middle(level, attention)), True))
        return made


def middle(values: np.ndarray, attention: np.ndarray) -> float:
    """Mean over tiles, weighted by attention."""
    total = float(attention.sum())
    return float((values * attention).sum() / total) if total > 0 else 0.0
