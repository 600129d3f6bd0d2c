"""Survival, discrete-time and Cox: a risk, groups above and below a frozen threshold, concordance inside trainings.

Columns of a row: `time`, `event`; `risk` (larger is worse), `risk_threshold`; discrete: `free_after_bin_<k>`; of
several models `high_risk`, the share of them that says so. Risks have no common scale: see `placed`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators
from mhim.mil.tasks import Nll
from mhim.pipeline.cohort.labels import rows as labels
from mhim.pipeline.results import risk_groups
from mhim.pipeline.results.measures import measure
from mhim.pipeline.results.measures.measure import Measure, Row, Said, Training, Values
from mhim.pipeline.training.card import Card

UNIT = 8.0  # a ratio of median times that no cohort explains; days in a month: 30, months in a year: 12


class Survival(Measure):
    """See the module."""

    question = "survival"
    headline, no_pair = "C-index", "no comparable pair"
    truth = ("time", "event")
    ranking = ("c_index",)
    compared = ("c_index", "time_auc_1", "time_auc_2", "time_auc_3")
    tabled = compared
    brief = ("c_index",)
    averaged = ("risk", "high_risk", "free_after_bin_")
    scale = "risk"

    def answers(self, logits: np.ndarray, card: Card, config: ScoreConfig) -> list[Row]:
        found = torch.from_numpy(logits)
        rows: list[Row] = [{"risk": float(r)} for r in self.task.risk(found).numpy()]
        if isinstance(self.task, Nll):
            for row, curve in zip(rows, self.task.survival_curve(found).numpy(), strict=True):
                row |= {f"free_after_bin_{k}": float(v) for k, v in enumerate(curve)}
        return rows

    def verdict(self, answer: Row, frozen: Any, card: Card) -> Row:
        """The risk that divides high from low."""
        return {**answer, "risk_threshold": math.nan if card.risk_threshold is None else float(card.risk_threshold)}

    def known(self, row: Mapping[str, Any]) -> Row:
        return {"time": float(row["time"]), "event": int(float(row["event"]))}

    def told(self, row: labels.Row) -> Row | None:
        return None if row.time is None or row.event is None else {"time": row.time, "event": row.event}

    def positive(self, answer: Row) -> float:
        return float(answer["risk"])

    def placed(self, row: Row, reference: np.ndarray) -> Row:
        """Risk and threshold as positions among the risks that the row's own model held out, 0 lowest to 1 highest, and
        what it says of the group."""
        own = risk_groups.high(row)
        cut = row.get("risk_threshold")
        moved = {"risk": position(row["risk"], reference), "high_risk": math.nan if own is None else float(own)}
        if cut not in (None, ""):
            moved["risk_threshold"] = position(cut, reference) if math.isfinite(cut) else math.nan
        return row | moved

    def truth_of(self, rows: Sequence[Row]) -> np.ndarray:
        """float64 (n, 2), time and event."""
        return np.array([[r["time"], r["event"]] for r in rows], dtype=np.float64)

    def score_of(self, rows: Sequence[Row]) -> np.ndarray:
        """float64 (n,), risks."""
        return np.array([r["risk"] for r in rows], dtype=np.float64)

    def values(self, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]) -> Values:
        def arrays(t: Training) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return t.truth[:, 0], t.truth[:, 1], t.score

        made = {
            "c_index": measure.added([estimators.concordance_pairs(*arrays(t), weights[:, t.who]) for t in trainings])
        }
        for k, at in enumerate(horizons, start=1):
            made[f"time_auc_{k}"] = measure.added(
                [estimators.time_auc_pairs(*arrays(t), at, weights[:, t.who]) for t in trainings]
            )
        return made

    def pairs(self, one: Training) -> float:
        """Comparable pairs."""
        w = np.ones((1, len(one.who)))
        return float(estimators.concordance_pairs(one.truth[:, 0], one.truth[:, 1], one.score, w)[1][0])

    def own_tables(self, together: Sequence[Row]) -> Row:
        """The log-rank test, which takes all rows for independent: none where a patient has several."""
        if any(measure.of_slides(r) for r in together):
            return {}
        return {
            "log_rank_p": risk_groups.log_rank(together),
            "log_rank_stratified_p": risk_groups.log_rank(together, by_fold=True),
        }

    def odd(self, rows: Sequence[Row], inside: Sequence[Row]) -> list[str]:
        """Times beyond all that are known, or of another unit."""
        if not inside:
            return []  # weights that were brought in
        theirs, own = np.array([r["time"] for r in rows]), np.array([float(r["time"]) for r in inside])
        said = []
        beyond = int((theirs > own.max()).sum())
        if beyond:
            said.append(
                f"{beyond} of {len(theirs)} new patients have times beyond the longest of the run's own patients "
                f"({theirs.max():.4g} against {own.max():.4g})"
            )
        ratio = float(np.median(theirs) / np.median(own)) if np.median(own) > 0 else 1.0
        if ratio >= UNIT or 0 < ratio <= 1 / UNIT:
            said.append(
                f"the new patients' median time is {np.median(theirs):.4g}, that of the run's own patients "
                f"{np.median(own):.4g} ({ratio:.3g} times): another unit, such as days and months? "
                "Time-dependent AUCs are meaningless then"
            )
        return said

    @property
    def wanted(self) -> str:
        return "time and event"

    def said(self, row: Row) -> Said:
        truth = ""
        if row.get("time") not in (None, ""):
            truth = f"{row['time']} {'event' if row['event'] == 1 else 'censored'}"
        return Said(truth, "", float(row["risk"]), "", False)

    def answer(self, row: Row, several: bool) -> tuple[str, str]:
        high = risk_groups.high(row)
        named = "risk position" if several else "risk"  # of several models: see NUMBERS.md
        return f"{named} {row['risk']:.3f}", "" if high is None else f"{'high' if high else 'low'} risk"

    def label(self, name: str, horizons: Sequence[float]) -> str:
        """A time-dependent AUC with its time, in the unit of the labels."""
        if name.startswith("time_auc_"):
            k = int(name.removeprefix("time_auc_")) - 1
            if k < len(horizons):
                return f"{name} (at {horizons[k]:.4g})"
        return name

    def hint(self, truths: Sequence[Mapping[str, Sequence[Any]]], other: Sequence[str]) -> str:
        """Where one run's times are a multiple of the other's."""
        ratios = [truths[1][p][0] / truths[0][p][0] for p in other if truths[0][p][0] > 0]
        if len(ratios) < 2 or not ratios[0] or max(ratios) > 1.05 * min(ratios):
            return ""
        return f" (all times {np.median(ratios):.4g} times as long: another unit, such as days and months?)"


def position(risk: float, reference: np.ndarray) -> float:
    """Share of the reference risks below `risk`, ties a half: its mid-rank, between 0 and 1. reference: (m,), m > 0."""
    return float(((reference < risk).sum() + 0.5 * (reference == risk).sum()) / len(reference))
