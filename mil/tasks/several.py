"""Several targets at once, each of any other kind: their logits one after the other, cells unknown where they are.

Loss: the sum over targets of the mean loss over the bags of the batch that have the cell, divided by the number of
targets: with one bag a step every known cell of a training weighs the same. Headline: the mean of the targets'
headlines that are defined. A target is (W,) float64 numbers, one per target and two of survival, NaN where unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mhim.mil.tasks import one
from mhim.mil.tasks.base import Cells, Kind, Points, Target, Task, TaskError

WORST = -1.0  # lower bound of kappa; AUC and the C-index stay above


@dataclass(frozen=True)
class Several(Task):
    """targets: name and task of each, in the order of the logits."""

    kind: ClassVar[Kind] = "several"
    headline: ClassVar[str] = "headline"
    headline_called: ClassVar[str] = "mean of the targets' headlines"

    targets: tuple[tuple[str, Task], ...] = ()

    @property
    def n_out(self) -> int:
        return sum(task.n_out for _, task in self.targets)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        return any(task.remembers for _, task in self.targets)

    @property
    def names(self) -> list[str]:
        """Of the targets."""
        return [name for name, _ in self.targets]

    def of(self, name: str) -> Task:
        """The task of one target."""
        return dict(self.targets)[name]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Which logits are each target's."""
        return self._cut(lambda task: task.n_out)

    @cached_property
    def _places(self) -> dict[str, slice]:
        """Which numbers of a target tensor are each target's."""
        return self._cut(lambda task: task.width)

    def _cut(self, size: Callable[[Task], int]) -> dict[str, slice]:
        found: dict[str, slice] = {}
        start = 0
        for name, task in self.targets:
            found[name] = slice(start, start + size(task))
            start += size(task)
        return found

    def target(self, values: Sequence[Target]) -> Tensor:
        rows = []
        for value in values:
            assert isinstance(value, Cells)
            row: list[float] = []
            for (_, task), cell in zip(self.targets, value.values, strict=True):
                row += [math.nan] * task.width if cell is None else [*cell] if isinstance(cell, tuple) else [cell]
            rows.append(row)
        return torch.tensor(rows, dtype=torch.float64)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for name, task in self.targets:
            own = target[:, self._places[name]]
            known = ~own[:, 0].isnan()
            filled = torch.where(known[:, None], own, 0.0)  # no shape depends on what is known: a GPU need not be asked
            filled = filled if task.width > 1 else filled[:, 0]
            total = total + task.loss_of_known(logits[:, self.slices[name]], filled, known)
        return total / len(self.targets)

    def divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The mean of the targets' divergences."""
        parts = [t.divergence(teacher[:, self.slices[n]], student[:, self.slices[n]]) for n, t in self.targets]
        return torch.stack(parts).mean()

    def of_tiles(self, evidence: np.ndarray, attention: np.ndarray, logits: np.ndarray) -> np.ndarray:
        own = ((task, self.slices[name]) for name, task in self.targets)
        return np.concatenate([task.of_tiles(evidence[:, at], attention, logits[at]) for task, at in own], axis=1)

    def hardness(self, contribution: Tensor, logits: Tensor) -> Tensor:
        n = len(contribution)
        ranks = []
        for name, task in self.targets:
            score = task.hardness(contribution[:, self.slices[name]], logits[self.slices[name]])
            place = torch.empty_like(score)
            place[score.argsort(stable=True)] = torch.arange(n, dtype=score.dtype, device=score.device)
            ranks.append(place)
        each = torch.stack(ranks)
        return each.amax(0) + each.mean(0) / n  # the mean decides between the leaders of two targets

    def evidence(self, contribution: Tensor, logits: Tensor) -> Tensor:
        """The mean of the targets' parts: their scales do not compare."""
        parts = [t.evidence(contribution[:, self.slices[n]], logits[self.slices[n]]) for n, t in self.targets]
        return torch.stack(parts).mean(0)

    def remembered(self, logits: Tensor, target: Tensor) -> Tensor:
        """float64 (B, n_out + W): the logits, then the target."""
        return torch.cat([logits.double(), target.double()], dim=1)

    def with_memory(self, memory: Tensor | None) -> Several:
        return replace(self, targets=tuple((n, self._reminded(n, t, memory)) for n, t in self.targets))

    def _reminded(self, name: str, task: Task, memory: Tensor | None) -> Task:
        if not task.remembers or memory is None:
            return task.with_memory(None)
        logits, target = memory[:, self.slices[name]], memory[:, self.n_out :][:, self._places[name]]
        known = ~target[:, :1].isnan()
        unseen = target.new_tensor([-torch.inf, 0.0])  # as in `Cox.loss_of_known`
        return task.with_memory(task.remembered(logits, torch.where(known, target, unseen)))

    def columns(self, target: Target | None) -> dict[str, Any]:
        """`target.<name>`, or `time.<name>` and `event.<name>`; empty where unknown."""
        cells = target.values if isinstance(target, Cells) else (None,) * len(self.targets)
        found: dict[str, Any] = {}
        for (name, task), cell in zip(self.targets, cells, strict=True):
            keys = ("time", "event") if task.survival else ("target",)
            parts: Sequence[Any] = [""] * task.width if cell is None else cell if isinstance(cell, tuple) else [cell]
            found |= {f"{key}.{name}": part for key, part in zip(keys, parts, strict=True)}
        return found

    def view(self, name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows that know the target, as a run of it alone would have written them: its truth and its logits."""
        task, own = self.of(name), self.slices[name]
        keys = ("time", "event") if task.survival else ("target",)
        others = [f"{k}.{n}" for n in self.names for k in ("target", "time", "event")]
        found = []
        for row in rows:
            if row[f"{keys[0]}.{name}"] in (None, ""):
                continue
            kept = {k: v for k, v in row.items() if not k.startswith("logit_") and k not in others}
            kept |= {k: row[f"{k}.{name}"] for k in keys}
            found.append(kept | {f"logit_{k}": row[f"logit_{j}"] for k, j in enumerate(range(own.start, own.stop))})
        return found

    def truth(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        keys = list(self.columns(None))
        return np.array([[float(r[k]) if r[k] not in (None, "") else math.nan for k in keys] for r in rows])

    def parts(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, tuple[Task, np.ndarray, np.ndarray]]:
        """name -> task, truth and logits of the patients who have the cell. truth: (n, W); logits: (n, n_out)."""
        found: dict[str, tuple[Task, np.ndarray, np.ndarray]] = {}
        for name, task in self.targets:
            own = truth[:, self._places[name]]
            known = ~np.isnan(own[:, 0])
            values = own[known] if task.width > 1 else own[known, 0]
            if task.classes:
                values = values.astype(np.int64)
            found[name] = task, values, logits[known][:, self.slices[name]]
        return found

    def headline_of(self, truth: np.ndarray, logits: Tensor) -> dict[str, float]:
        found: dict[str, float] = {}
        heads: list[float] = []
        for name, (task, values, own) in self.parts(truth, logits.numpy()).items():
            each = task.headline_of(values, torch.from_numpy(own)) if len(values) else {task.headline: math.nan}
            heads.append(each[task.headline])
            found |= {f"{name}.{k}": v for k, v in each.items()}
        return {"headline": _mean_of_known(heads)} | found

    def learnt(self, targets: Sequence[Target]) -> dict[str, Any]:
        """targets: name -> what each learns from the training patients who have its cell."""
        found = {}
        for k, (name, task) in enumerate(self.targets):
            cells = [c.values[k] for c in targets if isinstance(c, Cells)]
            found[name] = task.learnt([c for c in cells if c is not None])
        return {"targets": found}

    def points(self, truth: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
        """targets: name -> what each fits on the validation patients who have its cell."""
        parts = self.parts(truth, logits)
        return {"targets": {n: t.points(y, z) if len(y) else {} for n, (t, y, z) in parts.items()}}

    def metrics(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, float]:
        """headline alone; those of a target are of its view (`metrics_of`)."""
        parts = self.parts(truth, logits).items()
        each = [t.headline_of(y, torch.from_numpy(z))[t.headline] if len(y) else math.nan for _, (t, y, z) in parts]
        return {"headline": _mean_of_known(each)}

    def metrics_of(self, truth: np.ndarray, logits: np.ndarray, points: Points) -> dict[str, dict[str, float]]:
        """name -> all metrics of each target."""
        of = points.get("targets", {})
        parts = self.parts(truth, logits).items()
        return {n: task.metrics(y, z, of.get(n, {})) if len(y) else {} for n, (task, y, z) in parts}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "targets": {name: task.to_json() for name, task in self.targets}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Several:
        """The task that `to_json` described."""
        return cls(tuple((name, one.from_json(task)) for name, task in value["targets"].items()))


def several(targets: Mapping[str, Task]) -> Several:
    """Two or more named targets. Raises TaskError for fewer, and for several in several."""
    if len(targets) < 2 or any(isinstance(t, Several) for t in targets.values()):
        raise TaskError(f"several targets are two or more single ones, not {len(targets)}")
    return Several(tuple(targets.items()))


def _mean_of_known(values: Sequence[float]) -> float:
    known = [max(v, WORST) for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan
