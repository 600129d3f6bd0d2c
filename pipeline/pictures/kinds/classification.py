"""Pictures of diagnosis and subtyping: ROC, precision and recall, confusion, calibration; probability and contribution
of a class per tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mhim.pipeline.pictures import figures
from mhim.pipeline.pictures.kinds.kind import Drawing, Kind, Layer
from mhim.pipeline.results import estimand
from mhim.pipeline.results.measures.measure import Row
from mhim.pipeline.results.metrics_file import Metrics


class Classification(Kind):
    """See the module."""

    titles: ClassVar[dict[str, str]] = {
        "roc": "ROC inside trainings",
        "pr": "Precision and recall inside trainings",
        "confusion": "Confusion (decisions)",
        "reliability": "Calibration before and after temperature scaling",
    }

    def figures(self, found: Metrics, rows: Sequence[Row], each: Sequence[Row]) -> dict[str, Drawing]:
        classes = self.task.classes
        answers = estimand.answers(each, self.task)
        made = {
            "roc": figures.curve("roc", answers, classes),
            "pr": figures.curve("pr", answers, classes),
            "confusion": figures.confusion(found.confusion or [], classes),
        }
        if found.reliability:
            made["reliability"] = figures.reliability(found.reliability)
        return made

    @property
    def columns(self) -> list[str]:
        return ["label", "decision", *(f"p {c}" for c in self.task.classes)]

    def cells(self, row: Row) -> list[tuple[str, str]]:
        said = self.measure.said(row)
        decided = (said.decision, "wrong" if said.wrong else "")
        return [(said.truth, ""), decided, *((f"{row[f'p_{c}']:.3f}", "n") for c in self.task.classes)]

    def caption(self, row: Row) -> str:
        classes = self.task.classes
        of = classes[-1] if len(classes) == 2 else str(row.get("label"))
        return f"{row['label']}, called {self.measure.said(row).decision}, p {of} {row[f'p_{of}']:.3f}"

    def mistakes(self, rows: Sequence[Row]) -> list[float]:
        """The probability that is missing for the true class."""
        return [1.0 - float(row[f"p_{row['label']}"]) for row in rows]

    def layers(self, attention: np.ndarray, evidence: np.ndarray, which: str) -> list[Layer]:
        """probability: of a class. contribution: attention x class evidence, the evidence relative to the mean of the
        classes, because adding the same to all logits changes no probability. Of two classes the second is drawn: the
        first is its mirror image."""
        names, made = self.task.classes, []
        shown = range(1, 2) if len(names) == 2 else range(len(names))
        if which in ("probability", "all"):
            p = np.exp(evidence - evidence.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            made += [Layer(f"probability_{names[c]}", p[:, c]) for c in shown]
        if which in ("contribution", "all"):
            relative = evidence - evidence.mean(1, keepdims=True)
            made += [Layer(f"contribution_{names[c]}", attention * relative[:, c], True) for c in shown]
        return made
