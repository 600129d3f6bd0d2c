"""What `metrics.json` says: of a run's held-out patients (`Metrics`), and of other patients (`ExternalMetrics`).

In: the plain values of the file, or the fields of a new one. Out: frozen values. What each number is: NUMBERS.md. Files
of version 0.1 lack what has a default here; they counted otherwise, which `numbers` tells. None says undefined.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field

from mhim.pipeline.store import layout, reading
from mhim.pipeline.store.records import Number, Record
from mhim.pipeline.training.card import ChoiceRecord, Facts, Fallback, Metric, TaskRecord
from mhim.pipeline.training.choices import Choices

METRICS = "metrics.json"


class Estimate(Record):
    """A number with its bootstrap interval; n: bootstrap samples that defined it."""

    value: Metric
    low: Metric = None
    high: Metric = None
    n: int | None = None


class OverTrainings(Record):
    """Mean and standard deviation over the n trainings (or models) that define a metric."""

    mean: Metric
    sd: Metric
    n: int


class PerFold(Record):
    """One training's metrics of the patients that it held out. cell: of the grid, "" without one."""

    repeat: int
    fold: int
    seed: int
    patients: int
    slides: int | None = None
    epoch: int
    cell: str | None = None
    fallback: Fallback | None = None
    choice: ChoiceRecord | None = None
    metrics: dict[str, Metric]


class Decisions(Record):
    """What the frozen thresholds decided; nothing where there are not two classes. undecided: share of the rows."""

    sensitivity: Metric = None
    specificity: Metric = None
    undecided: Number | None = None
    patients: int | None = None
    rows: int | None = None


class ReliabilityBin(Record):
    """Patients whose confidence is in one bin. to: its upper end."""

    to: Number
    n: int
    confidence: Number
    accuracy: Number


class Reliability(Record):
    """How far probabilities can be believed."""

    ece: Metric
    brier: Metric
    bins: list[ReliabilityBin]


class Metrics(Record):
    """`metrics.json` of a run. unit: what is counted; slides: how many, where each is a bag. split_hash: a list where
    its trainings are of several. confusion: counts[true class][class decided on]. reliability: `before` and `after`
    temperature scaling. interval_rule: how `low` and `high` of a number were found. target: of several, which one this
    is; targets: of the file of all, name -> patients whose cell is known."""

    numbers: int | None = None
    unit: str
    patients: int
    slides: int | None = None
    model: str
    task: TaskRecord
    headline: str
    split_hash: str | list[str]
    folds: int
    seeds: int
    trainings: int | None = None
    protocol: str
    features: Facts
    warnings: list[str]
    over_folds: dict[str, OverTrainings]
    test: dict[str, Estimate]
    pairs: int | None = None
    horizons: list[Number] = Field(default_factory=list)
    confidence: Number
    bootstrap: int
    per_fold: list[PerFold]
    choices: Choices | None = None
    ensemble: dict[str, Estimate] = Field(default_factory=dict)
    log_rank_p: Metric = None
    log_rank_stratified_p: Metric = None
    interval_rule: str | None = None
    target: str | None = None
    targets: dict[str, int] | None = None
    pooled: dict[str, Estimate] = Field(default_factory=dict)
    decision_rule: str | None = None
    confusion: list[list[int]] | None = None
    class_patients: dict[str, int] | None = None
    decisions: Decisions | None = None
    reliability: dict[str, Reliability] | None = None

    @classmethod
    def read(cls, run: Path) -> Self:
        """Those of the folder `run`. Raises StoreError, FileNotFoundError where it is not scored."""
        return cls.of(reading.read_json(run / METRICS), run / METRICS)

    @property
    def of_whom(self) -> str:
        """Of what the numbers are, in words."""
        if self.slides is None:
            return f"{self.patients} held-out patients"
        return f"{self.slides} held-out slides of {self.patients} patients"

    @property
    def paired(self) -> str:
        """Of what pairs of ranking are, in words that go on with "the same training held out"."""
        return "patients whom" if self.slides is None else "slides that"

    @property
    def drawn(self) -> str:
        """How patients are drawn for intervals and paired differences, in words."""
        return "inside their folds" if self.slides is None else "with all their slides, over all folds together"

    @property
    def counted_otherwise(self) -> bool:
        """Whether version 0.1 counted these numbers."""
        return self.numbers != layout.NUMBERS


class ExternalDecisions(Record):
    """Decisions on other patients beside those on the run's own."""

    external: Decisions
    internal: Decisions


class Familiar(Record):
    """Those of the patients whom the run knows: held-out numbers, never external."""

    patients: int
    slides: int
    metrics: dict[str, Estimate]


class ExternalMetrics(Record):
    """`metrics.json` of other patients, beside the run's own. external: the mean over the models; external_models: with
    its standard deviation; external_ensemble: all models together; internal: the run's."""

    numbers: int
    unit: str
    patients: int
    slides: int
    without_label: int
    of_another_class: int
    task: TaskRecord
    confidence: Number
    several_slides: str
    models: int
    horizons: list[Number]
    external: dict[str, Estimate]
    external_models: dict[str, OverTrainings]
    external_ensemble: dict[str, Estimate]
    internal: dict[str, Estimate]
    internal_patients: int | None
    choices: Choices
    warnings: list[str]
    interval_rule: str | None = None
    target: str | None = None
    decision_rule: str | None = None
    confusion: list[list[int]] | None = None
    decisions: ExternalDecisions | None = None
    reliability: dict[str, Reliability] | None = None
    known: Familiar | None = None
