"""Settings of MHIM-MIL (`mil/models/mhim.py`, which says what each choice is for).

In: nothing. Out: `Params`, and the forms that they stand for. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from mhim.configs.schema import Settings, added, changed

PUBLISHED: dict[str, Any] = {
    "share_max": 1.0,
    "score": "probability",
    "order": "shuffled",
    "min_kept": 0,
    "merge": "mca",
    "merge_at_test": False,
    "consistency": "embedding",
    "teacher": "ema",
    "teacher_mode": "train",
    "student_start": "fresh",
}


class Params(Settings):
    """Settings of MHIM-MIL. By default the guarded form, before which `published_within` tries the published one."""

    published_within: float | None = changed(
        0.25,
        None,
        "the published form is trained first (of what is set to nothing else), and kept where it is short of what the "
        "plain model has learnt of whole training bags (the fall of their loss) by at most this share; null: never",
        ge=0,
    )
    student: str = Field("abmil", description="student: a model of this folder (abmil, transmil, dsmil ...)")
    student_params: dict[str, Any] = Field(default_factory=dict, description="settings of the student itself")
    mask_ratio_h: float = Field(0.03, ge=0, lt=1, description="share of the instances removed by highest score")
    mask_ratio_hr: float = Field(
        1.0,
        gt=0,
        le=1,
        description="random share of a correspondingly larger top set that is removed",
    )
    mask_decay: Literal["none", "cosine"] = Field("none", description="cosine: mask_ratio_h falls to 0 over training")
    mask_ratio_l: float = Field(0.0, ge=0, lt=1, description="share of the instances removed by lowest attention (v1)")
    mask_ratio: float = Field(0.0, ge=0, lt=1, description="share of the instances removed at random (v1)")
    rounding: Literal["ceil", "floor"] = Field("ceil", description="rounding of the numbers removed")
    mask: Literal["rate", "evidence"] = added(
        "rate",
        "how much the hard mask takes: mask_ratio_h of the instances within share_max, or, in place of both, so much "
        "of the teacher's evidence that evidence_left stays",
    )
    evidence_left: float = added(0.5, "share of the teacher's evidence that stays (mask=evidence)", gt=0, le=1)
    evidence_few: float = added(
        8.0,
        "evidence that is worth fewer instances than this is never masked, and so much of any is left (mask=evidence)",
        ge=1,
    )
    kinds: int = added(
        0,
        "kinds of tissue, prototypes of the training part's features, each of which keeps its own evidence_left and "
        "evidence_few (mask=evidence); 0 sees all as one",
        ge=0,
    )
    learn_left: bool = added(
        False, "evidence_left is learnt from the plain model's loss on masked validation bags (mask=evidence)"
    )
    share_max: float = Field(
        0.1,
        gt=0,
        le=1,
        description="most of the teacher's attention that the hard mask may remove; 1 is no cap",
    )
    score: Literal["margin", "probability", "attention"] = Field(
        "margin",
        description="what the hard mask ranks by: logit margin, published class-aware score (v2), attention (v1)",
    )
    heads: Literal["mean", "vote", "max"] = Field("mean", description="fusion of attention heads for score=attention")
    rank: Literal["float32", "autocast"] = Field(
        "float32",
        description="arithmetic of the teacher: always float32, or that of train.amp",
    )
    keep_ratio: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of the unmasked instances kept as they are; the others are merged (merge_ratio of "
        "the authors' program)",
    )
    min_kept: int = Field(1, ge=0, description="fewest instances kept as they are")
    order: Literal["slide", "shuffled"] = Field("slide", description="order of the kept instances")
    merge: Literal["mean", "mca", "none"] = Field(
        "mca",
        description="tokens of the merged instances: weighted means, the recycle network's cross-attention, "
        "or none (they are dropped)",
    )
    merge_k: int = Field(5, ge=1, description="number of tokens")
    merge_momentum: float = Field(0.9999, ge=0, le=1, description="momentum of the global queries (mca)")
    merge_dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the recycle network (mca)")
    merge_at_test: bool = Field(True, description="tokens of the whole bag also at test (merge=mca only)")
    query_update: Literal["after", "before_backward"] = Field("after", description="when the global queries move (mca)")
    consistency: Literal["probability", "embedding", "none"] = Field(
        "embedding",
        description="what student and teacher must agree in",
    )
    alpha: float = Field(0.5, ge=0, description="weight of the consistency loss")
    temp_teacher: float = Field(0.1, gt=0, description="temperature of the teacher's softmax (consistency=embedding)")
    temp_student: float = Field(1.0, gt=0, description="temperature of the student's softmax (consistency=embedding)")
    teacher: Literal["frozen", "ema"] = Field("ema", description="whether the teacher follows the student")
    teacher_mode: Literal["eval", "train"] = Field("train", description="train: the teacher's dropout is on")
    momentum: float = Field(0.9997, ge=0, le=1, description="momentum of the EMA teacher")
    momentum_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="cosine: the momentum rises to 1 over training",
    )
    student_start: Literal["teacher", "fresh"] = Field("teacher", description="weights from which the student starts")

    @model_validator(mode="after")
    def _no_contradiction(self) -> Params:
        if self.student.removeprefix("mhim.") in ("mhim", "mil.models.mhim"):
            raise ValueError("student: mhim cannot be its own student")
        if self.merge == "none" and self.keep_ratio < 1 and self.min_kept < 1:
            raise ValueError("min_kept: without tokens at least one instance must be kept")
        if self.mask == "rate" and (self.kinds or self.learn_left):
            raise ValueError("kinds and learn_left are of mask=evidence")
        others = {"mask_ratio": 0.0, "mask_ratio_l": 0.0, "mask_ratio_hr": 1.0, "mask_decay": "none"}
        given = [name for name, unset in others.items() if getattr(self, name) != unset]
        if self.mask == "evidence" and given:
            raise ValueError(f"{given[0]} is of mask=rate; mask=evidence takes nothing else: leave it at its default")
        return self


@dataclass(frozen=True)
class Form:
    """One of the forms that a training tries in turn. within: kept where it is short of what the plain model has learnt
    of its training bags by at most this share; None: kept."""

    name: str
    params: Params
    within: float | None = None


def forms(params: Params) -> tuple[Form, ...]:
    """The published form, if it is to be tried, and the guarded one; what is not at its default is so in both."""
    guarded = params.model_copy(update={"published_within": None})
    unset = {k: v for k, v in PUBLISHED.items() if getattr(params, k) == Params.model_fields[k].default}
    published = guarded.model_copy(update=unset)
    if params.published_within is None or published == guarded:
        return (Form("guarded", guarded),)
    return (Form("published", published, params.published_within), Form("guarded", guarded))
