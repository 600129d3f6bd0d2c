"""What a model is trained for: diagnosis and subtyping, discrete-time survival, Cox survival, as values.

In: logits of a bag batch and its targets. Out: the loss, the class or survival probabilities, the risk, the name of
the headline metric. Knows no model, no file, no loop. A task is a frozen value that JSON can carry (`to_json`,
`from_json`), so a model bundle says by itself what its outputs mean.

Targets are plain: the class index for classification, `(time, event)` with event 1 = seen, 0 = censored for survival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhim.configs.errors import UserError

EPS = 1e-7  # every argument of a logarithm is clamped here, as in the published loss

Target = int | tuple[float, float]
Kind = Literal["classification", "nll", "cox"]


class TaskError(UserError, ValueError):
    """The labels cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Task:
    """A task as a value. Use `classification`, `discrete_survival` or `cox_survival` to make one.

    kind: how logits are read. classes: class names in logit order (classification).
    edges: inner edges of the time bins, in the labels' time unit (nll); bins are closed on the left, [a, b).
    weights: one loss weight per class, mean 1 over the training bags, or empty (classification).
    alpha: extra weight of uncensored cases (nll; 0 is the plain likelihood).
    memory: float (M, 3) of detached [log risk, time, event] of bags seen just before, so that a Cox risk set
    reaches over several bags even when one bag is a step; None outside training.
    """

    kind: Kind
    classes: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    alpha: float = 0.0
    memory: Tensor | None = None

    @property
    def survival(self) -> bool:
        """True for the two survival tasks."""
        return self.kind != "classification"

    @property
    def n_out(self) -> int:
        """Number of logits a model must give: classes, time bins, or one log risk."""
        return {"classification": len(self.classes), "nll": len(self.edges) + 1, "cox": 1}[self.kind]

    @property
    def headline(self) -> str:
        """The metric that model selection and tables use; larger is better."""
        return "c_index" if self.survival else "auc"

    def target(self, values: Sequence[Target]) -> Tensor:
        """Targets of a batch: int64 (B,) class indices, or float64 (B, 2) of (time, event)."""
        dtype = torch.float64 if self.survival else torch.int64
        return torch.tensor([list(v) if isinstance(v, tuple) else v for v in values], dtype=dtype)

    def bins(self, time: Tensor) -> Tensor:
        """int64 (B,) time bin of each time (nll)."""
        edges = _there(self.edges, torch.float64, time.device)
        return torch.bucketize(time.double().contiguous(), edges, right=True)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar. logits: (B, n_out); target: as `target` gives it."""
        if self.kind == "classification":
            each = F.cross_entropy(logits, target, reduction="none")
            if self.weights:  # not divided by the weights' sum: in a batch of one bag that would cancel them
                each = each * _there(self.weights, each.dtype, each.device)[target]
            return each.mean()
        if self.kind == "nll":
            return nll_each(logits, self.bins(target[:, 0]), 1.0 - target[:, 1], self.alpha).mean()
        return self._cox(logits[:, 0], target)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K), rows summing to one: class probabilities; for nll the probability that the event falls in each bin
        or (last column) after all of them. A Cox model has none: TaskError."""
        if self.kind == "classification":
            return torch.softmax(logits, dim=1)
        if self.kind == "nll":
            hazard = torch.sigmoid(logits)
            survival = _running_product(1.0 - hazard)
            before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
            return torch.cat([before * hazard, survival[:, -1:]], dim=1)
        raise TaskError("a Cox model has a relative risk and no probabilities; train with survival_loss=nll for them")

    def survival_curve(self, logits: Tensor) -> Tensor:
        """(B, bins) probability of being event-free at the end of each bin (nll)."""
        return _running_product(1.0 - torch.sigmoid(logits))

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) risk, larger is worse: minus the sum of the survival curve (nll) or the log risk (cox)."""
        if self.kind == "nll":
            return -self.survival_curve(logits).sum(dim=1)
        return logits[:, 0]

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """How far the student's answer is from the teacher's, a scalar: KL(teacher || student) of `probabilities`,
        or half the squared difference of log risks (cox), which is the KL of two unit-variance normals.
        Both are logits (B, n_out); no gradient reaches the teacher."""
        teacher = teacher.detach()
        if self.kind == "cox":
            return 0.5 * (teacher - student).square().mean()
        if self.kind == "classification":
            log_p, log_q = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        p, q = self.probabilities(teacher), self.probabilities(student)
        return (p * (p.clamp_min(EPS).log() - q.clamp_min(EPS).log())).sum(dim=1).mean()

    def _cox(self, log_risk: Tensor, target: Tensor) -> Tensor:
        """Breslow's negative log partial likelihood per event, over the batch and `memory`.

        L = mean over events i in the batch of  log Σ_{j: t_j >= t_i} exp(r_j) - r_i,  plus the terms of remembered
        events whose risk set holds a bag of the batch (only those carry a gradient).
        """
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

    def with_memory(self, memory: Tensor | None) -> Task:
        """The same task with the bags seen just before (Cox)."""
        return replace(self, memory=memory)

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes the same task."""
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "edges": list(self.edges),
            "weights": list(self.weights),
            "alpha": self.alpha,
        }


