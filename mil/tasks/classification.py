"""Diagnosis (two classes) and subtyping (more): softmax over one logit per class, cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhim.mil import metrics
from mhim.mil.tasks.base import Kind, Points, Target, Task, class_counts, class_weights, there


@dataclass(frozen=True)
class Classification(Task):
    """classes: names in logit order, of two the last is the positive one. weights: one loss weight per class, mean 1
    over the training bags, or empty."""

    kind: ClassVar[Kind] = "classification"
    headline: ClassVar[str] = "auc"
    headline_called: ClassVar[str] = "AUC"
    scored_as_published: ClassVar[bool] = True

    classes: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def n_out(self) -> int:
        return len(self.classes)

    def target(self, values: Sequence[Target]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64)

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(logits, target.long(), reduction="none")
        if self.weights:  # not divided by the weights' sum: in a batch of one bag that would cancel them
            each = each * there(self.weights, each.dtype, each.device)[target.long()]
        return each

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """KL(teacher || student) of the class probabilities."""
        log_p, log_q = F.log_softmax(teacher.detach(), 1), F.log_softmax(student, 1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        return contribution.amax(1) - contribution.mean(1)

    def stratum(self, target: Target) -> int:
        assert isinstance(target, int)
        return target

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, C) of the classes."""
        return torch.softmax(logits, dim=1)

    def risk(self, logits: Tensor) -> Tensor:
        return logits[:, -1] - logits[:, 0]

    def truth(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([int(r["target"]) for r in rows], dtype=np.int64)

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        return {"auc": metrics.auc(truth, self.probabilities(logits).numpy())}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """temperature; of two classes also threshold, by Youden's J."""
        found: dict[str, Any] = {"temperature": metrics.temperature(truth, logits)}
        if len(self.classes) == 2:
            p = self.probabilities(torch.from_numpy(logits / found["temperature"])).numpy()
            found["threshold"] = metrics.youden(truth, p[:, 1])
        return found

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        scaled = self.probabilities(torch.from_numpy(logits) / points.get("temperature", 1.0)).numpy()
        return metrics.classification(truth, scaled, points.get("threshold"))

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "edges": [],
            "weights": list(self.weights),
            "alpha": 0.0,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Classification:
        """The task that `to_json` described."""
        return cls(tuple(value["classes"]), tuple(value["weights"]))


def classification(classes: Sequence[str], train_targets: Sequence[Target], weighted: bool = False) -> Classification:
    """Diagnosis (two classes) or subtyping. Raises TaskError if the training part lacks a class.

    weighted: loss weights n / (C n_c) from the training targets, whose mean over the training bags is 1.
    """
    counts = class_counts(classes, train_targets)
    return Classification(tuple(classes), class_weights(counts) if weighted else ())
