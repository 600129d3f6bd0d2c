"""Diagnosis and subtyping: probabilities of classes, a frozen threshold of two, AUC inside trainings.

Columns of a row: `label`; `p_<class>`; of two classes `threshold`, `undecided_from`, `undecided_to`; `decision`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators
from mhim.pipeline.cohort.labels import rows as labels
from mhim.pipeline.results import operating_point
from mhim.pipeline.results.measures import measure
from mhim.pipeline.results.measures.measure import Answers, Measure, Row, Said, Scaled, Training, Values
from mhim.pipeline.training.card import Card


class Classification(Measure):
    """See the module."""

    question = "classification"
    headline, no_pair = "AUC", "not each class"
    truth = ("label",)
    ranking: ClassVar[tuple[str, ...]] = ("auc", "auprc")
    decided: ClassVar[tuple[str, ...]] = ("balanced_accuracy", "f1", "accuracy", "kappa")
    compared: ClassVar[tuple[str, ...]] = ("auc", "auprc", "balanced_accuracy", "f1", "accuracy", "kappa", "brier")
    tabled: ClassVar[tuple[str, ...]] = ("auc", "auprc", "balanced_accuracy", "f1", "kappa")
    less_is_better: ClassVar[tuple[str, ...]] = ("brier", "ece")
    brief: ClassVar[tuple[str, ...]] = ("auc", "balanced_accuracy", "f1", "ece")
    pooled = True
    averaged: ClassVar[tuple[str, ...]] = ("p_", "threshold", "undecided_from", "undecided_to")

    def answers(self, logits: np.ndarray, card: Card, config: ScoreConfig) -> list[Row]:
        scaled = torch.from_numpy(logits)
        if config.calibrate:
            scaled = scaled / card.softening
        p = self.task.probabilities(scaled).numpy()
        return [{f"p_{name}": float(v) for name, v in zip(self.task.classes, row, strict=True)} for row in p]

    def frozen(self, card: Card, validation: Callable[[], Sequence[Row]], config: ScoreConfig) -> Any:
        return operating_point.point(validation, card, self.task, config)

    def verdict(self, answer: Row, frozen: Any, card: Card) -> Row:
        found = answer | operating_point.columns(frozen, self.positive(answer), self.task.classes)
        return found | {"decision": operating_point.called(found, self.task.classes)}

    def known(self, row: Mapping[str, Any]) -> Row:
        return {"label": self.task.classes[int(row["target"])]}

    def told(self, row: labels.Row) -> Row | None:
        if row.label is None:
            return None
        return {"label": row.label} if row.label in self.task.classes else {}

    def positive(self, answer: Row) -> float:
        return float(answer[f"p_{self.task.classes[-1]}"])

    def sure(self, answer: Row) -> float:
        """Of several classes the surest slide speaks, of two the most positive one."""
        if len(self.task.classes) == 2:
            return self.positive(answer)
        return max(float(answer[f"p_{c}"]) for c in self.task.classes)

    def decision(self, row: Row) -> Row:
        return {"decision": operating_point.called(row, self.task.classes)} if "decision" in row else {}

    def truth_of(self, rows: Sequence[Row]) -> np.ndarray:
        """int (n,), places in the classes."""
        return np.array([self.task.classes.index(r["label"]) for r in rows])

    def score_of(self, rows: Sequence[Row]) -> np.ndarray:
        """float64 (n, C), probabilities."""
        return np.array([[r[f"p_{c}"] for c in self.task.classes] for r in rows], dtype=np.float64)

    def called_of(self, rows: Sequence[Row]) -> np.ndarray:
        return np.array([self._called(r) for r in rows])

    def values(self, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]) -> Values:
        n = len(self.task.classes)
        ranked = [1] if n == 2 else range(n)
        areas = [
            measure.added([estimators.auc_pairs(t.truth == c, t.score[:, c], weights[:, t.who]) for t in trainings])
            for c in ranked
        ]
        precise = [
            np.mean(
                [estimators.average_precision(t.truth == c, t.score[:, c], weights[:, t.who]) for c in ranked], axis=0
            )
            for t in trainings
        ]
        who, truth, score, called = measure.joined(trainings, "who", "truth", "score", "called")
        own = weights[:, who]
        return {
            "auc": np.mean(areas, axis=0),
            "auprc": measure.mean(precise),
            **estimators.of_confusion(estimators.confusion(truth, called, n, own)),
            "brier": estimators.brier(truth, score, own),
            "ece": estimators.ece(truth, score, own),
        }

    def pairs(self, one: Training) -> float:
        """Pairs of patients of different classes."""
        sizes = np.bincount(one.truth, minlength=len(self.task.classes))
        return float((len(one.truth) ** 2 - (sizes**2).sum()) / 2)

    def tables(
        self, found: Answers, rows: Sequence[Row], together: Sequence[Row], config: ScoreConfig, scaled: Scaled
    ) -> Row:
        return {
            "decision_rule": operating_point.rule(rows, self.task, config),
            "confusion": measure.confusion(found),
            "decisions": operating_point.counts(rows, self.task.classes),
            "reliability": {name: self._reliability(scaled(how)) for name, how in (("before", False), ("after", True))},
        }

    def own_tables(self, together: Sequence[Row]) -> Row:
        return {"class_patients": dict(Counter(r["label"] for r in together))}

    @property
    def wanted(self) -> str:
        return f"a label of {', '.join(self.task.classes)}"

    def said(self, row: Row) -> Said:
        classes = self.task.classes
        p = {c: float(row[f"p_{c}"]) for c in classes}
        most = max(p, key=lambda c: p[c])
        best = str(row.get("decision") or operating_point.called(row, classes))
        of = classes[-1] if len(classes) == 2 else most  # whose probability is told
        label = str(row.get("label", ""))
        return Said(label, best, p[of], of, best in classes and label in classes and best != label)

    def answer(self, row: Row, several: bool) -> tuple[str, str]:
        told = ", ".join(f"{c} {row[f'p_{c}']:.3f}" for c in self.task.classes)
        return told, str(row.get("decision", ""))

    def _called(self, row: Row) -> int:
        """Place of the class that a row decides on, -1 for undecided; rows of older runs without a decision: the most
        probable class."""
        said = row.get("decision")
        if said == operating_point.UNDECIDED:
            return -1
        if said:
            return self.task.classes.index(said)
        return int(np.argmax([row[f"p_{c}"] for c in self.task.classes]))

    def _reliability(self, rows: Sequence[Row]) -> dict[str, Any]:
        """How far the probabilities of labelled rows can be believed."""
        return operating_point.reliability(self.truth_of(rows), self.score_of(rows))
