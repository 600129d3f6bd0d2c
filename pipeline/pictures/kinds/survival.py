"""Pictures of survival: Kaplan-Meier curves of the risk groups; risk and its contribution per tile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mhim.pipeline.pictures import figures, risk_curves
from mhim.pipeline.pictures.kinds.kind import Drawing, Kind, Layer
from mhim.pipeline.results import risk_groups
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics


class Survival(Kind):
    """See the module."""

    titles: ClassVar[dict[str, str]] = {risk_groups.NAME: "Kaplan–Meier"}

    def figures(self, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Drawing]:
        grouped = risk_groups.groups(rows)
        if grouped is None:
            return {}
        counted = risk_curves.counted(rows)
        return {risk_groups.NAME: figures.kaplan_meier(*grouped, found.log_rank_p, counted)}

    @property
    def columns(self) -> list[str]:
        return ["time", "event", "risk", "group", "out of order"]

    def cells(self, row: Row) -> list[tuple[str, str]]:
        high = {True: "high risk", False: "low risk", None: ""}[risk_groups.high(row)]
        return [
            (f"{float(row['time']):g}", "n"),
            (str(row["event"]), ""),
            (f"{row['risk']:.4f}", "n"),
            (high, ""),
            (f"{100 * row['mistake']:.0f} %", "n wrong" if row["mistake"] > 0.5 else "n"),
        ]

    def caption(self, row: Row) -> str:
        return f"time {float(row['time']):g}, event {row['event']}, risk {row['risk']:.3f}"

    def mistakes(self, rows: Sequence[Row]) -> list[float]:
        """The share of the comparable patients of the same fold with whom the risks stand in the wrong order."""
        time, event, risk = (np.array([float(r[k]) for r in rows]) for k in ("time", "event", "risk"))
        fold = np.array([r.get("fold", 0) for r in rows])
        earlier = (time[:, None] < time[None, :]) & (event[:, None] > 0)  # [i, j]: i is known to have come before j
        earlier &= fold[:, None] == fold[None, :]  # the risks of two models have no common scale
        wrong = earlier * ((risk[:, None] < risk[None, :]) + 0.5 * (risk[:, None] == risk[None, :]))
        pairs = earlier.sum(1) + earlier.sum(0)
        return [float(share) for share in (wrong.sum(1) + wrong.sum(0)) / np.maximum(pairs, 1)]

    def layers(self, attention: np.ndarray, evidence: np.ndarray, which: str) -> list[Layer]:
        """risk: of the tile. contribution: attention x the risk, relative to the mean of the slide's tiles."""
        hazard = 1 / (1 + np.exp(-evidence)) if self.task.kind == "nll" else evidence
        risk = -np.cumprod(1 - hazard, axis=1).sum(1) if self.task.kind == "nll" else evidence[:, 0]
        return [Layer("risk", risk), Layer("contribution_risk", attention * (risk - risk.mean()), True)]

    def files(self, out: Path, together: Sequence[Row]) -> None:
        """The curves and their numbers."""
        risk_curves.draw(out, together)
