"""What the results of one kind of outcome are: the interface that a kind fills, and what all kinds share.

In: prediction rows that carry their truth, one per patient and training. Out: `Answers`, their arrays; and `Measure`,
the one place that knows a kind's columns, truth, decision, metrics and words. A new kind of outcome is one more file
beside this one. Knows no folder of a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mhim.configs.schema import ScoreConfig
from mhim.mil import estimators
from mhim.mil.tasks import Task
from mhim.pipeline.cohort.labels import rows as labels
from mhim.pipeline.training.card import Card

Row = dict[str, Any]
Place = tuple[int, int, int]
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Training:
    """One training's answers about the patients it held out. who: int (n,), places in `Answers.patients`.

    truth, score, called: arrays of n rows as the kind's `Measure.truth_of`, `score_of` and `called_of` give them.
    """

    repeat: int
    fold: int
    seed: int
    who: np.ndarray
    truth: np.ndarray
    score: np.ndarray
    called: np.ndarray


@dataclass(frozen=True)
class Answers:
    """All trainings of a run, of an ensemble, or all models on another cohort's patients.

    strata: int (N,), the fold that held each patient out (of the first repetition), inside which draws are made. Where
    each slide is a bag, `patients` are slides, and clusters, int (N,), tells whose each is: draws are of patients.
    """

    task: Task
    patients: tuple[str, ...]
    strata: np.ndarray
    trainings: tuple[Training, ...]
    clusters: np.ndarray | None = None

    @property
    def n_patients(self) -> int:
        """How many patients there are."""
        return len(self.patients) if self.clusters is None else len(np.unique(self.clusters))

    @property
    def seeds(self) -> list[list[Training]]:
        """The trainings, seed by seed."""
        return [[t for t in self.trainings if t.seed == s] for s in sorted({t.seed for t in self.trainings})]


@dataclass(frozen=True)
class Said:
    """A row as a person reads it. truth: "" where unknown. value: the number shown first, and `of` what it is.
    decision: "" where none is made. wrong: decided otherwise than the truth."""

    truth: str
    decision: str
    value: float
    of: str
    wrong: bool


class Measure(ABC):
    """The results of one kind of outcome, for one task.

    question: what such a run answers. truth: columns of the truth. compared: metrics that `compare` shows. tabled:
    those of `benchmark`, in order. ranking: those of pairs, or of orders, inside one training. decided: those of what
    was decided; for new patients they are of the decision handed out, of all models together. less_is_better: sign
    turned in comparisons. brief: what the report says first. pooled: whether ranking over all folds stands beside,
    under its own name. averaged: columns that several trainings' answers are averaged in, by their beginning.
    headline, no_pair: its name, and why a training may not define it.
    """

    question: ClassVar[str]
    truth: ClassVar[tuple[str, ...]]
    compared: ClassVar[tuple[str, ...]]
    tabled: ClassVar[tuple[str, ...]]
    ranking: ClassVar[tuple[str, ...]]
    decided: ClassVar[tuple[str, ...]] = ()
    less_is_better: ClassVar[tuple[str, ...]] = ()
    brief: ClassVar[tuple[str, ...]]
    pooled: ClassVar[bool] = False
    averaged: ClassVar[tuple[str, ...]]
    headline: ClassVar[str]
    no_pair: ClassVar[str]
    unlike: ClassVar[tuple[str, ...]] = ("unlike",)

    def __init__(self, task: Task) -> None:
        self.task = task

    # the answer of one model, and its truth

    @abstractmethod
    def answers(self, logits: np.ndarray, card: Card, config: ScoreConfig) -> list[Row]:
        """Logits float64 (n, n_out) as the columns that a person reads."""

    def frozen(self, card: Card, validation: Callable[[], Sequence[Row]], config: ScoreConfig) -> Any:
        """What was found on validation and frozen, and `verdict` needs besides the card. validation: reads the rows of
        the fold's validation patients, as `fold.read_predictions` gives them."""
        return None

    @abstractmethod
    def verdict(self, answer: Row, frozen: Any, card: Card) -> Row:
        """`answer` with the columns of what it decides."""

    @abstractmethod
    def known(self, row: Mapping[str, Any]) -> Row:
        """The truth columns of a row of a fold's `predictions.csv`."""

    @abstractmethod
    def told(self, row: labels.Row) -> Row | None:
        """The truth columns of a row of labels; None where it tells none, {} where it tells one that no model of this
        task can give (another class)."""

    @abstractmethod
    def positive(self, answer: Row) -> float:
        """The number whose spread over models is told, larger is more positive."""

    def sure(self, answer: Row) -> float:
        """By which one of a patient's slides speaks for all, each scored alone (`score.several_slides=max`)."""
        return self.positive(answer)

    # several models' answers about one patient

    def one(self, members: Sequence[Row]) -> Row:
        """One row out of those of one patient: numbers averaged, the decision made anew, `spread` added."""
        row = dict(members[0])
        if len(members) > 1:
            for key in row:
                if key.startswith(self.averaged) or key in self.unlike:
                    row[key] = float(np.mean([m[key] for m in members]))
        row |= self.decision(row)
        values = [self.positive(m) for m in members]
        row["spread"] = float(np.std(values, ddof=1)) if len(members) > 1 else None
        return row

    def decision(self, row: Row) -> Row:
        """The column `decision` of averaged numbers, where the row has one."""
        return {}

    def placed(self, row: Row, reference: np.ndarray) -> Row:
        """A row whose numbers have a scale of their model's own, on one that several models share. reference: (m,), the
        same of the patients that its model held out."""
        return row

    scale: ClassVar[str] = ""  # the column that has such a scale

    # numbers, for many weightings of the patients

    @abstractmethod
    def truth_of(self, rows: Sequence[Row]) -> np.ndarray:
        """The truth of rows as an array, (n, ...)."""

    @abstractmethod
    def score_of(self, rows: Sequence[Row]) -> np.ndarray:
        """The answers of rows as an array, (n, ...)."""

    def called_of(self, rows: Sequence[Row]) -> np.ndarray:
        """int (n,), the class that was decided on, -1 for undecided; (0,) of a kind without decisions."""
        return np.empty(0, np.int64)

    @abstractmethod
    def values(self, trainings: Sequence[Training], weights: np.ndarray, horizons: Sequence[float]) -> Values:
        """Every metric (D,) of the trainings of a seed, for weights (D, N): how often each patient counts."""

    @abstractmethod
    def pairs(self, one: Training) -> float:
        """How many pairs the headline metric counts in a training; of a headline without pairs, patients."""

    def tables(
        self, found: Answers, rows: Sequence[Row], together: Sequence[Row], config: ScoreConfig, scaled: Scaled
    ) -> Row:
        """Further keys of `metrics.json`, of a run's own patients and of new ones. found, rows: every training's;
        together: one row per patient. scaled: gives `together` before (False) and after (True) temperature scaling."""
        return {}

    def own_tables(self, together: Sequence[Row]) -> Row:
        """Further keys of the `metrics.json` of a run's own patients alone. together: one row per patient."""
        return {}

    def lines(self, found: Mapping[str, Any]) -> list[str]:
        """What a report says below the table of metrics, out of what `tables` made."""
        return []

    def odd(self, rows: Sequence[Row], inside: Sequence[Row]) -> list[str]:
        """What is strange about the truth of new patients beside that of the run's own (rows of folds, as text)."""
        return []

    # words

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What a row of labels must tell."""

    @abstractmethod
    def said(self, row: Row) -> Said:
        """A row as a person reads it."""

    @abstractmethod
    def answer(self, row: Row, several: bool) -> tuple[str, str]:
        """The numbers of a new patient in a line, and what is decided ("" for nothing). several: of several models."""

    def label(self, name: str, horizons: Sequence[float]) -> str:
        """A metric's name for a table."""
        return name

    def hint(self, truths: Sequence[Mapping[str, Sequence[Any]]], other: Sequence[str]) -> str:
        """Why two runs may have other truths. truths: patient -> truth columns, of both; other: who differs."""
        return ""


