"""Gated fusion: each patient's own weights over the modalities at hand, learnt with modalities dropped at random.

    a_m = exp(u_m) / Σ_{k at hand} exp(u_k),   u_m = b_m + v_m' f,   f = [s̃; |s̃|; 1 or 0 for each at hand or not]
    score = α + Σ_m a_m exp(g_m) s̃_m

s̃_m: out-of-fold scores as `late.py` standardises them, (q,), zeros where absent; f: (2 M q + M,); a, b, g: (M,); v: (M,
M q + M); α: (q,), none of survival. Gates over present modalities are those of mixtures of experts (Jacobs et al.
1991); whole modalities are dropped per patient, never all, as in ModDrop (Neverova et al. 2015), so that one loss
holds patients of every pattern and their scores have one scale. With one modality at hand its weight is 1: the ranking
is that member's own.

Fitted by the outcome's likelihood over fixed draws of what is dropped, with v pulled to 0 (then it is late fusion with
learnt weights) and b to the weights of late fusion. Every number is a function of the training part and of fixed draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhim.mil.fusion import late
from mhim.mil.fusion.late import FusionError, OnLate
from mhim.mil.fusion.linear import Form

DRAWS, DROPPED = 8, 0.3  # passes over the patients, and the share of modalities that each lacks in them
HOLD_GATE, HOLD_REST = 20.0, 2.0  # pseudo-patients who hold v at 0, and b and g where late fusion has them


@dataclass(frozen=True)
class Gate(OnLate):
    """late: the fusion that it begins at and standardises by. bias, gain: float64 (M,), b and g. to: float64 (M, 2 M q
    + M), v. offset: (q,), α."""

    bias: np.ndarray
    gain: np.ndarray
    to: np.ndarray
    offset: np.ndarray

    def score(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 (q,) of one patient. given: modality -> scores (q,), without those that are not at hand."""
        found: np.ndarray = np.sum(list(self.parts(given).values()), axis=0) + self.offset
        return found

    def parts(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each modality at hand adds to the score, (q,) each; with the offset they add up to it."""
        weights = self.weights(given)
        gain = dict(zip(self.names, np.exp(self.gain), strict=True))
        return {m: w * gain[m] * self.late.standard(m, given[m]) for m, w in weights.items()}

    def weights(self, given: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Modality at hand -> its weight, sum 1. Raises FusionError if there is none."""
        here = [m for m in self.names if m in given]
        if not here:
            raise FusionError(f"none of the modalities {', '.join(self.names)} is at hand for this patient")
        q = len(self.offset)
        seen = [self.late.standard(m, given[m]) if m in given else np.zeros(q) for m in self.names]
        f = np.concatenate([*seen, *map(np.abs, seen), [float(m in given) for m in self.names]])
        u = {m: self.bias[i] + self.to[i] @ f for i, m in enumerate(self.names) if m in given}
        top = max(u.values())
        total = sum(np.exp(v - top) for v in u.values())
        return {m: float(np.exp(v - top) / total) for m, v in u.items()}

    def rescaled(self, scores: Mapping[str, np.ndarray]) -> Gate:
        """See `Late.rescaled`."""
        return replace(self, late=self.late.rescaled(scores))

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes the same."""
        own = {"bias": self.bias, "gain": self.gain, "to": self.to, "offset": self.offset}
        return {"late": self.late.to_json(), **{k: v.tolist() for k, v in own.items()}}


def from_json(value: Mapping[str, Any]) -> Gate:
    """The fusion that `Gate.to_json` described."""
    own = {k: np.array(value[k], dtype=np.float64) for k in ("bias", "gain", "to", "offset")}
    return Gate(late.from_json(value["late"]), **own)


def fit(
    outside: Mapping[str, np.ndarray], target: np.ndarray, form: Form, inner: Sequence[np.ndarray], levels: int = 0
) -> Gate:
    """Learn the gate from out-of-fold scores; arguments and errors as of `late.fit`."""
    start = late.fit(outside, target, form, inner, levels)
    names, n = start.names, len(target)
    standard = late.by_fold(outside, start, inner)
    there = np.stack([np.isfinite(standard[m]).all(axis=1) for m in names], axis=1)
    usable = np.flatnonzero(there.any(axis=1))
    q = next(iter(standard.values())).shape[1]
    s = torch.from_numpy(np.nan_to_num(np.stack([standard[m] for m in names], axis=1))[usable])  # (n, M, q)
    masks = torch.from_numpy(_dropped(there[usable]))  # (draws, n, M)
    aim = torch.from_numpy(np.asarray(target, np.float64)[usable])
    mean, unit = (float(aim.mean()), float(aim.std()) or 1.0) if form == "number" else (0.0, 1.0)
    aim = (aim - mean) / unit if form == "number" else aim
    whole = start.patterns[names].weights
    first = torch.tensor(np.log(np.maximum([whole[m] for m in names], 1e-3)), dtype=torch.float64)
    slopes = torch.tensor(np.log([start.patterns[(m,)].slope / unit for m in names]), dtype=torch.float64)
    free = torch.cat([first, slopes, torch.zeros(len(names) * (len(names) * (2 * q + 1)) + q, dtype=torch.float64)])
    free.requires_grad_(True)
    usual = free.detach().clone()
    m = len(names)

    def cut(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x[:m], x[m : 2 * m], x[2 * m : len(x) - q].reshape(m, m * (2 * q + 1)), x[len(x) - q :]

    def loss() -> Tensor:
        bias, gain, to, offset = cut(free)
        total = torch.zeros((), dtype=torch.float64)
        for mask in masks:
            seen = (s * mask[:, :, None]).flatten(1)
            f = torch.cat([seen, seen.abs(), mask], dim=1)
            u = (bias + f @ to.T).masked_fill(mask == 0, -torch.inf)
            mixed = ((torch.softmax(u, dim=1) * gain.exp())[:, :, None] * s).sum(dim=1)
            total = total + _loss(mixed + offset, aim, form) / len(masks)
        held = HOLD_GATE * (to**2).sum() + HOLD_REST * ((free - usual)[: 2 * m] ** 2).sum() + 1e-3 * (offset**2).sum()
        return (total + 0.5 * held) / n

    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if form == "survival":
            assert free.grad is not None
            free.grad[len(free) - q :] = 0.0  # a constant changes no partial likelihood
        return float(value.detach())

    optimizer.step(closure)
    bias, gain, to, offset = (v.detach().numpy().copy() for v in cut(free))
    return Gate(start, bias, gain + np.log(unit), to, offset * unit + mean)


def _dropped(there: np.ndarray) -> np.ndarray:
    """float64 (draws, n, M): 1 where a modality is at hand and not dropped; the first draw drops none, and no draw all
    of a patient."""
    rng = np.random.default_rng(0)
    masks = [there]
    for _ in range(DRAWS - 1):
        kept = there & (rng.random(there.shape) >= DROPPED)
        some = np.asarray(kept.any(axis=1))
        masks.append(np.where(some[:, None], kept, there))
    return np.stack(masks).astype(np.float64)


def _loss(scores: Tensor, target: Tensor, form: Form) -> Tensor:
    """Sum over the patients, as `linear.loss`."""
    if form == "survival":
        time, event, eta = target[:, 0], target[:, 1], scores[:, 0]
        sums = torch.where(time[None, :] >= time[:, None], eta[None, :], -torch.inf).logsumexp(dim=1)
        return (event * (sums - eta)).sum()
    if form == "number":
        return 0.5 * ((scores[:, 0] - target) ** 2).sum()
    if form == "classes":
        return torch.nn.functional.cross_entropy(scores, target.long(), reduction="sum")
    steps = torch.arange(scores.shape[1])
    reached, above = target[:, None] >= steps, target[:, None] > steps
    each = torch.nn.functional.softplus(torch.where(above, -scores, scores))
    return torch.where(reached, each, 0.0).sum()
