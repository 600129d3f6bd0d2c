"""What a model's card, `model.json`, says: the trained fold it is of, and what a hospital must know to use it.

In: the plain values of the file, or the fields of a new one. Out: `Card`, frozen. Cards of version 0.1 lack what has a
default here, and have `cell`, which is not read. Knows no weights and no folder.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from mhim.mil import tasks
from mhim.pipeline.store.layout import FORMAT
from mhim.pipeline.store.records import Number, Record

Metric = Number | None  # None: undefined, which JSON has no number for


class TaskRecord(Record):
    """`Task.to_json` of `mil.tasks`, where each kind has its own keys. classes, weights: of classes and levels. edges:
    in the labels' unit of time. link: of ordinal logits. mean, sd: in the labels' unit; robust: the loss (regression).
    targets: name -> task, in the order of the logits (several)."""

    kind: tasks.Kind
    classes: list[str] = Field(default_factory=list)
    edges: list[Number] = Field(default_factory=list)
    weights: list[Number] = Field(default_factory=list)
    alpha: Number = 0.0
    link: str | None = None
    mean: Number | None = None
    sd: Number | None = None
    robust: str | None = None
    targets: dict[str, TaskRecord] | None = None

    @model_validator(mode="after")
    def _whole(self) -> TaskRecord:
        try:
            tasks.from_json(self.plain())
        except KeyError as error:
            raise ValueError(f"a task of kind {self.kind} needs {error.args[0]}") from error
        return self

    @property
    def value(self) -> tasks.Task:
        """The task."""
        return tasks.from_json(self.plain())


class Facts(Record):
    """What the features are that a model reads. mpp: µm per tile px, 0 for tables of bags. dim: numbers per tile."""

    encoder: str | None = None
    weights_id: str | None = None
    mpp: Number | None = None
    tile_px: Number | None = None
    stain_norm: str | None = None
    dim: int | None = None
    pooling: Any = None  # this and the next: what an encoder, perhaps a user's own, says of itself
    transform: Any = None
    encoder_name: str | None = None  # how a user's own encoder calls itself


class SplitRecord(Record):
    """The fold: hash of all folds, and numbers of bags: of patients, or of their slides with train.bag=slide."""

    hash: str
    repeat: int
    fold: int
    train: int
    val: int
    test: int


class Fallback(Record):
    """The plain model took over. model: the one that was asked for. by: `alarm` or `validation`; cards of version 0.1
    tell that in words only. epoch: the one that it would have kept; the card's own is the plain model's."""

    model: str = Field(alias="from")
    by: str | None = None
    why: str
    epoch: int | None = None


class ChoiceRecord(Record):
    """The evidence by which student or plain model was kept (`train.choice` other than `point`).

    by: `validation`, or `inner`: out-of-fold answers of inner folds. difference: of the headline, student less plain;
    None where the patients define none. standard_error: paired, over patients. margin: how many of them the student
    must be better by. patients: that gave evidence. folds, of_folds: inner folds that gave evidence, and all. told:
    whether the difference is beyond the margin, either way; where it is not, the simpler model is kept."""

    rule: str
    by: str
    margin: Number
    difference: Metric
    standard_error: Metric
    patients: int
    folds: int | None = None
    of_folds: int | None = None
    told: bool


class DrawnRecord(Record):
    """Which draw of a search this is. draws: how many there were, draw 0 the settings as given; failed: those that gave
    no model; settings: what this one drew."""

    number: int
    draws: int
    failed: list[int] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)


class FusionRecord(Record):
    """A fused model. kind: `train.fusion`. slide_task: of the logits of the network whose weights lie beside the card;
    the card's own task is that of the fused answers. modalities: `slide` and the tables, in order."""

    kind: str
    slide_task: TaskRecord
    modalities: list[str]

    @property
    def members(self) -> list[str]:
        """What is weighed: the modalities, and of co-attention the network that reads them together."""
        return [*self.modalities, *(["joint"] if self.kind == "coattn" else [])]


class ImportedWeights(Record):
    """The checkpoint of another program that the weights came from."""

    file: str
    sha256: str