@lru_cache(maxsize=64)
def _there(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, made once per device: making one on a GPU waits for it."""
    with torch.inference_mode(False):  # whoever asks first, a loss may use it
        return torch.tensor(values, dtype=dtype, device=device)


def from_json(value: dict[str, Any]) -> Task:
    """The task that `Task.to_json` described."""
    return Task(value["kind"], tuple(value["classes"]), tuple(value["edges"]), tuple(value["weights"]), value["alpha"])


def classification(classes: Sequence[str], train_targets: Sequence[Target], weighted: bool = False) -> Task:
    """Diagnosis (two classes) or subtyping. Raises TaskError if the training part lacks a class.

    weighted: loss weights n / (C n_c) from the training targets, whose mean over the training bags is 1.
    """
    counts = np.bincount(np.asarray(train_targets, dtype=np.int64), minlength=len(classes))
    if len(classes) < 2:
        raise TaskError(f"only one class ({', '.join(classes)}) in the labels: there is nothing to tell apart")
    missing = [name for name, n in zip(classes, counts, strict=True) if n == 0]
    if missing:
        raise TaskError(
            f"no training case of class {', '.join(missing)} in this fold: use fewer folds, merge classes, or add cases"
        )
    weights = tuple((counts.sum() / (len(classes) * counts)).tolist()) if weighted else ()
    return Task("classification", classes=tuple(classes), weights=weights)


def discrete_survival(targets: Sequence[Target], bins: int = 4, alpha: float = 0.0) -> Task:
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
    return Task("nll", edges=tuple(inner.tolist()), alpha=alpha)


def cox_survival(targets: Sequence[Target]) -> Task:
    """Cox proportional hazards. Raises TaskError for negative times or no event in `targets` (the training part)."""
    check_survival(targets)
    return Task("cox")


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
    survival = _running_product(1.0 - hazard)
    before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], dim=1)
    y = bins[:, None]
    c = censored.to(logits.dtype)
    seen = before.gather(1, y)[:, 0].clamp_min(EPS).log() + hazard.gather(1, y)[:, 0].clamp_min(EPS).log()
    gone = survival.gather(1, y)[:, 0].clamp_min(EPS).log()
    uncensored = -(1.0 - c) * seen
    return (1.0 - alpha) * (uncensored - c * gone) + alpha * uncensored


def _running_product(x: Tensor) -> Tensor:
    """Product of the columns so far, (B, K). As a loop, because the gradient of torch.cumprod has no deterministic
    form on a GPU; K is a handful of time bins."""
    columns = [x[:, 0]]
    for k in range(1, x.shape[1]):
        columns.append(columns[-1] * x[:, k])
    return torch.stack(columns, dim=1)
