"""Ordered levels, as grades: K - 1 logits, of which the probabilities of exceeding each level fall by construction.

corn (Shi, Cao and Raschka 2023, Deep neural networks for rank-consistent ordinal regression based on conditional
probabilities): P(y > k | y >= k) = sigmoid(z_k), so P(y > k) = Π_{j <= k} sigmoid(z_j).
cumulative (McCullagh 1980): P(y > k) = sigmoid(c_k), c_0 = z_0, c_k = z_0 - Σ_{1 <= j <= k} softplus(z_j).

The loss of a bag is the negative log likelihood of its level. For corn that is the sum of the binary cross-entropies of
the thresholds the bag has reached; the paper divides by their number over a batch, which with one bag a step would
weigh low levels more. The level that is called is the median of the distribution, which minimises the expected absolute
error: the lowest k with P(y > k) < 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhim.mil import outcome_metrics
from mhim.mil.tasks.base import Kind, Points, Target, Task, class_counts, class_weights, completed, kl, there
from mhim.mil.tasks.survival import running_product

Link = Literal["corn", "cumulative"]


def median(probabilities: Tensor) -> Tensor:
    """int64 (B,) the median of levels' probabilities (B, K): the level that is called, of one model or of the mean of
    several, and nowhere decided otherwise."""
    return (1.0 - probabilities.cumsum(dim=1)[:, :-1] >= 0.5).sum(dim=1)


@dataclass(frozen=True)
class Ordinal(Task):
    """classes: the levels, lowest first. link: how K - 1 logits become a distribution. weights: one loss weight per
    level, mean 1 over the training bags, or empty."""

    kind: ClassVar[Kind] = "ordinal"
    headline: ClassVar[str] = "quadratic_kappa"
    headline_called: ClassVar[str] = "quadratic kappa"

    classes: tuple[str, ...] = ()
    link: Link = "corn"
    weights: tuple[float, ...] = ()

    @property
    def n_out(self) -> int:
        return len(self.classes) - 1

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        level = target.long()
        thresholds = torch.arange(self.n_out, device=logits.device)
        if self.link == "corn":
            reached, above = level[:, None] >= thresholds, level[:, None] > thresholds
            each = torch.where(reached, -F.logsigmoid(torch.where(above, logits, -logits)), 0.0).sum(dim=1)
        else:
            # σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b-a)), and with a - b = softplus(z) the last factor is σ(z)
            c = self.cutpoints(logits)
            last = level[:, None] == thresholds  # the threshold not exceeded
            before = level[:, None] == thresholds + 1  # the one exceeded last
            terms = torch.where(last, F.logsigmoid(-c), 0.0) + torch.where(before, F.logsigmoid(c), 0.0)
            between = last & (thresholds > 0)
            each = -(terms + torch.where(between, F.logsigmoid(logits), 0.0)).sum(dim=1)
        return each * there(self.weights, each.dtype, each.device)[level] if self.weights else each

    def cutpoints(self, logits: Tensor) -> Tensor:
        """(B, K - 1) c_k of the cumulative link."""
        steps = [logits[:, 0]]
        for k in range(1, logits.shape[1]):
            steps.append(steps[-1] - F.softplus(logits[:, k]))
        return torch.stack(steps, dim=1)

    def exceeding(self, logits: Tensor) -> Tensor:
        """(B, K - 1) P(y > k), not increasing in k."""
        if self.link == "corn":
            return running_product(torch.sigmoid(logits))
        return torch.sigmoid(self.cutpoints(logits))

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K) of the levels."""
        above = self.exceeding(logits)
        edge = torch.ones_like(above[:, :1])
        return torch.cat([edge, above], dim=1) - torch.cat([above, torch.zeros_like(edge)], dim=1)

    def level(self, logits: Tensor) -> Tensor:
        """int64 (B,) the level that is called."""
        return median(self.probabilities(logits))

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) expected level, 0 to K - 1."""
        return self.exceeding(logits).sum(dim=1)

    def of_tiles(self, evidence: np.ndarray, attention: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Logits with their bias: the levels' frequencies are in it."""
        return completed(evidence, attention, logits)

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """KL(teacher || student) of the levels' probabilities."""
        return kl(self.probabilities(teacher.detach()), self.probabilities(student))

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        thresholds, reached = torch.arange(self.n_out, device=logits.device), self.level(logits[None])
        slope = torch.ones_like(logits)
        if self.link == "cumulative":
            slope = torch.where(thresholds > 0, -torch.sigmoid(logits), slope)
        slope = torch.where(thresholds < reached, slope, 0.0)
        lowest = (thresholds == 0) & (reached == 0)
        return (contribution * torch.where(lowest, -1.0, slope)).sum(dim=1)

    def stratum(self, target: Target) -> int:
        assert isinstance(target, int)
        return target

    def truth(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([int(float(r["target"])) for r in rows], dtype=np.int64)

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        called = self.level(logits).numpy()
        return {self.headline: outcome_metrics.quadratic_kappa(truth.astype(np.int64), called, len(self.classes))}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """temperature, by which the logits are divided."""
        given, known = torch.from_numpy(logits), torch.from_numpy(truth)
        unweighted = Ordinal(self.classes, self.link)
        loss = outcome_metrics.tempered(lambda t: float(unweighted.each(given / t, known).sum()))
        return {"temperature": loss}

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        scaled = torch.from_numpy(logits) / points.get("temperature", 1.0)
        p = self.probabilities(scaled).numpy()
        return outcome_metrics.ordinal(truth, p, self.level(scaled).numpy())

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "classes": list(self.classes), "link": self.link, "weights": list(self.weights)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ordinal:
        """The task that `to_json` described."""
        return cls(tuple(value["classes"]), value["link"], tuple(value["weights"]))


def ordinal(classes: Sequence[str], train_targets: Sequence[Target], link: Link, weighted: bool = False) -> Ordinal:
    """Ordered levels, lowest first. Raises TaskError if the training part lacks a level. weighted: as of classes."""
    counts = class_counts(classes, train_targets, "level")
    return Ordinal(tuple(classes), link, class_weights(counts) if weighted else ())
