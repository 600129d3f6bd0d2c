"""Ordered levels, as grades: their probabilities, the median that is called, quadratic kappa.

Columns of a row: `label`; `p_<level>`; `expected_level`, 0 to K - 1; `decision`, the median of the distribution, which
minimises the expected error in levels. It needs no threshold, and nobody is left undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators
from mhim.mil.tasks import median
from mhim.pipeline.results.measures import measure
from mhim.pipeline.results.measures.classification import Classification
from mhim.pipeline.results.measures.measure import Answers, Row, Said, Scaled, Training, Values
from mhim.pipeline.training.card import Card


class Ordinal(Classification):
    """See the module."""

    question = "ordered levels"
    headline, no_pair = "quadratic kappa", "one level only"
    ranking = ()
    decided = ("quadratic_kappa", "mae", "accuracy", "balanced_accuracy")
    tabled = ("quadratic_kappa", "mae", "accuracy", "balanced_accuracy")
    less_is_better = ("mae", "brier", "ece")
    brief = ("quadratic_kappa", "mae", "accuracy", "ece")
    pooled = False
    averaged = ("p_",)

    @property
    def compared(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.decided, "brier", *(f"auc_above_{k}" for k in range(len(self.task.classes) - 1)))

    def frozen(self, card: Card, validation: Callable[[], Sequence[Row]], config: ScoreConfig) -> Any:
        return None

    def verdict(self, answer: Row, frozen: Any, card: Card) -> Row:
        return answer | self.decision(answer)

    def positive(self, answer: Row) -> float:
        """The expected level."""
        return float(sum(k * answer[f"p_{c}"] for k, c in enumerate(self.task.classes)))

    def sure(self, answer: Row) -> float:
        return self.positive(answer)

    def decision(self, row: Row) -> Row:
        p = torch.tensor([[row[f"p_{c}"] for c in self.task.classes]], dtype=torch.float64)
        return {"expected_level": self.positive(row), "decision": self.task.classes[int(median(p))]}

    def values(self, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]) -> Values:
        """quadratic_kappa, mae (in levels), accuracy, balanced_accuracy: of the decision. auc_above_<k>: of the
        probability of more than level k, pairs inside each training."""
        levels = len(self.task.classes)
        who, truth, score, called = measure.joined(trainings, "who", "truth", "score", "called")
        own = weights[:, who]
        counts = estimators.confusion(truth, called, levels, own)
        decided = estimators.of_confusion(counts)
        above = [1.0 - np.cumsum(t.score, axis=1) for t in trainings]
        return {
            "quadratic_kappa": estimators.quadratic_kappa(counts),
            "mae": estimators.mean_error(np.abs(truth - called).astype(np.float64), own),
            "accuracy": decided["accuracy"],
            "balanced_accuracy": decided["balanced_accuracy"],
            "brier": estimators.brier(truth, score, own),
            "ece": estimators.ece(truth, score, own),
            **{
                f"auc_above_{k}": measure.added(
                    [
                        estimators.auc_pairs(t.truth > k, p[:, k], weights[:, t.who])
                        for t, p in zip(trainings, above, strict=True)
                    ]
                )
                for k in range(levels - 1)
            },
        }

    def pairs(self, one: Training) -> float:
        """Kappa has none: patients."""
        return float(len(one.who))

    def tables(
        self, found: Answers, rows: Sequence[Row], together: Sequence[Row], config: ScoreConfig, scaled: Scaled
    ) -> Row:
        made = super().tables(found, rows, together, config, scaled)
        del made["decisions"]
        return made | {"decision_rule": "the median of the probabilities of the levels"}

    def said(self, row: Row) -> Said:
        label, decision = str(row.get("label", "")), str(row["decision"])
        wrong = label in self.task.classes and label != decision
        return Said(label, decision, float(row["expected_level"]), "expected level", wrong)

    def answer(self, row: Row, several: bool) -> tuple[str, str]:
        told, decision = super().answer(row, several)
        return f"{told}, expected level {row['expected_level']:.2f}", decision

    def label(self, name: str, horizons: Sequence[float]) -> str:
        if name.startswith("auc_above_"):
            return f"{name} (more than {self.task.classes[int(name.removeprefix('auc_above_'))]})"
        return f"{name} (levels)" if name == "mae" else name
