"""Every setting of every model and segmenter does something: another valid value gives other numbers."""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mhim.configs import lookup
from tests.contracts.test_models import SMALL, TWO, bag, make, target
from tests.contracts.test_tissue import WEIGHTLESS, image

MODELS = "mhim.mil.models"
# what else must be set so that the setting is asked for
WITH: dict[str, dict[str, Any]] = {
    "mhim.heads": {"student": "transmil", "score": "attention", "share_max": 1.0, "heads": "mean", "mask_ratio_h": 0.3},
    "mhim.share_max": {"mask_ratio_h": 0.3},
    "mhim.mask_ratio_hr": {"share_max": 1.0, "mask_ratio_h": 0.1},
    "mhim.mask_ratio_h": {"share_max": 1.0},
    "mhim.mask_decay": {"mask_ratio_h": 0.3, "share_max": 1.0},
    "mhim.rounding": {"mask_ratio_h": 0.05, "share_max": 1.0},
    "mhim.score": {"mask_ratio_h": 0.2, "share_max": 1.0},
    "mhim.min_kept": {"keep_ratio": 0.0},
    **{f"mhim.{s}": {"mask": "evidence", "evidence_few": 1.0} for s in ("evidence_left", "kinds", "learn_left")},
    "mhim.evidence_few": {"mask": "evidence", "evidence_left": 0.1},
    "mhim.student_start": {"teacher": "frozen"},
    "mhim.momentum_schedule": {"momentum": 0.9},
    "acmil.heads": {"form": "heads"},
    "aem.heads": {"form": "query"},
}
# a valid value where the generic ones are not, or are the default in effect
OTHER: dict[str, Any] = {
    "mhim.student": "dsmil",
    "mhim.student_params": {"width": 8},
    "mhim.min_kept": 4,
    "rrt.kernel": 7,
    "dgrmil.warmup": 0.9,
    "rrt.regions": 1,
}


def others(key: str, kind: Any, value: Any) -> Iterator[Any]:
    """Values unlike `value`."""
    if key in OTHER:
        yield OTHER[key]
    for one in (kind, *typing.get_args(kind)):
        if typing.get_origin(one) is Literal:
            yield from (option for option in typing.get_args(one) if option != value)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value * 2, value / 2, value + 1, value - 0.3, value + 0.3)


def numbers(name: str, extra: dict[str, Any]) -> str:
    """Hash of all that two bags make of a fresh model: losses and gradients of a step, what it leaves, answers."""
    model, b = make(name, extra).eval(), bag(90, 9)
    with torch.no_grad():
        model.prepare(((bag(9, seed=s), target(s % 2 + 1)[-1:]) for s in range(30)), TWO)
    model.set_progress(0.5)
    model.train()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        named = model.losses(b, target(2), TWO)
    sum(named.values()).backward()
    seen = [*named.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    model.after_step()
    seen += [*model.state_dict().values(), model.eval()(b).logits]
    digest = hashlib.sha256()
    for tensor in seen:
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (n, s)
        for n in lookup.names(MODELS)
        for s in lookup.find(MODELS, n).Params.model_fields
        if (n, s) != ("mhim", "published_within")  # which form is trained: tests/pipeline/training/test_forms.py
    ],
)
def test_each_setting_of_a_model_changes_its_numbers(name: str, setting: str) -> None:
    params = lookup.find(MODELS, name).Params
    extra = WITH.get(f"{name}.{setting}", {})
    value = ({k: v for k, v in SMALL.items() if k in params.model_fields} | extra).get(
        setting, params.model_fields[setting].get_default(call_default_factory=True)
    )
    assert numbers(name, extra) == numbers(name, extra), "the same again: else a change shows nothing"
    tried = []
    for other in others(f"{name}.{setting}", params.model_fields[setting].annotation, value):
        try:
            after = numbers(name, extra | {setting: other})
        except (ValidationError, lookup.LookupFailed):
            continue
        tried.append(other)
        if after != numbers(name, extra):
            return
    raise AssertionError(f"{name}.{setting}: {value!r} and {tried} give the same numbers")


def fatty() -> np.ndarray:
    """The disc with fat in its left half: thin pink membranes about white cells of 80 µm."""
    rgb = image()
    y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]]
    disc = (x - 130) ** 2 + (y - 100) ** 2 < 84**2
    cells = disc & (x < 130)
    rgb[cells] = (244, 240, 243)
    rgb[cells & ((x % 10 == 0) | (y % 10 == 0))] = (215, 170, 195)
    return rgb


@pytest.mark.parametrize(
    ("name", "setting"),
    [(n, s) for n in WEIGHTLESS for s in lookup.find("mhim.extract.tissue", n).Params.model_fields],
)
def test_each_setting_of_a_segmenter_moves_its_mask(name: str, setting: str) -> None:
    module = lookup.find("mhim.extract.tissue", name)
    pictures = [image(), fatty(), (image() * 0.2 + 180).astype(np.uint8), np.full((60, 60, 3), 90, np.uint8)]

    def masks(params: Any) -> list[bytes]:
        return [np.packbits(module.segment(rgb, 8.0, params)).tobytes() for rgb in pictures]

    value = module.Params.model_fields[setting].default
    before = masks(module.Params())
    for other in (value * 3, value / 3, value * 20, value / 20):
        try:
            params = module.Params.model_validate({setting: type(value)(other)})
        except ValidationError:
            continue
        if masks(params) != before:
            return
    raise AssertionError(f"{name}.{setting} changes no mask")
