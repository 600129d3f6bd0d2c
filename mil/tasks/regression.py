"""A number, as a percentage or a score: one logit, in standard deviations of the training part around its mean.

Loss: squared, (z - t)^2 with t = (y - mean) / sd, or Huber (1964) with its bend at one sd, twice the usual form so that
both agree near zero. In these units 1 - loss is R2, which gives `train.fallback` a meaning.
The interval of a prediction is that of split conformal prediction (Lei et al. 2018): the half width is the
ceil((n + 1) level)-th smallest absolute error of the n validation patients; with fewer patients than that rank there
is none, and the interval is the whole line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhim.mil import outcome_metrics
from mhim.mil.tasks.base import Kind, Points, Target, Task, TaskError, completed

Robustness = Literal["squared", "huber"]
LEVELS = (0.9, 0.95)  # of the intervals that a card holds


@dataclass(frozen=True)
class Regression(Task):
    """mean, sd: of the training part, in the labels' unit. robust: the loss."""

    kind: ClassVar[Kind] = "regression"
    headline: ClassVar[str] = "r2"
    headline_called: ClassVar[str] = "R2"

    mean: float = 0.0
    sd: float = 1.0
    robust: Robustness = "squared"

    @property
    def n_out(self) -> int:
        return 1

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        scaled = ((target - self.mean) / self.sd).to(logits.dtype)
        if self.robust == "huber":
            return 2.0 * F.huber_loss(logits[:, 0], scaled, reduction="none", delta=1.0)
        return (logits[:, 0] - scaled).square()

    def value(self, logits: Tensor) -> Tensor:
        """(B,) in the labels' unit."""
        return logits[:, 0] * self.sd + self.mean

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) the value."""
        return self.value(logits)

    def of_tiles(self, evidence: np.ndarray, attention: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Values in the labels' unit, since every training has a mean and an sd of its own; their mean, weighted by
        attention, is the bag's value."""
        return completed(evidence, attention, logits) * self.sd + self.mean

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Half the squared difference of the values in sd, which is the KL of two unit-variance normals."""
        return 0.5 * (teacher.detach() - student).square().mean()

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        return contribution[:, 0].abs()

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        return {"r2": outcome_metrics.r2(truth, self.value(logits).numpy())}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """interval: level -> half width in the labels' unit, None where validation is too small for a finite one."""
        error = np.abs(truth - self.value(torch.from_numpy(logits)).numpy())
        widths = {f"{level:g}": outcome_metrics.conformal_half_width(error, level) for level in LEVELS}
        return {"interval": {k: v if math.isfinite(v) else None for k, v in widths.items()}}

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        return outcome_metrics.regression(
            truth, self.value(torch.from_numpy(logits)).numpy(), points.get("interval", {})
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": self.mean, "sd": self.sd, "robust": self.robust}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Regression:
        """The task that `to_json` described."""
        return cls(value["mean"], value["sd"], value["robust"])


def regression(train_targets: Sequence[Target], robust: Robustness = "squared") -> Regression:
    """A number. Raises TaskError for what is no number and where the training part holds one value only."""
    values = np.asarray(train_targets, dtype=np.float64)
    if not np.isfinite(values).all():
        raise TaskError("a target is infinite or not a number; leave the cell empty where it is unknown")
    sd = float(values.std())
    if len(np.unique(values)) < 2 or sd == 0:
        only = f"are {values[0]:g}" if len(values) else "are none"
        raise TaskError(
            f"all {len(values)} training targets of this fold {only}: there is nothing to learn; use fewer folds, or "
            "leave this target out"
        )
    return Regression(float(values.mean()), sd, robust)
