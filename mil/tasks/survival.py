"""Survival: discrete time bins with their likelihood, or Cox's partial likelihood over several bags.

Targets are (time, event), event 1 = seen, 0 = censored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mhim.mil import metrics
from mhim.mil.tasks.base import EPS, Kind, Points, Target, Task, TaskError, kl, there


@dataclass(frozen=True)
class Survival(Task):
    """What both forms share: C-index, time-dependent AUC at the quartiles of the training part's event times
    (`horizons`), and the median risk of validation (`risk_threshold`)."""

    headline: ClassVar[str] = "c_index"
    headline_called: ClassVar[str] = "C-index"
    width: ClassVar[int] = 2
    survival: ClassVar[bool] = True
    scored_as_published: ClassVar[bool] = True

    def stratum(self, target: Target) -> int:
        """Whether the event was seen."""
        assert isinstance(target, tuple)
        return int(target[1])

    def columns(self, target: Target | None) -> dict[str, Any]:
        return {"time": target[0], "event": target[1]} if isinstance(target, tuple) else {"target": target}

    def truth(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([[float(r["time"]), float(r["event"])] for r in rows]).reshape(-1, 2)

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        return {"c_index": metrics.c_index(truth[:, 0], truth[:, 1], self.risk(logits).numpy())}

    def learnt(self, targets: Sequence[Target]) -> dict[str, Any]:
        """horizons: times of the time-dependent AUC, the quartiles of the training part's event times."""
        events = [t[0] for t in targets if isinstance(t, tuple) and t[1]]
        return {"horizons": [float(v) for v in np.quantile(events, [0.25, 0.5, 0.75])]}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """risk_threshold: the median risk."""
        return {"risk_threshold": float(np.median(self.risk(torch.from_numpy(logits)).numpy()))}

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        risk = self.risk(torch.from_numpy(logits)).numpy()
        return metrics.survival(truth[:, 0], truth[:, 1], risk, points.get("horizons", ()))


@dataclass(frozen=True)
class Nll(Survival):
    """Discrete time. edges: inner edges of the time bins, in the labels' time unit; bins are closed on the left,
    [a, b). alpha: extra weight of uncensored cases (0 is the plain likelihood)."""

    kind: ClassVar[Kind] = "nll"

    edges: tuple[float, ...] = ()
    alpha: float = 0.0

    @property
    def n_out(self) -> int:
        return len(self.edges) + 1

    def bins(self, time: Tensor) -> Tensor:
        """int64 (B,) time bin of each time."""
        edges = there(self.edges, torch.float64, time.device)
        return torch.bucketize(time.double().contiguous(), edges, right=True)

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        return nll_each(logits, self.bins(target[:, 0]), 1.0 - target[:, 1], self.alpha)

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """KL(teacher || student) of `probabilities`."""
        return kl(self.probabilities(teacher.detach()), self.probabilities(student))

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        if contribution.shape[1] == 1:
            return contribution[:, 0].abs()
        return contribution.amax(1) - contribution.mean(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, bins + 1): that the event falls in each bin, or (last column) after all of them."""
        hazard = torch.sigmoid(logits)
        survival = running_product(1.0 - hazard)
        before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
        return torch.cat([before * hazard, survival[:, -1:]], dim=1)

    def survival_curve(self, logits: Tensor) -> Tensor:
        """(B, bins) probability of being event-free at the end of each bin."""
        return running_product(1.0 - torch.sigmoid(logits))

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) minus the sum of the survival curve; larger is worse."""
        return -self.survival_curve(logits).sum(dim=1)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "classes": [], "edges": list(self.edges), "weights": [], "alpha": self.alpha}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Nll:
        """The task that `to_json` described."""
        return cls(tuple(value["edges"]), value["alpha"])


