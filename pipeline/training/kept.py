"""Which model of a fold is kept: the student, or the plain model that taught it. The rules of `train.fallback`,
`train.choice`.

In: the two models, or what they say of patients. Out: why the student gives way, None where it stays, and what the card
tells of the choice. No test patient has a part in it. Knows no folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil import preference
from mhim.mil import train as loop
from mhim.mil.feed import Case, Feed
from mhim.mil.preference import Pair
from mhim.mil.tasks import Task
from mhim.pipeline.training import bundle
from mhim.pipeline.training.card import ChoiceRecord

ALARM, VALIDATION, INNER = "alarm", "validation", "inner"


@dataclass(frozen=True)
class Verdict:
    """why, by: the student gives way, and by which check; None, "" where it is kept. record: of the evidence that was
    weighed, for the card. note: the same in words."""

    why: str | None = None
    by: str = ""
    record: ChoiceRecord | None = None
    note: str = ""


def may_fall_back(config: TrainConfig) -> bool:
    """Whether a model of these settings is held against the model that taught it."""
    module = lookup.find("mhim.mil.models", config.model)
    return config.fallback is not None and bool(getattr(module, "FALLS_BACK", True))


def weighs(config: TrainConfig) -> bool:
    """Whether that is done by weighing the evidence, which decides results: it enters fingerprints."""
    return config.choice != "point" and config.protocol == "honest" and may_fall_back(config)


def needs_inner(config: TrainConfig, validation: int) -> bool:
    """Whether so many validation patients are too few to tell, and inner folds give the evidence."""
    return weighs(config) and config.choice == INNER and validation < config.choice_patients


def by_few(config: TrainConfig, validation: int) -> bool:
    """Whether so many validation patients decide, by the better value alone, though they are too few to tell."""
    at_all = config.protocol == "honest" and config.select != "last" and may_fall_back(config)
    return at_all and config.choice == "point" and 0 < validation < config.choice_patients


def rule_of(config: TrainConfig) -> dict[str, Any]:
    """The rule, for fingerprints of trainings that it decides; the trainings that give evidence are inputs besides."""
    return {"rule": config.choice, "margin": config.choice_margin}


def unfit(
    model: Any,
    teacher: bundle.Bundle,
    of: list[Case],
    task: Task,
    scale: Any,
    config: TrainConfig,
    at: torch.device,
    within: float,
) -> str | None:
    """Why a form of `model` must give way to the next; None where it fits its training bags.

    It must have learnt of them what the plain model has, but for the share `within`: so far must their loss have fallen
    from that of an answer that knows nothing (logits of 0). Where the plain model itself has learnt little, that is
    little; a difference of losses would let a student pass there that has learnt nothing.
    """
    own, plain = _losses(model, teacher, of, task, scale, config, at)
    target = task.target([c.target for c in of if c.target is not None])
    nothing = float(task.with_memory(None).loss(torch.zeros(len(of), task.n_out, dtype=torch.float64), target))
    if own <= plain + within * max(0.0, nothing - plain):
        return None
    return f"{_told(own, plain)}, and {nothing:.3f} of no answer"


def alarm(
    model: Any, teacher: bundle.Bundle, of: list[Case], task: Task, scale: Any, config: TrainConfig, at: torch.device
) -> str | None:
    """Why `model` must give way to the plain model it was taught by (`train.fallback`), or None.

    A student that was trained on masked bags and cannot fit its own training bags whole has learnt from bags whose
    evidence was masked away, or leans on tokens that do not exist at test. The comparison needs no test patient.
    """
    if config.fallback is None:
        return None
    own, plain = _losses(model, teacher, of, task, scale, config, at)
    if own <= plain + config.fallback:
        return None
    return f"{_told(own, plain)} (train.fallback={config.fallback:g}): masking hurts here"


def _losses(
    model: Any, teacher: bundle.Bundle, of: list[Case], task: Task, scale: Any, config: TrainConfig, at: torch.device
) -> tuple[float, float]:
    """Of the model and of its plain model, in inference mode over whole bags."""
    room = config.cache_gb * 2**30
    with loop.isolated(None, at, config.threads):
        own = loop.evaluate(model, Feed(of, task, at, room, scale), task)["loss"]
        plain = loop.evaluate(teacher.model().to(at), Feed(of, task, at, room, teacher.scale), task)["loss"]
    return own, plain


def _told(own: float, plain: float) -> str:
    return f"training loss {own:.3f} with whole bags, against {plain:.3f} of the plain model"


def outdone(validation: dict[str, float], teacher: bundle.Bundle, task: Task) -> str | None:
    """Why a model with these metrics of the fold's validation patients must give way to the plain model, or None.

    `train.choice=point`. The plain model is one more candidate of the selection: where training on, with or without
    masks, only overfits, it was better before. A tie is no reason.
    """
    own, plain = validation.get(task.headline), teacher.card.validation.get(task.headline)
    if own is None or plain is None or not plain > own:
        return None
    found = f"validation {task.headline_called} {own:.3f}, against {plain:.3f} of the plain model"
    return f"{found}: masking does not help here"


def weighed(pairs: Sequence[Pair], task: Task, by: str, config: TrainConfig) -> Verdict:
    """The student is kept where the evidence says that it is better, by more than `train.choice_margin` standard
    errors; else the plain model is the simpler one.

    pairs: what plain model and student say, of validation (by VALIDATION) or of each inner fold (by INNER)."""
    found, margin = preference.weigh(pairs), config.choice_margin
    record = ChoiceRecord.model_validate(
        {
            "rule": config.choice,
            "by": by,
            "margin": margin,
            "difference": _number(found.value),
            "standard_error": _number(found.error),
            "patients": found.patients,
            **({"folds": found.parts, "of_folds": found.of} if by == INNER else {}),
            "told": found.tells(margin),
        }
    )
    note = told(record, task.headline_called)
    if found.prefers_other(margin):
        return Verdict(record=record, note=f"the student is kept: {note}")
    end = "masking hurts here" if record.told else "too little to tell, so the simpler model is kept"
    return Verdict(f"{note}: {end}", by, record)


def told(found: ChoiceRecord, called: str) -> str:
    """The evidence in words. called: the headline."""
    whom = f"{found.patients} validation patients"
    if found.by == INNER:
        whom = f"{found.patients} patients held out in {found.folds} of {found.of_folds} inner folds"
    if found.difference is None:
        return f"{whom} define no difference of {called} to the plain model"
    error = "no standard error" if found.standard_error is None else f"± {found.standard_error:.3f}"
    return f"{called} {found.difference:+.3f} {error} (paired, {whom}) against the plain model"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