class Given(Record):
    """A form of the model that was trained and not kept."""

    form: str
    why: str


class FormRecord(Record):
    """Which of the forms that a training tries in turn was kept, and why none of those before it."""

    kept: str
    tried: list[Given] = Field(default_factory=list)


class TargetRecord(Record):
    """What a card says of one target of several: the same as `Card` says of a single one."""

    temperature: Number | None = None
    threshold: Number | None = None
    risk_threshold: Number | None = None
    horizons: list[Number] | None = None
    interval: dict[str, Metric] | None = None
    validation: dict[str, Metric] = Field(default_factory=dict)
    test: dict[str, Metric] = Field(default_factory=dict)


class Card(Record):
    """`model.json`.

    in_dim: numbers per tile. made: how the features were made, as their own records say (`tile.mpp` ...). train:
    settings of the training. epoch: the chosen one, from 1; epochs: how many there were. validation, test: metric
    -> value. taught: a plain model of the same fold was the teacher. standardized: what train.standardize=auto
    found, with `why` it was done, None where it was not. calibrated: setting -> what the model chose on validation
    before its first step, in place of what `model_params` says (evidence_left of MHIM). temperature, threshold,
    risk_threshold: fitted on the validation patients. choice: the evidence for or against the student. pretrained:
    sha256, encoder and names of the weights that it started from. horizons: times of the time-dependent AUCs, in the
    labels' unit. interval: level -> half width of a prediction's interval, in the labels' unit; None: the whole line,
    as validation was too small. targets: name -> the same of each of several. drawn: which draw of a search validation
    chose. form: of MHIM, which of its forms was kept, whose settings `model_params` are. unlike_from: distance from
    which on a bag is unlike all that the model was trained and tested on."""

    format: int = FORMAT
    model: str
    model_params: dict[str, Any]
    fallback: Fallback | None = None
    choice: ChoiceRecord | None = None
    in_dim: int
    task: TaskRecord
    features: Facts
    made: dict[str, Any] | None = None
    split: SplitRecord
    seed: int
    protocol: str
    train: dict[str, Any]
    versions: dict[str, str]
    epoch: int
    epochs: int
    validation: dict[str, Metric]
    test: dict[str, Metric]
    taught: bool | None = None
    standardized: dict[str, Any] | None = None
    calibrated: dict[str, Number] | None = None
    pretrained: dict[str, Any] | None = None
    temperature: Number | None = None
    threshold: Number | None = None
    risk_threshold: Number | None = None
    horizons: list[Number] | None = None
    interval: dict[str, Metric] | None = None
    targets: dict[str, TargetRecord] | None = None
    unlike_from: Number | None = None
    imported: ImportedWeights | None = None
    fusion: FusionRecord | None = None
    drawn: DrawnRecord | None = None
    form: FormRecord | None = None

    @property
    def network(self) -> tasks.Task:
        """The task of the network's logits: the card's own, but for a fusion, whose answers are of another."""
        return (self.fusion.slide_task if self.fusion else self.task).value

    def seen_as(self, target: str) -> Card:
        """The card of one of several targets, as a run of it alone would have left it; "" gives the card itself."""
        if not target:
            return self
        tasks_, known = self.task.targets or {}, (self.targets or {}).get(target, TargetRecord())
        return self.model_copy(update={"task": tasks_[target], "targets": None, **dict(known)})

    @property
    def bag(self) -> str:
        """`train.bag`: what one answer is of, a patient or each slide. Imported weights and old cards: a patient."""
        return "slide" if self.train.get("bag") == "slide" else "patient"

    @property
    def asked(self) -> str:
        """The model that was asked for, also where the training fell back to its plain model."""
        return self.fallback.model if self.fallback else self.model

    @property
    def headline(self) -> str:
        """The metric that selection and tables use."""
        return self.task.value.headline

    @property
    def place(self) -> tuple[int, int, int]:
        """(repeat, fold, seed): which training of its run this is."""
        return self.split.repeat, self.split.fold, self.seed

    @property
    def softening(self) -> Number:
        """The temperature by which logits are divided before they are probabilities; 1 where none was fitted."""
        return 1.0 if self.temperature is None else self.temperature