@dataclass(frozen=True)
class Cox(Survival):
    """Cox proportional hazards: one log risk. memory: float (M, 3) of detached [log risk, time, event] of bags seen
    just before, so that a risk set reaches over several bags even when one bag is a step; None outside training."""

    kind: ClassVar[Kind] = "cox"
    remembers: ClassVar[bool] = True

    memory: Tensor | None = None

    @property
    def n_out(self) -> int:
        return 1

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Breslow's negative log partial likelihood per event, over the batch and `memory`.

        L = mean over events i in the batch of  log Σ_{j: t_j >= t_i} exp(r_j) - r_i,  plus the terms of remembered
        events whose risk set holds a bag of the batch (only those carry a gradient).
        """
        log_risk = logits[:, 0]
        time, event = target[:, 0], target[:, 1]
        risk = log_risk.double()
        if self.memory is not None and len(self.memory):
            memory = self.memory.to(risk)
            risk, time = torch.cat([risk, memory[:, 0]]), torch.cat([time, memory[:, 1]])
            event = torch.cat([event, memory[:, 2]])
        n = len(log_risk)
        at_risk = time[None, :] >= time[:, None]  # (i, j): j is still at risk when i has its event
        log_sum = torch.where(at_risk, risk[None, :], -torch.inf).logsumexp(dim=1)
        counts = event.bool() & at_risk[:, :n].any(dim=1)
        terms = torch.where(counts, log_sum - risk, torch.zeros_like(risk))
        return (terms.sum() / counts.sum().clamp_min(1)).to(log_risk.dtype)

    def loss_of_known(self, logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """A bag without a time is in no risk set: its time is before all others, and nothing was seen."""
        unseen = torch.stack([torch.full_like(target[:, 0], -torch.inf), torch.zeros_like(target[:, 1])], dim=1)
        return self.loss(logits, torch.where(known[:, None], target, unseen))

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Half the squared difference of log risks, which is the KL of two unit-variance normals."""
        return 0.5 * (teacher.detach() - student).square().mean()

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        return contribution[:, 0].abs()

    def remembered(self, logits: Tensor, target: Tensor) -> Tensor:
        """float64 (B, 3): log risk, time, event."""
        return torch.cat([logits[:, :1].double(), target.double()], dim=1)

    def with_memory(self, memory: Tensor | None) -> Cox:
        return replace(self, memory=memory)

    def probabilities(self, logits: Tensor) -> Tensor:
        raise TaskError("a Cox model has a relative risk and no probabilities; train with survival_loss=nll for them")

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) log risk; larger is worse."""
        return logits[:, 0]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "classes": [], "edges": [], "weights": [], "alpha": 0.0}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cox:
        """The task that `to_json` described."""
        return cls()


def discrete_survival(targets: Sequence[Target], bins: int = 4, alpha: float = 0.0) -> Nll:
    """Discrete-time survival with bins cut at the quantiles of the events' times in `targets` (the training part).

    Raises TaskError for negative times, no event, or too few distinct event times for the bins.
    """
    time, event = check_survival(targets)
    inner = np.quantile(time[event], np.arange(1, bins) / bins)
    if len(np.unique(inner)) < bins - 1:
        raise TaskError(
            f"{int(event.sum())} events at {len(np.unique(time[event]))} distinct times cannot be cut into "
            f"{bins} bins: set train.survival_bins lower or train.survival_loss=cox"
        )
    return Nll(edges=tuple(inner.tolist()), alpha=alpha)


def cox_survival(targets: Sequence[Target]) -> Cox:
    """Cox proportional hazards. Raises TaskError for negative times or no event in `targets` (the training part)."""
    check_survival(targets)
    return Cox()


def check_survival(targets: Sequence[Target]) -> tuple[np.ndarray, np.ndarray]:
    """Times (float64) and events (bool) of survival targets, or TaskError."""
    values = np.asarray(targets, dtype=np.float64).reshape(-1, 2)
    time, event = values[:, 0], values[:, 1]
    if not np.isfinite(values).all() or (time < 0).any():
        raise TaskError("a survival time is negative or not a number: times count from diagnosis and are 0 or more")
    if not np.isin(event, (0.0, 1.0)).all():
        raise TaskError("event must be 1 (seen) or 0 (censored)")
    if not event.any():
        raise TaskError("no event among the training cases of this fold: censored cases alone teach no survival")
    return time, event.astype(bool)


def nll_each(logits: Tensor, bins: Tensor, censored: Tensor, alpha: float = 0.0) -> Tensor:
    """(B,) discrete-time negative log-likelihood per case.

    hazard h = sigmoid(logits), S = Π(1 - h), S(-1) = 1; for bin y and c = 1 if censored:
    -c log S(y) - (1 - c) [log S(y-1) + log h(y)], every argument clamped at 1e-7;
    (1 - alpha) times that plus alpha times the uncensored term. logits: (B, bins); bins: int64 (B,).
    """
    hazard = torch.sigmoid(logits)
    survival = running_product(1.0 - hazard)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
    y = bins[:, None]
    c = censored.to(logits.dtype)
    seen = before.gather(1, y)[:, 0].clamp_min(EPS).log() + hazard.gather(1, y)[:, 0].clamp_min(EPS).log()
    gone = survival.gather(1, y)[:, 0].clamp_min(EPS).log()
    uncensored = -(1.0 - c) * seen
    return (1.0 - alpha) * (uncensored - c * gone) + alpha * uncensored


def running_product(x: Tensor) -> Tensor:
    """Product of the columns so far, (B, K). As a loop, because the gradient of torch.cumprod has no deterministic
    form on a GPU; K is a handful of time bins."""
    columns = [x[:, 0]]
    for k in range(1, x.shape[1]):
        columns.append(columns[-1] * x[:, k])
    return torch.stack(columns, dim=1)