Scaled = Callable[[bool], Sequence[Row]]


def bag_of(row: Mapping[str, Any]) -> str:
    """What a row answers for: its patient, or its slide where each slide is a bag (train.bag=slide)."""
    return str(row["slide"] if of_slides(row) else row["patient"])


def of_slides(row: Mapping[str, Any]) -> bool:
    """Whether a row answers for one slide with a label of its own."""
    return row.get("unit") == "slide"


def place(row: Mapping[str, Any]) -> Place:
    """(repeat, fold, seed) of the training that a row is of."""
    return int(row["repeat"]), int(row["fold"]), int(row["seed"])


def added(each: Sequence[estimators.Pairs]) -> np.ndarray:
    """The ratio of numerators and denominators that are added up over trainings, (D,)."""
    above, below = (np.sum([pair[k] for pair in each], axis=0) for k in (0, 1))
    return estimators.ratio((above, below))


def mean(each: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over what is defined, draw by draw; NaN where nothing is."""
    stacked = np.stack(each)
    there = np.isfinite(stacked)
    return estimators.ratio((np.where(there, stacked, 0.0).sum(axis=0), there.sum(axis=0).astype(np.float64)))


def joined(trainings: Sequence[Training], *names: str) -> list[np.ndarray]:
    """Arrays of the trainings one below the other: `who`, `truth`, `score`, `called`."""
    return [np.concatenate([getattr(t, name) for t in trainings]) for name in names]


def confusion(found: Answers) -> list[list[int]]:
    """counts[true class][class decided on] over all trainings' patients; the undecided count nowhere."""
    n = len(found.task.classes)
    total = np.zeros((n, n))
    for one in found.trainings:
        total += estimators.confusion(one.truth, one.called, n, np.ones((1, len(one.who))))[0]
    counts: list[list[int]] = total.astype(int).tolist()
    return counts
