"""A number: the predicted value in the labels' unit, and an interval of stated coverage around it.

Columns of a row: `label`, the true number; `predicted`; `low`, `high`: of the interval at `score.confidence`. It is
that of split conformal prediction (see `mil/tasks/regression.py`): predicted ± the half width that the fold's
validation patients gave, frozen before a test patient is looked at; the whole line where they are too few. A value has
the unit of the labels, whatever model gave it: errors are summed over patients. Correlations ask for order or slope,
which two models need not share: they are taken inside each training and averaged, weighted by its patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators, outcome_metrics
from mhim.mil.tasks import Regression as Task
from mhim.pipeline.cohort import outcomes
from mhim.pipeline.cohort.labels import rows as labels
from mhim.pipeline.results.measures import measure
from mhim.pipeline.results.measures.measure import Answers, Measure, Row, Said, Scaled, Training, Values
from mhim.pipeline.training import fold
from mhim.pipeline.training.card import Card

UNIT = 8.0  # a ratio of medians that no cohort explains; percent and shares: 100


class Regression(Measure):
    """See the module."""

    question = "a number"
    headline, no_pair = "R2", "no two different values"
    truth = ("label",)
    ranking = ("pearson", "spearman")
    compared = ("r2", "mae", "rmse", "pearson", "spearman", "interval_width")
    tabled = ("r2", "mae", "pearson", "spearman", "coverage", "interval_width")
    less_is_better = ("mae", "rmse", "interval_width")
    brief = ("r2", "mae", "spearman", "coverage")
    averaged = ("predicted", "low", "high")

    def answers(self, logits: np.ndarray, card: Card, config: ScoreConfig) -> list[Row]:
        assert isinstance(self.task, Task)
        return [{"predicted": float(v)} for v in self.task.value(torch.from_numpy(logits)).numpy()]

    def frozen(self, card: Card, validation: Callable[[], Sequence[Row]], config: ScoreConfig) -> float:
        """Half width of the interval at `score.confidence`: of the card, or by the same rule for another level."""
        level = f"{config.confidence:g}"
        if card.interval is not None and level in card.interval:
            width = card.interval[level]
            return math.inf if width is None else float(width)
        rows = list(validation())
        if not rows:
            return math.inf
        assert isinstance(self.task, Task)
        value = self.task.value(torch.from_numpy(fold.logits_of(rows))).numpy()
        return outcome_metrics.conformal_half_width(np.abs(self.task.truth(rows) - value), config.confidence)

    def verdict(self, answer: Row, frozen: Any, card: Card) -> Row:
        return {**answer, "low": answer["predicted"] - frozen, "high": answer["predicted"] + frozen}

    def known(self, row: Mapping[str, Any]) -> Row:
        return {"label": float(row["target"])}

    def told(self, row: labels.Row) -> Row | None:
        """Raises CohortError for text."""
        if row.label is None:
            return None
        try:
            return {"label": outcomes.finite_number(row, row.label)}
        except ValueError as error:
            raise labels.CohortError(f"row {row.number}, {error}, which this model predicts") from None

    def positive(self, answer: Row) -> float:
        return float(answer["predicted"])

    def truth_of(self, rows: Sequence[Row]) -> np.ndarray:
        """float64 (n,)."""
        return np.array([float(r["label"]) for r in rows], dtype=np.float64)

    def score_of(self, rows: Sequence[Row]) -> np.ndarray:
        """float64 (n, 3): predicted, low, high."""
        return np.array([[float(r[k]) for k in ("predicted", "low", "high")] for r in rows], dtype=np.float64)

    def values(self, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]) -> Values:
        """r2, mae, rmse, coverage (share of the patients whose interval holds the truth) and interval_width (mean of
        those that are finite): over all patients. pearson, spearman: inside each training."""
        who, truth, score = measure.joined(trainings, "who", "truth", "score")
        own, (value, low, high) = weights[:, who], score.T
        inside = ((truth >= low) & (truth <= high)).astype(np.float64)
        finite = np.isfinite(high - low)
        width = np.where(finite, high - low, 0.0)
        return {
            "r2": estimators.r2(truth, value, own),
            "mae": estimators.mean_error(np.abs(truth - value), own),
            "rmse": np.sqrt(estimators.mean_error((truth - value) ** 2, own)),
            "pearson": _inside(estimators.pearson, trainings, weights),
            "spearman": _inside(estimators.spearman, trainings, weights),
            "coverage": estimators.mean_error(inside, own),
            "interval_width": estimators.mean_error(width, own * finite),
        }

    def pairs(self, one: Training) -> float:
        """R2 has none: patients."""
        return float(len(one.who))

    def tables(
        self, found: Answers, rows: Sequence[Row], together: Sequence[Row], config: ScoreConfig, scaled: Scaled
    ) -> Row:
        """`interval_rule`: by what rule low and high were found, and of how many trainings they are the whole line."""
        places = {measure.place(r) for r in rows}
        endless = len({measure.place(r) for r in rows if not math.isfinite(r["high"] - r["low"])})
        least = math.ceil(round(config.confidence / (1 - config.confidence), 9))
        told = f"predicted ± a half width for {100 * config.confidence:g} % coverage, found on each training's "
        whom = "slides" if any(measure.of_slides(r) for r in rows) else "patients"
        told += f"validation {whom} (split conformal) and frozen"
        if endless:
            told += f"; {endless} of {len(places)} trainings had fewer than {least} of them: no finite interval"
        return {"interval_rule": told}

    def odd(self, rows: Sequence[Row], inside: Sequence[Row]) -> list[str]:
        """Values beyond all that are known, or of another unit."""
        if not inside:
            return []
        theirs, own = self.truth_of(rows), np.array([float(r["target"]) for r in inside])
        said = []
        beyond = int(((theirs > own.max()) | (theirs < own.min())).sum())
        if beyond:
            said.append(
                f"{beyond} of {len(theirs)} new patients have values beyond those of the run's own patients "
                f"({theirs.min():.4g} to {theirs.max():.4g}, the run's own {own.min():.4g} to {own.max():.4g})"
            )
        middle, known = float(np.median(theirs)), float(np.median(own))
        ratio = middle / known if middle > 0 and known > 0 else 1.0
        if not 1 / UNIT < ratio < UNIT:
            said.append(
                f"the new patients' median value is {middle:.4g}, that of the run's own patients {known:.4g} "
                f"({ratio:.3g} times): another unit, such as percent and shares?"
            )
        return said

    @property
    def wanted(self) -> str:
        return "a number as label"

    def said(self, row: Row) -> Said:
        """wrong: the interval does not hold the truth."""
        value, label = float(row["predicted"]), row.get("label")
        if label in (None, ""):
            return Said("", "", value, "predicted", False)
        wrong = not float(row["low"]) <= float(label) <= float(row["high"])
        return Said(f"{float(label):g}", "", value, "predicted", wrong)

    def answer(self, row: Row, several: bool) -> tuple[str, str]:
        bounds = f" [{row['low']:.4g}, {row['high']:.4g}]" if math.isfinite(row["high"]) else ""
        return f"predicted {row['predicted']:.4g}{bounds}", ""

    def hint(self, truths: Sequence[Mapping[str, Sequence[Any]]], other: Sequence[str]) -> str:
        """Where one run's values are a multiple of the other's."""
        pairs = [(float(truths[0][p][0]), float(truths[1][p][0])) for p in other]
        ratios = [b / a for a, b in pairs if a]
        if len(ratios) < 2 or min(ratios) <= 0 or max(ratios) > 1.05 * min(ratios):
            return ""
        return f" (all values {np.median(ratios):.4g} times as large: another unit, such as percent and shares?)"


def _inside(
    correlation: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    trainings: Sequence[Training],
    weights: np.ndarray,
) -> np.ndarray:
    """(D,) mean of the trainings' correlations, weighted by their patients, over those that define it."""
    above, below = np.zeros(len(weights)), np.zeros(len(weights))
    for one in trainings:
        own = weights[:, one.who]
        found = correlation(one.truth, one.score[:, 0], own)
        there = np.isfinite(found)
        above += np.where(there, found, 0.0) * own.sum(axis=1)
        below += there * own.sum(axis=1)
    return estimators.ratio((above, below))
