"""Settings drawn at random, so that every model gets the same chance: ranges that the models declare, and their draws.

In: a model's module, whose `TUNED` maps names of its `Params` to ranges, beside these in its file, and the number of a
draw. Out: settings of training and model. What of training is drawn for every model is `COMMON`, here; a model's own
`TUNED` may name `lr` or `weight_decay` too, and then means its own. MHIM draws its student's as well. Draw 0 draws
nothing: it is the settings as given. Random search: Bergstra and Bengio, JMLR 13 (2012).

Draw k of a setting is a function of k and the setting's name alone: two models that share a setting meet the same luck,
and a draw more changes none before it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mhim.configs import lookup
from mhim.configs.schema import TrainConfig
from mhim.mil.ranges import Choice, Range, Span

COMMON: dict[str, Range] = {"lr": Span(5e-5, 2e-3, log=True), "weight_decay": Span(1e-6, 1e-3, log=True)}
PARAMS = "student_params"  # where a model that teaches another keeps that one's settings


@dataclass(frozen=True)
class Drawn:
    """Settings of training, of the model, and of its student, that a draw sets."""

    train: dict[str, Any]
    params: dict[str, Any]
    student: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """All of them as one mapping, the student's as `student_params.<name>`."""
        return self.train | self.params | {f"{PARAMS}.{k}": v for k, v in self.student.items()}


def ranges(model: str) -> dict[str, Range]:
    """What is drawn for a model: its own ranges after the common ones. One that declares none has those."""
    found: Mapping[str, Range] = getattr(lookup.find("mhim.mil.models", model), "TUNED", {})
    return COMMON | dict(found)


def draw(config: TrainConfig, number: int) -> Drawn:
    """What draw `number` >= 1 sets in these settings."""
    own = ranges(config.model)
    student: dict[str, Range] = {}
    module = lookup.find("mhim.mil.models", config.model)
    if PARAMS in module.Params.model_fields:
        named = lookup.params(module, config.model_params).student
        every = ranges(named)
        fields = lookup.find("mhim.mil.models", named).Params.model_fields
        student = {k: r for k, r in every.items() if k in fields}
        own = {k: r for k, r in every.items() if k not in fields} | getattr(module, "TUNED", {})
    train = {k: _one(r, k, number) for k, r in own.items() if k in COMMON}
    params = {k: _one(r, k, number) for k, r in own.items() if k not in COMMON}
    return Drawn(train, params, {k: _one(r, k, number) for k, r in student.items()})


def apply(config: TrainConfig, number: int) -> TrainConfig:
    """`config` as draw `number` has it; 0 as given. Raises a ValidationError where a range and a bound contradict."""
    if not number:
        return config
    found = draw(config, number)
    params = dict(config.model_params) | found.params
    if found.student:
        params[PARAMS] = dict(params.get(PARAMS, {})) | found.student
    return TrainConfig.model_validate(config.model_dump() | found.train | {"model_params": params})


def _one(span: Range, name: str, number: int) -> Any:
    """One value, from (number, name) alone."""
    return span.at(float(np.random.default_rng([number, zlib.crc32(name.encode())]).random()))


__all__ = ["COMMON", "Choice", "Drawn", "Range", "Span", "apply", "draw", "ranges"]
