"""Late fusion: each modality's own model answers, and the answers are weighed (a baseline that is seldom beaten).

    s̃_m = (s_m - μ_m) / σ_m              standardised by the member's out-of-fold scores of its training part
    w_m                                   by out-of-fold skill, pulled to equal weights as far as that is uncertain
    u_P = Σ_{m in P} w_m s̃_m / Σ_{m in P} w_m          P: the modalities at hand
    score = β_P u_P + α_P                 β_P > 0 and α_P by the outcome's likelihood, for each pattern P by itself

Shapes: s_m (n, q), q logits of the outcome (1 log risk; C classes; K - 1 steps of grades; 1 number); σ, w, β scalars.
Because each pattern has a slope of its own, a patient of whom only the weaker modality is known is put near the middle,
and the scores of complete and incomplete patients can be compared. With one modality at hand the score is an increasing
function of that member's (of two classes, of survival, of a number): its ranking is the member's own. Nothing but the
patient's own scores enters its answer.

Others place a risk by its percentile among the out-of-fold risks; here it is a straight line, which has no ties and no
end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from mhim.mil.fusion import linear, skill
from mhim.mil.fusion.linear import Form

MOST = 8  # modalities: 255 patterns
LEAST_OF_SCALE = 10  # patients
LEAST_SLOPE = 0.01  # of a pattern that says nothing: its patients keep their order, nearly in the middle
PRIOR = 2.0  # pseudo-patients of whom the modalities say nothing


class FusionError(ValueError):
    """These modalities cannot be fused; the message says why."""


@dataclass(frozen=True)
class Pattern:
    """weights: modality -> w_m, sum 1 over the pattern. slope: β_P. offset: α_P, (q,). patients: fitted on so many."""

    weights: Mapping[str, float]
    slope: float
    offset: tuple[float, ...]
    patients: int


@dataclass(frozen=True)
class Late:
    """centre: modality -> μ_m (q,); spread: modality -> σ_m; skill: modality -> out-of-fold concordance minus .5;
    patterns: the modalities at hand, in the order of `names` -> how they are weighed."""

    form: Form
    names: tuple[str, ...]
    centre: Mapping[str, tuple[float, ...]]
    spread: Mapping[str, float]
    skill: Mapping[str, float]
    patterns: Mapping[tuple[str, ...], Pattern]

    def score(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 (q,) of one patient. given: modality -> scores (q,), without those that are not at hand."""
        pattern = self.pattern(given)
        scored: np.ndarray = pattern.slope * self._mixed(given, pattern) + np.array(pattern.offset)
        return scored

    def parts(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each modality at hand adds to the score, (q,) each; with the pattern's offset they add up to it."""
        pattern = self.pattern(given)
        return {m: pattern.slope * pattern.weights[m] * self.standard(m, given[m]) for m in pattern.weights}

    def rescaled(self, scores: Mapping[str, np.ndarray]) -> Late:
        """The same for members of another scale, by scores (m, q) of patients that none of them learnt from; a handful
        of patients tell no scale, and leave it as it is."""
        usable = {m: s for m, s in scores.items() if len(s) >= LEAST_OF_SCALE and (s.std(axis=0) > 0).any()}
        centre = {m: tuple(s.mean(axis=0).tolist()) for m, s in usable.items()}
        spread = {m: math.sqrt(float(s.var(axis=0).mean())) for m, s in usable.items()}
        return replace(self, centre={**self.centre, **centre}, spread={**self.spread, **spread})

    def pattern(self, given: Mapping[str, Any]) -> Pattern:
        """How the modalities of `given` are weighed. Raises FusionError if there is none."""
        present = tuple(m for m in self.names if m in given)
        if not present:
            raise FusionError(f"none of the modalities {', '.join(self.names)} is at hand for this patient")
        return self.patterns[present]

    def weights(self, given: Mapping[str, Any]) -> dict[str, float]:
        """Modality at hand -> its weight, sum 1."""
        return dict(self.pattern(given).weights)

    def standard(self, name: str, scores: np.ndarray) -> np.ndarray:
        """Scores of a member in its standard unit."""
        standard: np.ndarray = (np.asarray(scores, np.float64) - np.array(self.centre[name])) / self.spread[name]
        return standard

    def _mixed(self, given: Mapping[str, np.ndarray], pattern: Pattern) -> np.ndarray:
        mixed: np.ndarray = np.sum([w * self.standard(m, given[m]) for m, w in pattern.weights.items()], axis=0)
        return mixed

    def to_json(self) -> dict[str, Any]:
        """Plain values from which `from_json` makes the same."""
        return {
            "form": self.form,
            "names": list(self.names),
            "centre": {m: list(v) for m, v in self.centre.items()},
            "spread": dict(self.spread),
            "skill": dict(self.skill),
            "patterns": [
                {
                    "of": list(of),
                    "weights": dict(p.weights),
                    "slope": p.slope,
                    "offset": list(p.offset),
                    "n": p.patients,
                }
                for of, p in self.patterns.items()
            ],
        }


@dataclass(frozen=True)
class OnLate:
    """What weighs modalities from a late fusion on: its form, modalities, skills and patterns are that one's."""

    late: Late

    @property
    def form(self) -> Form:
        return self.late.form

    @property
    def names(self) -> tuple[str, ...]:
        return self.late.names

    @property
    def skill(self) -> Mapping[str, float]:
        return self.late.skill

    @property
    def patterns(self) -> Mapping[tuple[str, ...], Pattern]:
        return self.late.patterns


def from_json(value: Mapping[str, Any]) -> Late:
    """The fusion that `Late.to_json` described."""
    patterns = {
        tuple(p["of"]): Pattern(dict(p["weights"]), float(p["slope"]), tuple(p["offset"]), int(p["n"]))
        for p in value["patterns"]
    }
    centre = {m: tuple(v) for m, v in value["centre"].items()}
    return Late(value["form"], tuple(value["names"]), centre, dict(value["spread"]), dict(value["skill"]), patterns)


def fit(
    outside: Mapping[str, np.ndarray],
    target: np.ndarray,
    form: Form,
    inner: Sequence[np.ndarray],
    levels: int = 0,
    whole: bool = False,
) -> Late:
    """Weigh modalities by out-of-fold scores.

    outside: modality -> float64 (n, q), each patient's scores by a model that did not see it; NaN rows where a patient
    has none. target: as `linear.fit` takes it. inner: the patients that each inner fold left out. levels: number of
    classes or grades. whole: fit the pattern of all of them alone. Raises FusionError."""
    names = tuple(outside)
    if not 1 <= len(names) <= MOST + whole:
        raise FusionError(f"{len(names)} modalities: between 1 and {MOST} can be fused")
    there = {m: np.isfinite(s).all(axis=1) for m, s in outside.items()}
    for name, has in there.items():
        if not has.any():
            raise FusionError(f"no patient of the training part has scores of {name}: leave it away")
    centre = {m: s[there[m]].mean(axis=0) for m, s in outside.items()}
    spread = {m: _spread(outside[m], [i[there[m][i]] for i in inner]) for m in names}
    standard = {m: _by_fold(outside[m], spread[m], there[m], inner) for m in names}
    patterns, alone = {}, {}
    for size in range(len(names) if whole else 1, len(names) + 1):
        for of in combinations(names, size):
            has = np.flatnonzero(np.all([there[m] for m in of], axis=0))
            patterns[of] = _pattern(of, {m: standard[m] for m in of}, target, form, inner, has, levels)
    for m in names:
        has = np.flatnonzero(there[m])
        alone[m] = skill.of(standard[m][has], target[has], form, _within(inner, has)).value
    plain = {m: tuple(float(v) for v in centre[m]) for m in names}
    return Late(form, names, plain, spread, alone, patterns)


def _within(inner: Sequence[np.ndarray], has: np.ndarray) -> list[np.ndarray]:
    """The inner folds as places in `has`."""
    found = [np.flatnonzero(np.isin(has, members)) for members in inner]
    return [f for f in found if len(f)]


def _spread(scores: np.ndarray, inner: Sequence[np.ndarray]) -> float:
    """One standard deviation of all columns, around the mean of each inner fold; 1 where nothing varies."""
    parts = [(scores[i] - scores[i].mean(axis=0)).ravel() for i in inner if len(i)]
    found = math.sqrt(float((np.concatenate(parts) ** 2).mean())) if parts else 0.0
    return found if found > 1e-12 else 1.0


def by_fold(outside: Mapping[str, np.ndarray], of: Late, inner: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Out-of-fold scores (n, q) in the standard units that `of` was fitted with, NaN rows where there are none."""
    return {m: _by_fold(s, of.spread[m], np.isfinite(s).all(axis=1), inner) for m, s in outside.items()}


def _by_fold(scores: np.ndarray, spread: float, there: np.ndarray, inner: Sequence[np.ndarray]) -> np.ndarray:
    """Out-of-fold scores as if of one model: each inner fold moved to the common centre, then standardised."""
    made = np.full(scores.shape, np.nan)
    for members in inner:
        own = members[there[members]]
        if len(own):
            made[own] = (scores[own] - scores[own].mean(axis=0)) / spread
    return made


def _pattern(
    of: tuple[str, ...],
    standard: Mapping[str, np.ndarray],
    target: np.ndarray,
    form: Form,
    inner: Sequence[np.ndarray],
    has: np.ndarray,
    levels: int,
) -> Pattern:
    """Weights and slope of one pattern, by the training patients who have (at least) its modalities."""
    own = _within(inner, has)
    if not len(has) or not own:
        even = dict.fromkeys(of, 1.0 / len(of))
        q = next(iter(standard.values())).shape[1]
        return Pattern(even, 1.0, (0.0,) * q, 0)
    given = {m: standard[m][has] for m in of}
    found = skill.weights([skill.of(given[m], target[has], form, own) for m in of])
    mixed = np.sum([w * given[m] for m, w in zip(of, found, strict=True)], axis=0)
    slope, offset = line(mixed, target[has], form, levels)
    return Pattern(dict(zip(of, found.tolist(), strict=True)), slope, tuple(offset.tolist()), len(has))


def line(u: np.ndarray, target: np.ndarray, form: Form, levels: int = 0) -> tuple[float, np.ndarray]:
    """(β, α (q,)) of the best β u + α by the outcome's likelihood, β at least `LEAST_SLOPE`. u: (n, q)."""
    from scipy.optimize import minimize

    n, q = u.shape
    free = 0 if form == "survival" else q
    unit = float(target.std() or 1.0) if form == "number" else 1.0  # a number's slope is in its own unit
    aim = (target - target.mean()) / unit if form == "number" else target

    def value(x: np.ndarray) -> float:
        offset = np.concatenate([x[1:], np.zeros(q - free)])
        loss = linear.loss(x[0] * u + offset, aim, form)
        return float((loss + 0.5 * PRIOR * x[0] ** 2 + 0.5e-3 * float(x[1:] @ x[1:])) / n)

    found = minimize(value, np.array([0.5] + [0.0] * free), method="BFGS", options={"gtol": 1e-7})
    slope, offset = max(float(found.x[0]), LEAST_SLOPE), np.concatenate([found.x[1:], np.zeros(q - free)])
    if form == "number":
        return slope * unit, offset * unit + float(target.mean())
    return slope, offset
