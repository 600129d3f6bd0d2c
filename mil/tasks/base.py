"""What every outcome is to the rest of the program: one frozen value with these methods, and no other place that asks
which outcome it is.

In: logits of a bag batch and its targets. Out: the loss, the answer, the metrics, what is fitted on validation and
frozen. Knows no model, no file, no loop. A new outcome is one file beside this one with a subclass of `Task`, and its
name in `one.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mhim.configs.errors import UserError

EPS = 1e-7  # every argument of a logarithm is clamped here, as in the published loss

Kind = Literal["classification", "nll", "cox", "ordinal", "regression", "several"]
Points = Mapping[str, Any]  # what a fold fitted on its training or validation patients and froze, by its name in a card


class TaskError(UserError, ValueError):
    """The labels cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Cells:
    """The targets of one patient of a run with several, in the order of `Several.targets`; None where unknown. A type
    of its own, so that two of them are never taken for (time, event)."""

    values: tuple[int | float | tuple[float, float] | None, ...]


One = int | float | tuple[float, float]  # class index or level, number, (time, event)
Target = int | float | tuple[float, float] | Cells


@dataclass(frozen=True)
class Task:
    """Base of all outcomes. `kind`: how logits are read. `headline`: the metric that model selection and tables use;
    larger is better. `headline_called`: its name in sentences. `width`: numbers of one target. `remembers`: the loss
    compares a bag with those before (see `with_memory`). `scored_as_published`: MHIM's published score is of it."""

    kind: ClassVar[Kind]
    headline: ClassVar[str]
    headline_called: ClassVar[str]
    width: ClassVar[int] = 1
    survival: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    scored_as_published: ClassVar[bool] = False

    @property
    def n_out(self) -> int:
        """Number of logits a model must give."""
        raise NotImplementedError

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes or levels in their order; empty where there are none."""
        return ()

    # ------------------------------------------------------------------------------------------ training

    def target(self, values: Sequence[Target]) -> Tensor:
        """Targets of a batch, (B,) or (B, width). int64 only where each is a class that has a logit of its own: a model
        may read an integer as an index into its logits, and nothing else; any other outcome is float64."""
        return torch.tensor([list(v) if isinstance(v, tuple) else v for v in values], dtype=torch.float64)

    def each(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,) loss of each bag. logits: (B, n_out); target: as `target` gives it."""
        raise NotImplementedError

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss over the batch, a scalar."""
        return self.each(logits, target).mean()

    def loss_of_known(self, logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """Mean loss over the bags with `known`, bool (B,); 0 where there is none. The other targets are zeros."""
        each = torch.where(known, self.each(logits, target), 0.0)
        return each.sum() / known.sum().clamp_min(1)

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """How far the student's answer is from the teacher's, a scalar; both are logits (B, n_out). No gradient
        reaches the teacher."""
        raise NotImplementedError

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        """(N,) by which MHIM ranks the instances of a bag, largest first masked: how much each of them argues for the
        bag's answer. contribution: (N, n_out), what each adds to the bag's logits (n_out,), without bias. Why it is
        what it is, of each outcome: see `mil/models/mhim.py`."""
        raise NotImplementedError

    def evidence(self, contribution: Tensor, logits: Tensor) -> Tensor:
        """(N,) >= 0, sums to one (or all 0): the part that each instance has in what is told for the bag's answer; the
        arguments are those of `hardness`."""
        found = self.hardness(contribution, logits).double().clamp_min(0.0)
        return found / found.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def stratum(self, target: Target) -> int:
        """What balanced sampling balances. Raises TaskError where an outcome has no groups."""
        raise TaskError(
            f"train.balance=sampling needs classes or seen events; {self.kind} has none: set train.balance=none"
        )

    def remembered(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B, m) what `with_memory` needs of bags that were just seen (`remembers` only)."""
        raise NotImplementedError

    def with_memory(self, memory: Tensor | None) -> Task:
        """The same task that knows the bags seen just before, (M, m) as `remembered` gives them."""
        return self

    # ------------------------------------------------------------------------------------------ answers

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, K), rows summing to one. Raises TaskError where an outcome has none."""
        raise TaskError(f"{self.kind} has no probabilities")

    def risk(self, logits: Tensor) -> Tensor:
        """(B,) one number that orders the patients: a risk (larger is worse), the expected level, the value; of two
        classes the logit of the last over the first."""
        raise NotImplementedError

    def of_tiles(self, evidence: np.ndarray, attention: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """What this training's model says of each tile of a bag, (n, n_out), in what other trainings' is in too, so
        that it may be averaged and drawn on one scale. evidence: (n, n_out), without bias; attention: (n,), sums to
        one; logits: (n_out,), of the bag. Here the evidence as it is."""
        return evidence

    # ------------------------------------------------------------------------------------------ a fold

    def columns(self, target: Target | None) -> dict[str, Any]:
        """The columns of a prediction's row that tell the truth."""
        return {"target": target}

    def truth(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The truth of prediction rows: (n,) or (n, width), of the type of `target`."""
        return np.array([float(r["target"]) for r in rows], dtype=np.float64)

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        """The headline metric, first, under its name, and what else is worth a look after each epoch. logits: float64
        (n, n_out)."""
        raise NotImplementedError

    def learnt(self, targets: Sequence[Target]) -> dict[str, Any]:
        """What the metrics need from the training part."""
        return {}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """What is fitted on the validation patients and frozen: temperature, threshold, width of an interval."""
        return {}

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        """All metrics of predictions by what `learnt` and `points` gave; NaN where the patients define none."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes the same task."""
        raise NotImplementedError


@lru_cache(maxsize=64)
def there(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, made once per device: making one on a GPU waits for it."""
    with torch.inference_mode(False):  # whoever asks first, a loss may use it
        return torch.tensor(values, dtype=dtype, device=device)


def completed(evidence: np.ndarray, attention: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Evidence with what the bag's logits hold besides it, such as the bias: by attention it sums up to them."""
    found: np.ndarray = evidence + (logits - attention @ evidence)
    return found


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean KL divergence of rows of probabilities, KL(p || q)."""
    return (p * (p.clamp_min(EPS).log() - q.clamp_min(EPS).log())).sum(dim=1).mean()


def class_counts(classes: Sequence[str], targets: Sequence[Target], what: str = "class") -> np.ndarray:
    """int (C,) training cases of each class. Raises TaskError where there is nothing to tell apart or one lacks."""
    counts = np.bincount(np.asarray(targets, dtype=np.int64), minlength=len(classes))
    if len(classes) < 2:
        raise TaskError(f"only one {what} ({', '.join(classes)}) in the labels: there is nothing to tell apart")
    missing = [name for name, n in zip(classes, counts, strict=True) if n == 0]
    if missing:
        plural = {"class": "classes", "level": "levels"}[what]
        raise TaskError(
            f"no training case of {what} {', '.join(missing)} in this fold: use fewer folds, merge {plural}, "
            "or add cases"
        )
    return counts


def class_weights(counts: np.ndarray) -> tuple[float, ...]:
    """Loss weights n / (C n_c), whose mean over the training bags is 1."""
    return tuple((counts.sum() / (len(counts) * counts)).tolist())
