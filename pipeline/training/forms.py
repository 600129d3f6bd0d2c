"""The forms of a model that a training tries in turn, the boldest first, of which the first that fits is kept.

In: settings, the plain model of the fold, cases. Out: the first form that fits its training bags, trained. No
validation or test patient has a part in that choice. Knows nothing of folds and files of results.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mhim.configs import lookup
from mhim.configs.errors import UserError
from mhim.configs.schema import TrainConfig, fingerprint_fields
from mhim.mil import train as loop
from mhim.mil.feed import Case
from mhim.mil.tasks import Task
from mhim.pipeline.training import bundle, fitting, kept, pretrained


class DeviceError(UserError, RuntimeError):
    """The GPU that was asked for is not there."""


def device(gpu: bool) -> torch.device:
    """The GPU if asked for, else the CPU. Raises DeviceError instead of falling back in silence."""
    if not gpu:
        return torch.device("cpu")
    # without it cuBLAS picks its work space by what else runs, and with it the order of sums
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        raise DeviceError("train.gpu is set, but torch finds no GPU on this machine; leave --gpu away to use the CPU")
    return torch.device("cuda")


def build_model(config: TrainConfig, in_dim: int, task: Task, seed: int, teacher: bundle.Bundle | None) -> Any:
    """A new model with weights drawn from `seed`, its teacher filled from the baseline's bundle."""
    module = lookup.find("mhim.mil.models", config.model)
    with loop.seeded(seed):
        model = module.build(in_dim, task.n_out, lookup.params(module, config.model_params))
        if teacher is not None:
            model.start_from(teacher.weights)
    return model


@dataclass(frozen=True)
class Kept:
    """The form of the model that a training keeps, with its best weights in it.

    params: its settings, whole. begun: what the weights started from. name: of the form, "" where the model has one.
    judged: the alarm was asked already. tried: the forms before it, `form` and `why` each was not kept."""

    model: Any
    state: loop.State
    params: dict[str, Any]
    begun: dict[str, Any] | None
    name: str
    judged: bool
    tried: list[dict[str, str]]

    @property
    def told(self) -> dict[str, Any]:
        """What the card says of it."""
        return {"form": {"kept": self.name, "tried": self.tried}} if self.name else {}


def forms_of(config: TrainConfig, taught: bool) -> list[tuple[str, dict[str, Any], float | None]]:
    """The forms of a model that its training tries in turn (`mil.parts.mhim_settings.forms`): name, settings, and the
    limit of the alarm that decides whether it is kept, None of the last. One, of no name, where its file has no such
    choice or there is no plain model to compare with."""
    module = lookup.find("mhim.mil.models", config.model)
    params = lookup.params(module, config.model_params)
    found = module.forms(params) if taught and hasattr(module, "forms") else ()
    if len(found) < 2:
        return [("", fingerprint_fields(params), None)]
    return [(form.name, fingerprint_fields(form.params), form.within) for form in found]


def first_kept(
    config: TrainConfig,
    seed: int,
    facts: Mapping[str, Any],
    task: Task,
    teacher: bundle.Bundle | None,
    sides: tuple[list[Case], list[Case]],
    partial: Path,
    opened: Callable[[str], AbstractContextManager[Callable[[dict[str, Any]], None]]],
    weights_sha256: str | None,
) -> Kept:
    """Train the forms of the model in turn, until one fits its training bags; the last is kept in any case.

    opened: the experiment log of the form of that name, whose epochs begin anew."""
    training = sides[0]
    forms = forms_of(config, teacher is not None)
    tried = fitting.tried(partial, [name for name, _, _ in forms[:-1]])
    for name, params, within in forms[len(tried) :]:
        form = config.model_copy(update={"model_params": params})
        model = build_model(form, int(facts["dim"]), task, seed, teacher)
        begun = pretrained.begin(model, form, facts, weights_sha256)
        model.to(device(config.gpu))
        checkpoint = f"{name}.pt" if tried else fitting.CHECKPOINT
        try:
            with opened(name) as log:
                state = fitting.fitted(model, *sides, task, form, seed, partial, log, checkpoint)
        except loop.TrainingDiverged as error:
            if within is None:
                raise
            why = str(error)
        else:
            model.load_state_dict(state["best"]["weights"])
            scale, at = loop.scale_of(state), device(config.gpu)
            if within is None or teacher is None:
                return Kept(model, state, params, begun, name, False, tried)
            found = kept.unfit(model, teacher, training, task, scale, config, at, within)
            if found is None:
                return Kept(model, state, params, begun, name, True, tried)
            why = found
        tried = [*tried, {"form": name, "why": why}]
        fitting.give_up(partial, tried, checkpoint)
    raise AssertionError("the last form is kept")
