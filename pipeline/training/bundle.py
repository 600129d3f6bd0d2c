"""The model bundle: one trained fold as a hospital could archive it, `model.safetensors` and `model.json`, no pickle.

In: weights and a card of plain values. Out: the model again, exact, with its task and what its features must be.
The card holds the model's name and settings, the task, the facts of the features (encoder, weights id, mpp, tile
size), the hash of the split, seed, versions, validation predictions, thresholds and metrics; no path, host or time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mhim.configs import lookup, texts
from mhim.mil import tasks
from mhim.mil.feed import Scale
from mhim.mil.novelty import Profile
from mhim.pipeline.store import layout, reading, seals
from mhim.pipeline.store.layout import CARD, FORMAT, StoreError
from mhim.pipeline.training.card import Card

WEIGHTS = "model.safetensors"
_MEAN, _SD = "input.mean", "input.sd"
_BAGS_MEAN, _BAGS_SD = "bags.mean", "bags.sd"


class BundleError(StoreError):
    """A model bundle is missing, damaged, or not for these features; the message says which and what to do."""


@dataclass(frozen=True)
class Bundle:
    """card: what `model.json` says. weights: the model's state dict. scale: standardisation, or None. profile: of
    the training bags, or None where none is known (weights that were brought in)."""

    card: Card
    weights: dict[str, Tensor]
    scale: Scale | None
    profile: Profile | None = None

    @property
    def task(self) -> tasks.Task:
        return self.card.task.value

    def model(self) -> Any:
        """The trained model in eval mode, on the CPU."""
        module = lookup.find("mhim.mil.models", self.card.model)
        params = lookup.params(module, self.card.model_params)
        model = module.build(self.card.in_dim, self.card.network.n_out, params)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise BundleError(f"the weights do not fit model {self.card.model!r}: {error}") from error
        return model.eval()

    def unlike(self, features: np.ndarray) -> float:
        """How far a bag, features (N, D), lies from the training bags, over the distance from which on it is unlike all
        that the model was trained and tested on; NaN where that is not known."""
        farthest = self.card.unlike_from
        return math.nan if self.profile is None or farthest is None else self.profile.distance(features) / farthest

    def check(self, facts: dict[str, Any]) -> None:
        """Refuse features of another encoder, weights, mpp or tile size. Raises BundleError naming each difference."""
        wrong = []
        for key, mine in self.card.features.plain().items():
            if key == "encoder_name" or (key == "encoder" and mine == facts.get("encoder_name")):
                continue  # a model of version 0.1 says how a user's own encoder calls itself
            if key in facts and facts[key] != mine:
                wrong.append(f"{key}: trained on {mine!r}, given {facts[key]!r}")
            elif key in ("encoder", "mpp", "dim") and key not in facts:
                wrong.append(f"{key}: trained on {mine!r}, the given features do not tell")
        if wrong:
            raise BundleError(
                "these features are not what the model was trained on; "
                + "; ".join(wrong)
                + ". Extract the slides again as the model needs them."
            )


def versions() -> dict[str, str]:
    """Versions that decide the weights' bytes."""
    return {name: version(name) for name in ("mhim-pipeline", "torch", "numpy")}


def write(
    folder: Path, card: Card, weights: dict[str, Tensor], scale: Scale | None, profile: Profile | None = None
) -> None:
    """Write a bundle into `folder`, without safetensors metadata: several keys come out in no fixed order."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    if scale is not None:
        tensors |= {_MEAN: torch.from_numpy(scale[0]).contiguous(), _SD: torch.from_numpy(scale[1]).contiguous()}
    if profile is not None:
        tensors |= {_BAGS_MEAN: torch.from_numpy(profile.mean), _BAGS_SD: torch.from_numpy(profile.sd)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CARD).write_text(card.text())


def read(folder: Path) -> Bundle:
    """The bundle in `folder`. Raises BundleError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = card_of(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} holds no model ({WEIGHTS} is missing)") from error
    except (ValueError, SafetensorError) as error:
        raise BundleError(f"the model in {folder} is damaged: {error}") from error
    mean, sd = tensors.pop(_MEAN, None), tensors.pop(_SD, None)
    scale = (mean.numpy(), sd.numpy()) if mean is not None and sd is not None else None
    mean, sd = tensors.pop(_BAGS_MEAN, None), tensors.pop(_BAGS_SD, None)
    profile = Profile(mean.numpy(), sd.numpy()) if mean is not None and sd is not None else None
    return Bundle(card, tensors, scale, profile)


def card_of(folder: Path) -> Card:
    """The card of the bundle in `folder`, without its weights. Raises BundleError."""
    found = _plain_card(folder)
    if found.get("format") != FORMAT:
        raise BundleError(f"the model in {folder} has format {found.get('format')}, this program reads {FORMAT}")
    try:
        return Card.of(found, folder / CARD)
    except StoreError as error:
        raise BundleError(str(error)) from error


def _plain_card(folder: Path) -> dict[str, Any]:
    """The values of `model.json`, whatever they are. Raises BundleError where there are none."""
    try:
        found = texts.read_json(seals.read_small(folder / CARD), f"{folder / CARD}")
    except FileNotFoundError as error:
        raise BundleError(f"{folder} holds no model ({CARD} is missing)") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"the model in {folder} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise BundleError(f"{folder / CARD} is no card of a model; copy the run again from where it was trained")
    return found


def permitted(folders: Iterable[Path]) -> None:
    """Look up the code of every model, before any work is done with one. Raises LookupFailed naming the card."""
    for folder in folders:
        card = _plain_card(folder)  # code that may not run is told before anything else is wrong with the card
        try:
            params = card.get("model_params")
            named = [card.get("model"), params.get("student") if isinstance(params, dict) else None]
            for name in (n for n in named if n is not None):
                lookup.find("mhim.mil.models", str(name))
        except lookup.LookupFailed as error:
            raise type(error)(f"{folder / CARD}: {error}") from error


def find(run: Path) -> list[Path]:
    """The folders of all trained folds of a run (or the folder itself, if it is one bundle), in order."""
    found = layout.trained(run)
    if not found:
        raise BundleError(f"{run} holds no trained model; run `pipeline train` first")
    return [_whole(folder) for folder in found]


def _whole(folder: Path) -> Path:
    """`folder`, if it is a whole one. Raises BundleError: results of the folds that are left would be other results."""
    found = seals.look(folder)
    if found is not None and found.wrong:
        with suppress(BundleError):  # of a card that was edited to name a stranger's code, that is what to tell
            permitted([folder])
        raise BundleError(reading.damage(folder, found.wrong))
    return folder
